# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Features of every layer, trained by themselves on what a dense model gave that layer
(LESS, arXiv 2402.09398, section 4)."""

import math
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import torch

from ..cache.layout import STATE_RANK
from ..methods.less import Kernels
from .corpus import Corpus
from .less_evaluate import Evaluation, forward
from .less_rows import Kept, Rows, attended, logits_of, recorded
from .recorded import attending, causal

CALIBRATION_TEXTS = 4
# A scale's logarithm is trained divided by this, so that it moves faster than weights.
SCALE = 10.0
# Of a state's mass from that of what has left, in nats: tried at first.
OFFSETS = [*range(-8, 3)]


def new_kernels(config, hidden: int, seed: int) -> list[Kernels]:
    """Of every layer: uniform; scales as LessTrainee has them, a logarithm of 0."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )

    def uniform(*shape: int) -> torch.Tensor:
        bound = math.sqrt(6 / (shape[-1] + shape[-2]))
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound

    def of_layer() -> Kernels:
        return Kernels(
            q1=uniform(heads, size, hidden),
            q2=uniform(heads, hidden, STATE_RANK),
            k1=uniform(kv_heads, size, hidden),
            k2=uniform(kv_heads, hidden, STATE_RANK),
            k3=uniform(kv_heads, STATE_RANK, STATE_RANK),
            s1=torch.zeros(kv_heads, STATE_RANK),
            s2=torch.full((kv_heads, STATE_RANK), 1e-4),
        )

    return [of_layer() for _ in range(config.num_hidden_layers)]


def _projections(model) -> torch.Tensor:
    """Output projections: [layers, hidden size, heads * head size] fp32.

    Raises:
        ValueError: layers differ in shape, which one batch of all cannot have.
    """
    weights = [layer.self_attn.o_proj.weight for layer in model.model.layers]
    shapes = {tuple(weight.shape) for weight in weights}
    if len(shapes) > 1:
        raise ValueError(
            f"output projections of the layers have shapes {sorted(shapes)}; `less` "
            "trains models whose layers have the same shapes"
        )
    return torch.stack(weights).float()


class LessTrainee:
    """Features of all layers; windows of a corpus."""

    def __init__(self, model, corpus: Corpus, args) -> None:
        self.model, self.corpus, self.args = model, corpus, args
        self.kept = Kept(args.sinks, args.window, args.block)
        self._recorded: dict[int, Rows] = {}
        self._evaluation: Evaluation | None = None
        self._project = _projections(model)
        layers = new_kernels(model.config, args.hidden, args.seed)
        self._parameters = {
            f.name: torch.nn.Parameter(
                torch.stack([getattr(k, f.name) for k in layers]).to(model.device)
            )
            for f in fields(Kernels)
        }
        texts = [self._text(i) for i in range(min(CALIBRATION_TEXTS, args.texts))]
        with torch.no_grad():
            self._parameters["s1"] += self._scale(texts)[..., None] / SCALE
            errors = [self._error(rows, rows.exact.float()) for rows in texts]
        # What errors are shares of, by layer.
        self.alone = torch.stack(errors).mean(0)

    @property
    def kernels(self) -> Kernels:
        """Of all layers at once, as they are served."""
        # A state must take as much mass as what has left had, which differs by many
        # orders of magnitude between heads: as a logarithm any is near.
        scale = (self._parameters["s1"] * SCALE).exp()
        return Kernels(**self._parameters | {"s1": scale})

    @property
    def layers(self) -> list[Kernels]:
        kernels = self.kernels
        each = (getattr(kernels, f.name).detach() for f in fields(Kernels))
        return [Kernels(*tensors) for tensors in zip(*each)]

    def _scale(self, texts: list[Rows]) -> torch.Tensor:
        """What makes a head's squared error least, which is near where the state's mass
        is that of what has left: a logarithm, [layers, kv heads]."""
        grouped = (1, (self.model.config.num_key_value_heads, -1))
        kernels = self.kernels
        given = [(rows, rows.sums(kernels)) for rows in texts]
        apart = [rows.mass_left() - rows.merged(sums)[1] for rows, sums in given]
        by_head = [a.unflatten(*grouped).flatten(2) for a in apart]
        middle = torch.cat(by_head, 2).median(2).values
        errors = []
        for offset in OFFSETS:
            scale = (middle + offset).exp()[..., None, None, None]
            error = torch.zeros_like(middle)
            for rows, sums in given:
                scaled = (sums.unflatten(*grouped) * scale).flatten(1, 2)
                found = rows.merged(scaled)[0] - rows.expected.float()
                error += found.square().unflatten(*grouped).sum((2, 3, 4))
            errors.append(error)
        return middle + middle.new_tensor(OFFSETS)[torch.stack(errors).argmin(0)]

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Each with a dimension of layers in front."""
        return self._parameters

    def tensors(self) -> dict[str, torch.Tensor]:
        """Of a checkpoint, in fp16; scales, which differ by many orders of magnitude,
        in fp32."""
        return {
            f"layers.{layer}.{name}": tensor if name in ("s1", "s2") else tensor.half()
            for layer, kernels in enumerate(self.layers)
            for name, tensor in vars(kernels).items()
        }

    def losses(self, step: int) -> Iterator[tuple[torch.Tensor, int]]:
        args = self.args
        epoch, place = divmod(step * args.batch, args.texts)
        order = np.random.default_rng([args.seed, epoch, 1]).permutation(args.texts)
        for number in order[place : place + args.batch]:
            rows = self._text(int(number))
            found = rows.merged(rows.sums(self.kernels))[0]
            shares = self._error(rows, found) / self.alone
            yield shares.mean() / args.batch, args.length

    def _text(self, number: int) -> Rows:
        """What all layers make of a text; recorded when first asked for."""
        if number in self._recorded:
            return self._recorded[number]
        args, rng = self.args, np.random.default_rng([self.args.seed, number])
        kind = "code" if rng.random() < args.code else "prose"
        ids = self.corpus.window(f"train-{kind}", args.length, rng)
        # From where something has left.
        candidates = np.arange(self.kept.tokens, args.length)
        chosen = rng.choice(candidates, min(args.rows, len(candidates)), replace=False)
        rows = torch.from_numpy(chosen).sort().values.to(self.model.device)
        tokens = torch.arange(args.length, device=rows.device)
        seen, near = tokens <= rows[:, None], self.kept.mask(rows, tokens)
        layers: list[Rows] = []

        def record(layer, query, key, value, scale):
            out = causal(layer, query, key, value, scale)
            logits = logits_of(query[:, rows], key, seen, scale)
            exact = attended(logits.masked_fill(~near, -math.inf), value)
            dense = (out[:, rows], logits.logsumexp(-1))
            layers.append(Rows.of(self.kept, rows, query, key, value, *exact, *dense))
            return out

        with attending(self.model, record), torch.no_grad():
            forward(self.model, ids)
        self._recorded[number] = recorded(layers)
        return self._recorded[number]

    def _error(self, rows: Rows, found: torch.Tensor) -> torch.Tensor:
        """Mean square behind the output projection, by layer."""
        apart = (found - rows.expected.float()).transpose(1, 2).flatten(2)
        return (apart @ self._project.mT).square().mean((1, 2))

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Of :class:`Evaluation`, for every window that was asked for."""
        args = self.args
        if self._evaluation is None:
            windows = args.evaluate_windows or [args.window]
            given = (self.kept, windows, args.length, args.evaluate_samples)
            self._evaluation = Evaluation(self.model, self.corpus, *given)
        return {"by_window": self._evaluation.report(self.layers)}

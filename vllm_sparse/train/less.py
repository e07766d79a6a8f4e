# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``less``: teach a state to answer for tokens that have left (LESS, arXiv 2402.09398,
section 4).

The model is frozen and runs densely; each layer's features are trained by themselves
to give that layer's output, behind its output projection, from sinks, window and state.
Texts are recorded once, when a step first asks for them, and are trained on many times.
The loss is the share of the squared error that is left of what sinks and window alone
make. OUT gets ``checkpoint/`` for ``--attention-backend less``, ``run.json`` with
losses and perplexities, and ``state.pt`` to go on from.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from .. import checkpoint
from ..cache.layout import BLOCK_SIZE, STATE_RANK
from ..methods.less import KIND, Kernels, described
from .corpus import Corpus
from .forward import load_model
from .less_evaluate import Evaluation, forward
from .less_rows import Kept, Rows
from .loop import Optimisation, train
from .options import parser_of, print_state
from .recorded import attending, causal

NEEDS = """needs, for SmolLM2-135M: 75 MB of memory a text of 2,048 tokens beside 2 GB;
on one thread of a CPU 6 seconds to record a text and 0.5 a step; a GPU was not
tried."""
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


class LessTrainee:
    """Features of all layers; windows of a corpus."""

    def __init__(self, model, corpus: Corpus, args) -> None:
        self.model, self.corpus, self.args = model, corpus, args
        self.kept = Kept(args.sinks, args.window, args.block)
        self._recorded: dict[int, list[Rows]] = {}
        self._evaluation: Evaluation | None = None
        kernels = [
            {f.name: getattr(k, f.name).to(model.device) for f in fields(Kernels)}
            for k in new_kernels(model.config, args.hidden, args.seed)
        ]
        self._parameters = [
            {name: torch.nn.Parameter(t) for name, t in of_layer.items()}
            for of_layer in kernels
        ]
        texts = [self._text(i) for i in range(min(CALIBRATION_TEXTS, args.texts))]
        # What errors are shares of, by layer.
        self.alone = [0.0] * len(kernels)
        for layer, parameters in enumerate(self._parameters):
            rows = [text[layer] for text in texts]
            with torch.no_grad():
                scale = self._scale(layer, rows)
                parameters["s1"] += scale[:, None] / SCALE
                errors = [self._error(layer, r, r.exact.float()) for r in rows]
            self.alone[layer] = float(torch.stack(errors).mean())

    @property
    def layers(self) -> list[Kernels]:
        """As they are served."""
        return [self._kernels(layer) for layer in range(len(self._parameters))]

    def _kernels(self, layer: int, scale: torch.Tensor | float = 0.0) -> Kernels:
        """
        Args:
            scale: [kv heads], added to the logarithm of the state's mass.
        """
        given = self._parameters[layer]
        # A state must take as much mass as what has left had, which differs by many
        # orders of magnitude between heads: as a logarithm any is near.
        more = torch.as_tensor(scale, device=given["s1"].device)[..., None]
        return Kernels(**given | {"s1": (given["s1"] * SCALE + more).exp()})

    def _scale(self, layer: int, rows: list[Rows]) -> torch.Tensor:
        """What makes a head's squared error least, which is near where the state's mass
        is that of what has left: a logarithm, [kv heads]."""
        shape = (rows[0].key.shape[0], -1)
        apart = [r.mass_left() - r.merged(self._kernels(layer))[1] for r in rows]
        middle = torch.cat([a.reshape(shape) for a in apart], 1).median(1).values
        errors = []
        for offset in OFFSETS:
            scale = middle + offset
            error = 0.0
            for r in rows:
                found = r.merged(self._kernels(layer, scale))[0] - r.expected.float()
                error = error + found.square().reshape(shape).sum(1)
            errors.append(error)
        return middle + middle.new_tensor(OFFSETS)[torch.stack(errors).argmin(0)]

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"layers.{layer}.{name}": parameter
            for layer, parameters in enumerate(self._parameters)
            for name, parameter in parameters.items()
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Of a checkpoint."""
        return {
            f"layers.{layer}.{f.name}": getattr(kernels, f.name).detach()
            for layer, kernels in enumerate(self.layers)
            for f in fields(Kernels)
        }

    def losses(self, step: int) -> Iterator[tuple[torch.Tensor, int]]:
        args = self.args
        epoch, place = divmod(step * args.batch, args.texts)
        order = np.random.default_rng([args.seed, epoch, 1]).permutation(args.texts)
        for number in order[place : place + args.batch]:
            text = self._text(int(number))
            for layer, rows in enumerate(text):
                found = rows.merged(self._kernels(layer))[0]
                share = self._error(layer, rows, found) / self.alone[layer]
                # Layers are independent: each has a graph of its own.
                yield share / len(text) / args.batch, args.length // len(text)

    def _text(self, number: int) -> list[Rows]:
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
        found: list[Rows] = []

        def record(layer, query, key, value, scale):
            out = causal(layer, query, key, value, scale)
            given = (rows, query, key, value, scale, self.kept)
            found.append(Rows.recorded(*given, out))
            return out

        with attending(self.model, record):
            forward(self.model, ids)
        self._recorded[number] = found
        return found

    def _error(self, layer: int, rows: Rows, found: torch.Tensor) -> torch.Tensor:
        """Mean square behind the output projection."""
        project = self.model.model.layers[layer].self_attn.o_proj
        apart = (found - rows.expected.float()).transpose(0, 1).flatten(1)
        return (apart @ project.weight.float().T).square().mean()

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Of :class:`Evaluation`, for every window that was asked for."""
        args = self.args
        if self._evaluation is None:
            windows = args.evaluate_windows or [args.window]
            given = (self.kept, windows, args.length, args.evaluate_samples)
            self._evaluation = Evaluation(self.model, self.corpus, *given)
        return {"by_window": self._evaluation.report(self.layers)}


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(
        "less",
        __doc__,
        NEEDS,
        steps=1500,
        learning_rate=4e-3,
        warmup=20,
        save_every=250,
        evaluate_every=0,
        evaluate_samples=4,
    )
    add = parser.add_argument
    add("model", type=Path, help="folder of a llama model in transformers' format")
    add("--sinks", type=int, default=BLOCK_SIZE, help="first tokens that stay")
    add("--window", type=int, default=2 * BLOCK_SIZE, help="tokens of the window")
    add(
        "--block",
        type=int,
        default=BLOCK_SIZE,
        choices=(1, BLOCK_SIZE),
        help="windows begin with one; what 1 gives is for comparison, not served",
    )
    add("--length", type=int, default=2048, help="tokens of a text")
    add("--texts", type=int, default=64, help="that are recorded")
    add("--batch", type=int, default=1, help="texts of a step")
    add("--rows", type=int, default=256, help="positions of a text trained on")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the frozen model; auto: bfloat16 on GPUs, float32 on CPUs, of which "
        "those with 16-bit products are twice as fast with bfloat16",
    )
    add("--hidden", type=int, default=64, help="numbers between a feature's layers")
    add(
        "--evaluate-windows",
        type=int,
        nargs="+",
        help="to evaluate; by default that which is trained",
    )
    args = parser.parse_args(argv)
    least = {"sinks": 0, "window": args.block}
    for name in least:
        if getattr(args, name) % args.block or getattr(args, name) < least[name]:
            parser.error(
                f"--{name} must be a multiple of {args.block} from {least[name]} on"
            )
    longest = max(args.evaluate_windows or [], default=0)
    if args.length <= args.sinks + max(args.window, longest) + 2 * args.block:
        parser.error("--length leaves nothing that has left the window")
    if args.texts % args.batch:
        parser.error("--texts must be a multiple of --batch")
    return args


RECIPE = ["sinks", "window", "block", "length", "texts", "batch", "rows", "hidden"]
RECIPE += ["code", "dtype", "seed", "steps"]


def main(argv: list[str]) -> None:
    """The command."""
    args = arguments_of(argv)
    corpus = Corpus(args.data, args.model)
    model = load_model(args.model, torch.device(args.device))
    if args.dtype != "auto":
        model.to(getattr(torch, args.dtype))
    recipe = {name: getattr(args, name) for name in RECIPE}
    recipe |= {"base_sha256": checkpoint.base_hash(args.model)}
    recipe |= {"data_sha256": corpus.digest}
    trainee = LessTrainee(model, corpus, args)
    report = train(
        trainee,
        Optimisation(args.steps, args.learning_rate, args.warmup, clip=math.inf),
        args.out,
        recipe,
        args.minutes,
        args.save_every,
        args.evaluate_every,
    )
    config = described(model.config, args.hidden, args.sinks, args.window)
    config |= {"block": args.block}  # the engine has one alone, and refuses the other
    how = {**report["recipe"], "steps_done": report["step"], "tokens": report["tokens"]}
    folder = args.out / "checkpoint"
    tensors = trainee.tensors()
    checkpoint.save(folder, KIND, tensors, args.model, config, how, corpus.digest)
    print_state(folder, report, args.steps)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``less``: teach a state to answer for tokens that have left (LESS, arXiv 2402.09398,
section 4).

The model is frozen and runs densely; each layer's features are trained by themselves
to give that layer's output, behind its output projection, from sinks, window and state.
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
from ..methods.less import KIND, LEAST, Kernels, described
from .corpus import Corpus
from .forward import hidden_states, load_model, token_losses
from .loop import Optimisation, train
from .options import parser_of, print_state
from .recorded import attending, causal

NEEDS = """needs, for SmolLM2-135M: 6 GB of memory at 2,048 tokens on a CPU, some 10
seconds a step of two cores; a GPU was not tried."""
PERPLEXITY_ROWS = 512  # scored at a time


def new_kernels(config, hidden: int, seed: int) -> list[Kernels]:
    """Of every layer, as the authors begin: uniform, the state almost silent."""
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
            s1=torch.full((kv_heads, STATE_RANK), 1e-4),
            s2=torch.full((kv_heads, STATE_RANK), 1e-4),
        )

    return [of_layer() for _ in range(config.num_hidden_layers)]


def kept_tokens(
    rows: torch.Tensor, length: int, sinks: int, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What positions attend to exactly, and what has left: [n, length] bool both."""
    first = (rows // BLOCK_SIZE * BLOCK_SIZE - window).clamp(min=0)
    token = torch.arange(length, device=rows.device)
    past = token <= rows[:, None]
    kept = past & ((token < sinks) | (token >= first[:, None]))
    return kept, past & ~kept


def attend_rows(
    kernels: Kernels | None, rows, query, key, value, scale, sinks, window
) -> torch.Tensor:
    """Attention of the positions ``rows``: [heads, n, D] fp32; without kernels, of
    sinks and window alone.

    Args:
        query: [heads, length, D] of all positions, after RoPE.
        key, value: [kv heads, length, D].
    """
    group = query.shape[0] // key.shape[0]
    kept, left = kept_tokens(rows, query.shape[1], sinks, window)
    query = query[:, rows].float()
    keys = key.float().repeat_interleave(group, 0)
    values = value.float().repeat_interleave(group, 0)
    logits = (query @ keys.mT * scale).masked_fill(~kept, -math.inf)
    if kernels is None:
        return logits.softmax(-1) @ values
    lse = logits.logsumexp(-1, keepdim=True)
    psi = kernels.psi(key).repeat_interleave(group, 0)
    weights = (kernels.phi(query) @ psi.mT) * left
    mass = weights.sum(-1, keepdim=True).clamp(min=LEAST)
    total = torch.logaddexp(lse, mass.log())
    return (logits - total).exp() @ values + weights @ values * (-total).exp()


class LessTrainee:
    """Features of all layers; windows of a corpus."""

    def __init__(self, model, corpus: Corpus, kernels: list[Kernels], args) -> None:
        self.model, self.corpus, self.args = model, corpus, args
        self.layers = [
            Kernels(
                **{
                    f.name: torch.nn.Parameter(getattr(k, f.name).to(model.device))
                    for f in fields(Kernels)
                }
            )
            for k in kernels
        ]

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"layers.{i}.{f.name}": getattr(kernels, f.name)
            for i, kernels in enumerate(self.layers)
            for f in fields(Kernels)
        }

    def losses(self, step: int) -> Iterator[tuple[torch.Tensor, int]]:
        args, rng = self.args, np.random.default_rng([self.args.seed, step])
        kind = "code" if rng.random() < args.code else "prose"
        ids = self.corpus.window(f"train-{kind}", args.length, rng)
        # From where something has left.
        first = args.sinks + args.window + BLOCK_SIZE
        rows = torch.from_numpy(rng.choice(np.arange(first, args.length), args.rows))
        rows = rows.sort().values.to(self.model.device)
        found = []

        def record(layer, query, key, value, scale):
            out = causal(layer, query, key, value, scale)
            found.append(
                self._loss(layer, rows, query, key, value, scale, out[:, rows])
            )
            # Layers are independent: the graph of each ends with its own loss.
            found[-1].backward()
            found[-1] = found[-1].detach()
            return out

        with attending(self.model, record):
            self._forward(ids)
        # The gradients are there already.
        yield torch.stack(found).sum().requires_grad_(), args.length

    def _forward(self, ids: np.ndarray) -> torch.Tensor:
        tokens = torch.from_numpy(ids)[None].to(self.model.device)
        positions = torch.arange(len(ids), device=self.model.device)[None]
        with torch.no_grad():
            return hidden_states(self.model, tokens, positions)

    def _loss(self, layer, rows, query, key, value, scale, expected) -> torch.Tensor:
        given = (rows, query, key, value, scale, self.args.sinks, self.args.window)
        project = self.model.model.layers[layer].self_attn.o_proj

        def error(found):
            apart = (found - expected.float()).transpose(0, 1).flatten(1)
            return (apart @ project.weight.float().T).square().mean()

        with torch.no_grad():
            alone = error(attend_rows(None, *given))
        with torch.enable_grad():
            return (
                error(attend_rows(self.layers[layer], *given))
                / alone
                / len(self.layers)
            )

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Perplexities of held-out text where something has left, the same windows each
        time: dense; sinks and window; the same with the state's bytes as more tokens of
        the window; with the state."""
        args, rng = self.args, np.random.default_rng(1)
        more = args.window + state_tokens(self.model, args.sinks + args.window)
        arms: dict[str, tuple[bool, int] | None] = {
            "dense": None,
            "window": (False, args.window),
            "window_plus": (False, more),
            "less": (True, args.window),
        }
        nats: dict[str, dict[str, float]] = {}
        for kind in ("prose", "code"):
            drawn = [
                self.corpus.window(f"heldout-{kind}", args.length, rng)
                for _ in range(args.evaluate_samples)
            ]
            nats[kind] = {
                name: float(np.mean([self._nats(ids, arm) for ids in drawn]))
                for name, arm in arms.items()
            }
        perplexity = {
            kind: {name: round(math.exp(n), 3) for name, n in found.items()}
            for kind, found in nats.items()
        }
        closed = {
            f"closed_of_{name}": {
                kind: round((n[name] - n["less"]) / (n[name] - n["dense"]), 4)
                for kind, n in nats.items()
            }
            for name in ("window", "window_plus")
        }
        return {"perplexity": perplexity, **closed, "window_plus_tokens": more}

    def _nats(self, ids: np.ndarray, arm: tuple[bool, int] | None) -> float:
        args = self.args
        first = args.sinks + args.window + BLOCK_SIZE

        def attend(layer, query, key, value, scale):
            if arm is None:
                return causal(layer, query, key, value, scale)
            kernels = self.layers[layer] if arm[0] else None
            rows = torch.arange(query.shape[1], device=query.device)
            parts = [
                attend_rows(kernels, r, query, key, value, scale, args.sinks, arm[1])
                for r in rows.split(PERPLEXITY_ROWS)
            ]
            return torch.cat(parts, 1)

        with attending(self.model, attend):
            hidden = self._forward(ids)[0, first - 1 : -1]
        targets = torch.from_numpy(ids[first:]).to(hidden.device)
        return float(token_losses(hidden, self.model.lm_head.weight, targets).mean())


def state_tokens(model, kept: int) -> int:
    """Tokens that the states of kept blocks cost: fp32 beside 16-bit rows."""
    size = model.config.head_dim
    share = 4 * STATE_RANK * (size + 1) / (BLOCK_SIZE * 4 * size)
    return math.ceil(share * (kept + BLOCK_SIZE))


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(
        "less",
        __doc__,
        NEEDS,
        steps=150,
        learning_rate=3e-3,
        warmup=10,
        save_every=25,
        evaluate_every=0,
        evaluate_samples=4,
    )
    add = parser.add_argument
    add("model", type=Path, help="folder of a llama model in transformers' format")
    add("--sinks", type=int, default=BLOCK_SIZE, help="first tokens that stay")
    add("--window", type=int, default=2 * BLOCK_SIZE, help="tokens of the window")
    add("--length", type=int, default=2048, help="tokens of a sequence")
    add("--rows", type=int, default=256, help="positions of a sequence trained on")
    add("--hidden", type=int, default=64, help="numbers between a feature's layers")
    args = parser.parse_args(argv)
    for name in ("sinks", "window"):
        least = BLOCK_SIZE if name == "window" else 0
        if getattr(args, name) % BLOCK_SIZE or getattr(args, name) < least:
            parser.error(f"--{name} must be a multiple of {BLOCK_SIZE} from {least} on")
    if args.length <= args.sinks + args.window + 2 * BLOCK_SIZE:
        parser.error("--length leaves nothing that has left the window")
    return args


RECIPE = ["sinks", "window", "length", "rows", "hidden", "code", "seed", "steps"]


def main(argv: list[str]) -> None:
    """The command."""
    args = arguments_of(argv)
    corpus = Corpus(args.data, args.model)
    model = load_model(args.model, torch.device(args.device))
    kernels = new_kernels(model.config, args.hidden, args.seed)
    trainee = LessTrainee(model, corpus, kernels, args)
    recipe = {name: getattr(args, name) for name in RECIPE}
    recipe |= {"base_sha256": checkpoint.base_hash(args.model)}
    recipe |= {"data_sha256": corpus.digest}
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
    how = {**report["recipe"], "steps_done": report["step"], "tokens": report["tokens"]}
    tensors = {name: p.detach() for name, p in trainee.parameters().items()}
    folder = args.out / "checkpoint"
    checkpoint.save(folder, KIND, tensors, args.model, config, how, corpus.digest)
    print_state(folder, report, args.steps)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What a model makes of held-out text at several context lengths."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from .corpus import Corpus
from .forward import hidden_states, token_losses
from .synthetic import Sample, Synthetic

SCORED_TOKENS = 1024


@torch.no_grad()
def evaluate(
    model,
    corpus: Corpus,
    synthetic: Synthetic,
    lengths: list[int],
    windows: int = 4,
    needles: int = 10,
) -> dict[str, dict]:
    """Perplexities and needle hits, the same samples at every call.

    Args:
        lengths: tokens of context.
        windows, needles: samples of each kind and length.

    Returns:
        perplexity: {"code": {2048: ...}, "prose": {...}}, of the last tokens of windows
        (1,024, or half of the shortest context): those are the same tokens at every
        length, so a model that uses far context gets better with length.
        needle: {2048: {"hits", "samples", "nats"}}: one fact in held-out prose, asked
        for in a form that is not trained on. A hit: each token of the answer is the
        likeliest one after those before it, hence greedy completion gives the answer.
        needle_code: the same in held-out code, in another form that is not trained on,
        whose question is a comment: nothing of its syntax says that a number follows.
    """
    rng = np.random.default_rng(0)
    scored = min(SCORED_TOKENS, min(lengths) // 2)
    perplexity: dict[str, dict[int, float]] = {}
    for kind in ("code", "prose"):
        drawn = [
            corpus.window(f"heldout-{kind}", max(lengths), rng) for _ in range(windows)
        ]
        perplexity[kind] = {}
        for length in lengths:
            nats = [
                _last(model, ids[-length:], scored)[0].mean().item() for ids in drawn
            ]
            perplexity[kind][length] = round(float(np.exp(np.mean(nats))), 4)

    def made(kind: str, length: int, depth: float) -> Sample:
        window = partial(corpus.window, f"heldout-{kind}", rng=rng)
        return synthetic.held_out(kind, window, length, rng, depth)

    found = {
        name: {
            length: _needles(model, partial(made, kind, length), needles)
            for length in lengths
        }
        for name, kind in (("needle", "prose"), ("needle_code", "code"))
    }
    return {"perplexity": perplexity, **found}


def _needles(model, make: Callable[[float], Sample], count: int) -> dict:
    hits, nats = 0, []
    for i in range(count):
        depth = 0.1 + 0.8 * i / max(1, count - 1)
        sample = make(depth)
        losses, right = _last(model, sample.ids, sample.answer)
        hits += bool(right.all())
        nats.append(losses.sum().item())
    return {"hits": hits, "samples": count, "nats": round(float(np.mean(nats)), 4)}


def _last(model, ids: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of the last ``count`` tokens, and whether each was the likeliest."""
    tokens = torch.from_numpy(ids)[None].to(model.device)
    positions = torch.arange(len(ids), device=model.device)[None]
    hidden = hidden_states(model, tokens, positions)[0, -count - 1 : -1]
    head, targets = model.lm_head.weight, tokens[0, -count:]
    likeliest = torch.cat([(h @ head.T).argmax(-1) for h in hidden.split(4096)])
    return token_losses(hidden, head, targets), likeliest == targets

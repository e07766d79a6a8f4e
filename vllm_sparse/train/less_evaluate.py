# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What a model makes of held-out text where something has left, by what is kept of it:
dense; sinks and window; the same with the state's bytes spent on more tokens; with the
state."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..cache.layout import BLOCK_SIZE, STATE_RANK
from ..methods.less import Kernels
from .corpus import Corpus
from .forward import hidden_states, token_losses
from .less_rows import Kept, Rows, attended, logits_of
from .recorded import Attention, attending, causal

# Of positions whose logits are in memory at once, by device: few stay in the caches of
# a CPU, many are few kernels (32).
BLOCKS_AT_ONCE = {"cpu": 1}


def state_tokens(head_size: int, kept: Kept) -> int:
    """Tokens that states cost: fp32 beside 16-bit rows; a state with each kept block,
    or one where no blocks are kept."""
    states = math.ceil(kept.tokens / BLOCK_SIZE) if kept.block == BLOCK_SIZE else 1
    return math.ceil(states * 4 * STATE_RANK * (head_size + 1) / (4 * head_size))


def attend_exactly(
    first: int, query, key, value, scale: float, kept: Kept
) -> tuple[torch.Tensor, torch.Tensor]:
    """To what positions from ``first`` on keep: the result [H, n, D] and its lse
    [H, n], fp32.

    Args:
        query: [H, length, D]; key, value: [G, length, D].
    """
    length, device = key.shape[1], key.device
    begin = first // BLOCK_SIZE * BLOCK_SIZE
    end = math.ceil(length / BLOCK_SIZE) * BLOCK_SIZE
    rows = torch.arange(begin, end, device=device).view(-1, BLOCK_SIZE)
    sinks = torch.arange(kept.sinks, device=device)
    window = torch.arange(-kept.window, BLOCK_SIZE, device=device)
    parts = []
    for some in rows.split(BLOCKS_AT_ONCE.get(device.type, 32)):
        # Sinks, and what any position of a block has in its window; none twice.
        near = some[:, :1] + window
        near = near.masked_fill(near < kept.sinks, end)
        tokens = torch.cat([sinks.expand(len(some), -1), near], 1)
        at, tokens_at = (t.clamp(max=length - 1) for t in (some, tokens))
        given = (query[:, at], key[:, tokens_at], value[:, tokens_at])
        q, k, v = (t.transpose(0, 1) for t in given)
        parts.append(attended(logits_of(q, k, kept.mask(some, tokens), scale), v))
    exact, lse = (torch.cat(part).transpose(0, 1).flatten(1, 2) for part in zip(*parts))
    asked = slice(first - begin, length - begin)
    return exact[:, asked], lse[:, asked]


def serving(scored: int, kept: Kept, layers: Sequence[Kernels] | None) -> Attention:
    """Attention as it is served, of the positions that predict the tokens of a text
    from ``scored`` on; positions before those attend to everything.

    Args:
        layers: the states' kernels; None: there is no state.
    """

    def attend(layer, query, key, value, scale):
        before = slice(0, scored - 1)
        out = causal(layer, *(t[:, before] for t in (query, key, value)), scale)
        exact, lse = attend_exactly(scored - 1, query, key, value, scale, kept)
        if layers is not None:
            rows = torch.arange(scored - 1, key.shape[1], device=query.device)
            found = Rows.of(kept, rows, query, key, value, exact, lse)
            exact, _ = found.merged(found.sums(layers[layer]))
        return torch.cat([out, exact], 1)

    return attend


def nats(
    model, ids: np.ndarray, scored: int, kept: Kept | None, layers: list[Kernels] | None
) -> float:
    """Mean over the tokens of a text from ``scored`` on.

    Args:
        kept: what positions attend to; None: everything.
        layers: the states' kernels; None: there is no state.
    """
    attention = serving(scored, kept, layers) if kept else causal
    with attending(model, attention), torch.no_grad():
        hidden = forward(model, ids)[0, scored - 1 : -1]
    targets = torch.from_numpy(ids[scored:]).to(hidden.device)
    return float(token_losses(hidden, model.lm_head.weight, targets).mean())


def forward(model, ids: np.ndarray) -> torch.Tensor:
    """Last hidden states of a text: [1, length, hidden size]."""
    tokens = torch.from_numpy(ids)[None].to(model.device)
    positions = torch.arange(len(ids), device=model.device)[None]
    return hidden_states(model, tokens, positions)


class Evaluation:
    """The same texts at every call.

    Args:
        windows: that take the place of ``kept.window``, one after another.
        length, samples: of the texts of each kind.
    """

    def __init__(
        self,
        model,
        corpus: Corpus,
        kept: Kept,
        windows: list[int],
        length: int,
        samples: int,
    ) -> None:
        self.model = model
        rng = np.random.default_rng(1)
        self.texts = {
            kind: [
                corpus.window(f"heldout-{kind}", length, rng) for _ in range(samples)
            ]
            for kind in ("prose", "code")
        }
        self.kept = [replace(kept, window=window) for window in windows]
        # From where something has left, whatever the window.
        self.scored = kept.tokens - kept.window + max(windows)
        # Nats of what needs no training: by kind and what is kept.
        self._known: dict[tuple[str, Kept | None], float] = {}

    def report(self, layers: list[Kernels]) -> dict[str, dict]:
        """By window: ``perplexity`` {kind: {arm: ...}}, ``closed_of_window`` and
        ``closed_of_window_plus`` {kind: share of the gap in nats between that arm and
        dense which the state closes}, ``tokens`` and ``window_plus_tokens``."""
        return {str(kept.window): self._of_window(kept, layers) for kept in self.kept}

    def _of_window(self, kept: Kept, layers: list[Kernels]) -> dict:
        more = state_tokens(self.model.config.head_dim, kept)
        plus = replace(kept, window=kept.window + more)
        found = {
            kind: {
                "dense": self._untrained(kind, None),
                "window": self._untrained(kind, kept),
                "window_plus": self._untrained(kind, plus),
                "less": self._mean(kind, kept, layers),
            }
            for kind in self.texts
        }
        perplexity = {
            kind: {name: round(math.exp(n), 3) for name, n in arms.items()}
            for kind, arms in found.items()
        }
        closed = {
            f"closed_of_{name}": {
                kind: round((n[name] - n["less"]) / (n[name] - n["dense"]), 4)
                for kind, n in found.items()
            }
            for name in ("window", "window_plus")
        }
        tokens = {"tokens": kept.tokens, "window_plus_tokens": plus.tokens}
        return {"perplexity": perplexity, **closed, **tokens}

    def _untrained(self, kind: str, kept: Kept | None) -> float:
        if (kind, kept) not in self._known:
            self._known[kind, kept] = self._mean(kind, kept, None)
        return self._known[kind, kept]

    def _mean(self, kind: str, kept: Kept | None, layers) -> float:
        given = (self.scored, kept, layers)
        return float(np.mean([nats(self.model, t, *given) for t in self.texts[kind]]))

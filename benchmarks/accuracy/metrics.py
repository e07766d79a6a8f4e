# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Per-sample metrics of a forced continuation. Pure functions on plain numbers.

The first forced token is left out everywhere: prefill, not decoding, predicts it.
"""

import math
from dataclasses import dataclass

# Top tokens of each position's distribution that the engine returns.
TOP_LOGPROBS = 20
_TINY = 1e-6


@dataclass(frozen=True)
class ForcedResult:
    """The engine's raw distributions along one forced continuation of T tokens."""

    # [T] natural log-probability of each forced token.
    logprobs: list[float]
    # [T] {token id: natural log-probability} of the TOP_LOGPROBS likeliest tokens.
    top: list[dict[int, float]]

    def argmax(self, position: int) -> int:
        top = self.top[position]
        return max(top, key=top.__getitem__)


def bits_per_char(result: ForcedResult, num_chars: int) -> float:
    """Teacher-forced bits per character; ``num_chars`` without the first token's."""
    return -sum(result.logprobs[1:]) / math.log(2) / num_chars


def nats_per_token(result: ForcedResult) -> float:
    """Teacher-forced cross-entropy; its exponential is the perplexity."""
    return -sum(result.logprobs[1:]) / (len(result.logprobs) - 1)


def top1(result: ForcedResult, forced_ids: list[int]) -> float:
    """Share of forced tokens that are the likeliest ones."""
    hits = [result.argmax(i) == forced_ids[i] for i in range(1, len(forced_ids))]
    return sum(hits) / len(hits)


def agreement(result: ForcedResult, dense: ForcedResult) -> float:
    """Share of positions with the same likeliest next token as dense decoding."""
    positions = range(1, len(dense.top))
    return sum(result.argmax(i) == dense.argmax(i) for i in positions) / len(positions)


def kl_nats(result: ForcedResult, dense: ForcedResult) -> float:
    """Mean over positions of a lower bound of KL(dense || result), in nats.

    With p = dense, q = the method, S = dense's top 20 tokens, at one position:

        sum over S of p log(p / q~)  +  p_rest log(p_rest / q_rest)

    where p_rest = 1 - sum of p over S is everything else lumped together. Tokens of S
    that are not among the method's own top 20 have unknown q; q~ is then the method's
    20th probability, which q cannot exceed, and their mass stays inside q_rest
    (q_rest = 1 - sum of the known q over S). Lumping and both bounds only lower the
    value (data-processing inequality), so it is exact for near-identical
    distributions up to the tail's inner shape, and conservative for distant ones.
    """
    values = [_kl_at(dense.top[i], result.top[i]) for i in range(1, len(dense.top))]
    return sum(values) / len(values)


def _kl_at(p_top: dict[int, float], q_top: dict[int, float]) -> float:
    floor = min(q_top.values())
    total, p_rest, q_rest = 0.0, 1.0, 1.0
    for token, log_p in p_top.items():
        log_q = q_top.get(token)
        if log_q is not None:
            q_rest -= math.exp(log_q)
        p_rest -= math.exp(log_p)
        total += math.exp(log_p) * (log_p - (floor if log_q is None else log_q))
    # Rounding can push a rest of nothing below zero.
    p_rest, q_rest = max(p_rest, _TINY), max(q_rest, _TINY)
    return total + p_rest * math.log(p_rest / q_rest)

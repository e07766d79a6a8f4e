# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How many tokens sparse rows kept: histograms that kernels add to, and what they say.

A histogram is [..., KEPT_BINS] int64. Bins are eight to an octave, as csrc/params.h has
them; the last entry is the sum of all counts.
"""

from dataclasses import dataclass

import torch

KEPT_BINS = 176
_LOW = [
    # 8 + m of 2^3: the first count of a bin, fractions below 8 tokens included.
    2.0**exponent * (8 + step) / 8
    for exponent in range(KEPT_BINS // 8)
    for step in range(8)
]


def kept_bin(counts: torch.Tensor) -> torch.Tensor:
    """Bins of counts of at least 1."""
    bits = counts.float().view(torch.int32) >> 20  # exponent and three bits
    return (bits - (127 << 3)).clamp(0, KEPT_BINS - 2).long()


@torch.inference_mode()  # as the engine's steps, whose tensors may be given
def add_counts(counts: torch.Tensor, histogram: torch.Tensor) -> None:
    """Add the lists' lengths to ``histogram``; -1 (everything) is not counted.

    Args:
        counts: [num_rows, num_kv_heads] int32.
        histogram: [num_kv_heads, KEPT_BINS] int64.
    """
    listed = counts > 0
    bins = kept_bin(counts.clamp(min=1)).T
    histogram.scatter_add_(1, bins, listed.T.long())
    histogram[:, -1] += (counts * listed).sum(0)


@dataclass(frozen=True)
class KeptTokens:
    """Tokens kept per sparse row: of one KV head, or of many together.

    Quantiles are exact to a bin's width, 12 % at most.
    """

    rows: int
    mean: float
    p50: float
    p99: float


def summary(histogram: torch.Tensor) -> KeptTokens:
    """What a histogram says; leading dimensions are added up."""
    counts = histogram.reshape(-1, KEPT_BINS).sum(0).tolist()
    rows = sum(counts[:-1])
    if rows == 0:
        return KeptTokens(0, 0.0, 0.0, 0.0)
    return KeptTokens(
        rows, counts[-1] / rows, quantile(counts, 0.5), quantile(counts, 0.99)
    )


def quantile(counts: list[int], q: float) -> float:
    """The middle of the bin that holds the quantile.

    Args:
        counts: of one histogram.
    """
    wanted, seen = q * sum(counts[:-1]), 0
    for i, count in enumerate(counts[:-1]):
        seen += count
        if count and seen >= wanted:
            return round((_LOW[i] + _LOW[min(i + 1, KEPT_BINS - 1)]) / 2, 1)
    raise AssertionError("an empty histogram has no quantiles")

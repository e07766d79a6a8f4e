# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Histograms of kept tokens: what they say is what was counted."""

import pytest
import torch

from vllm_sparse.ops.kept import KEPT_BINS, KeptTokens, add_counts, kept_bin, summary


def histogram(counts: list[list[int]]) -> torch.Tensor:
    result = torch.zeros(len(counts[0]), KEPT_BINS, dtype=torch.int64)
    add_counts(torch.tensor(counts, dtype=torch.int32), result)
    return result


def test_bins_are_ascending_and_an_eighth_of_an_octave_wide():
    counts = torch.arange(1, 200_000, dtype=torch.int32)
    bins = kept_bin(counts)
    assert bins[0] == 0 and (bins.diff() >= 0).all() and bins[-1] < KEPT_BINS - 1
    for found in bins.unique().tolist():
        inside = counts[bins == found]
        assert inside[-1] < 1.126 * inside[0]


def test_rows_that_keep_everything_are_not_counted():
    assert summary(histogram([[-1, 5], [-1, 7]])) == KeptTokens(2, 6.0, 5.2, 7.2)
    assert summary(torch.zeros(3, KEPT_BINS)) == KeptTokens(0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("scale", [30, 1000, 60_000])
def test_quantiles_are_a_bin_off_at_most(scale):
    torch.manual_seed(0)
    counts = (torch.rand(4000, 2) * scale).int() + 1
    found = summary(histogram(counts.tolist()))
    flat = counts.flatten().float()
    assert found.rows == 8000
    assert found.mean == pytest.approx(flat.mean().item())
    for q, got in ((0.5, found.p50), (0.99, found.p99)):
        assert got == pytest.approx(flat.quantile(q).item(), rel=0.13)


def test_heads_add_up():
    both = histogram([[100, 3000], [120, 2000]])
    assert summary(both).mean == (100 + 3000 + 120 + 2000) / 4
    assert summary(both[0]).mean == 110

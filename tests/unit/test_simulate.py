# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The rules of the simulation, on random cases."""

from functools import partial

import pytest
import torch

from benchmarks.accuracy import simulate
from benchmarks.accuracy.simulate import Case, channels, estimate


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 16, generator=generator) for n in (3, 300, 300))
    return Case(query, key, value, codes=key, sealed=256)


def test_all_exact_channels_give_attention(case):
    want = (case.query @ case.key.T / 4).softmax(-1)
    torch.testing.assert_close(estimate(case, 16), want)


def test_channels_come_in_pairs(case):
    rope = channels(case.query, 6, "rope").view(-1, 2)
    assert (rope[:, 1] - rope[:, 0] == 8).all()
    following = channels(case.query, 6, "next").view(-1, 2)
    assert (following[:, 0] % 2 == 0).all() and (following.diff() == 1).all()
    assert len(channels(case.query, 5, "single")) == 5


WORST_HEAD = partial(simulate.top_p, worst_head=True)


@pytest.mark.parametrize("rule", [simulate.top_p, WORST_HEAD, simulate.top_p_union])
def test_top_p_reaches_p_for_every_head_and_not_by_much(case, rule):
    chosen = rule(16, 0.9)(case)
    kept = torch.cat([chosen, torch.arange(256, 300)])
    assert len(kept.unique()) == len(kept)
    mass = estimate(case, 16)[:, kept].sum(-1)
    assert (mass >= 0.9 - 1e-6).all()
    without = estimate(case, 16)[:, torch.cat([chosen[:-1], kept[-44:]])].sum(-1)
    if rule is WORST_HEAD:
        assert (without < 0.9).any()
    if rule is simulate.top_p:
        assert (1 - mass).sum() <= 0.1 + 1e-6
        assert (1 - without).sum() > 0.1


def test_blocks_that_are_left_out_lose_their_tokens(case):
    whole = simulate.top_k_of_blocks(16, 64, 1.0)(case)
    assert set(whole.tolist()) == set(simulate.top_k(16, 64)(case).tolist())
    half = simulate.top_k_of_blocks(16, 64, 0.5)(case)
    assert set((half // 128).tolist()) <= {0, 1} and len(half) == 64


def test_keeping_everything_makes_no_error(case):
    line = simulate.measure(lambda c: torch.arange(c.sealed), [case])
    assert line == "256 | 256 | 256 | 1.000 | 0.0000"

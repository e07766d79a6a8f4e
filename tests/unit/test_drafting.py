# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How many tokens are drafted, by what steps take and by what is accepted."""

from random import Random

import pytest

from vllm_sparse.config import SparseConfig
from vllm_sparse.methods.drafting import (
    HOLDS,
    TIMED,
    Acceptance,
    DraftRule,
    drafts_from,
    numbers_of_drafts,
    tokens_per_verification,
)

NUMBERS = [0, 2, 4]


def serve(rule: DraftRule, seconds, steps=40, requests=8, context=80_000) -> list[int]:
    """Numbers that an engine drafts whose steps take ``seconds(number)``."""
    chosen = []
    for _ in range(steps):
        number = rule.number(requests, context)
        rule.add_time(number, requests, context, seconds(number))
        chosen.append(number)
    return chosen


@pytest.mark.parametrize(
    ("draft_share", "acceptance", "best"),
    [
        (0.2, 0.95, 4),  # 4.5 tokens for 1.8 steps
        (0.3, 0.6, 2),
        (0.9, 0.95, 2),
        (1.0, 0.95, 0),
        (0.5, 0.4, 0),
    ],
)
def test_the_number_with_the_most_tokens_a_second(draft_share, acceptance, best):
    rates = {
        k: tokens_per_verification(k, acceptance) / (1 + draft_share * k)
        for k in NUMBERS
    }
    assert best == max(rates, key=rates.get)
    rule = DraftRule(NUMBERS)
    rule.acceptance.accepted = 1000 * acceptance
    rule.acceptance.rejected = 1000 * (1 - acceptance)
    chosen = serve(rule, lambda number: 1 + draft_share * number)
    assert set(chosen[: len(NUMBERS) * TIMED]) == set(NUMBERS)
    assert set(chosen[len(NUMBERS) * TIMED :]) == {best}


def test_a_step_that_something_disturbed_does_not_count():
    rule, noise = DraftRule(NUMBERS), Random(0)
    chosen = serve(rule, lambda k: (1 + 0.2 * k) * noise.choice([1, 1, 3]), steps=200)
    assert chosen[-1] == 4


def test_times_are_taken_anew():
    rule = DraftRule(NUMBERS)
    serve(rule, lambda number: 1 + 0.9 * number, HOLDS)
    assert serve(rule, lambda number: 1 + 0.01 * number)[-1] == 4


def test_loads_are_told_apart():
    rule = DraftRule(NUMBERS)
    assert serve(rule, lambda k: 1 + 0.9 * k, requests=1, context=32_000)[-1] == 0
    assert serve(rule, lambda k: 1 + 0.1 * k, requests=24, context=720_000)[-1] == 4
    assert rule.number(1, 32_000) == 0
    assert rule.number(1, 33_000) == 0
    assert rule.number(24, 700_000) == 4
    assert rule.number(0, 0) == 0


def test_acceptance_follows_what_is_accepted_of_late():
    noise, acceptance = Random(0), Acceptance()
    for rate in (0.95, 0.6):
        for _ in range(2000):
            accepted = 0
            while accepted < 4 and noise.random() < rate:
                accepted += 1
            acceptance.add(4, accepted)
        assert acceptance.rate == pytest.approx(rate, abs=0.04)


def test_tokens_per_verification_is_the_expectation():
    noise, total = Random(0), 0
    for _ in range(20_000):
        accepted = 0
        while accepted < 3 and noise.random() < 0.8:
            accepted += 1
        total += 1 + accepted
    assert tokens_per_verification(3, 0.8) == pytest.approx(total / 20_000, rel=0.01)
    assert tokens_per_verification(4, 1.0) == 5
    assert tokens_per_verification(0, 0.5) == 1


def test_options():
    config = SparseConfig(lossless=True)
    assert numbers_of_drafts(config) == [0, 2, 4]
    assert numbers_of_drafts(SparseConfig(lossless=True, draft_tokens=1)) == [0, 1]
    fixed = SparseConfig(lossless=True, draft_tokens=3, draft_adapt=False)
    assert numbers_of_drafts(fixed) == [3]
    assert drafts_from(config, "cuda") == 8192
    assert drafts_from(SparseConfig(lossless=True, draft_above=7), "cuda") == 7

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which steps of a lossless engine are timed."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm_sparse.methods.drafting import DraftRule  # noqa: E402
from vllm_sparse.plugin.speculation.scheduler import _Drafting  # noqa: E402


class Scheduler(_Drafting):
    """What the timing of steps needs."""

    def __init__(self, *lengths: int) -> None:
        self.rule, self.adapts, self.last = DraftRule([0, 2, 4]), True, None
        self.running = [SimpleNamespace(num_tokens=n) for n in lengths]

    def ends(self, number: int, scheduled: dict[str, int]) -> None:
        """A step that drafted after verifying ``number`` tokens of each request."""
        step = SimpleNamespace(
            num_spec_tokens_to_schedule=number,
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            scheduled_spec_decode_tokens={r: [-1] * number for r in scheduled},
        )
        self._time(step, self._load())

    def timed(self) -> list[int]:
        """Times of every number of drafts, over all loads."""
        loads = self.rule.loads.values()
        return [sum(len(load.seconds[n]) for load in loads) for n in (0, 2, 4)]


def test_steps_that_drafted_alike_and_only_decoded():
    scheduler = Scheduler(9000, 9000)
    for _ in range(3):
        scheduler.ends(4, {"a": 5, "b": 5})
    assert scheduler.timed() == [0, 0, 2]
    scheduler.ends(2, {"a": 3, "b": 3})  # the one before drafted more
    scheduler.ends(2, {"a": 3, "b": 700})  # a prompt
    scheduler.ends(2, {"a": 3, "b": 3})
    assert scheduler.timed() == [0, 0, 2]
    scheduler.ends(2, {"a": 3, "b": 3})
    assert scheduler.timed() == [0, 1, 2]


def test_a_step_whose_requests_have_all_ended_is_not_timed():
    """As where a step was under way when the last answer ended."""
    scheduler = Scheduler(9000)
    scheduler.ends(4, {"a": 5})
    scheduler.running = []
    scheduler.ends(4, {"a": 5})
    assert scheduler.timed() == [0, 0, 0]

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Switching what the live figures do, in an engine of this process."""

from collections.abc import Callable

from benchmarks.serving.engine import Timed


def switches(engine: Timed) -> dict[str, Callable[[], None]]:
    """By name of what is measured: what switches the engine to it.

    What kernels count by themselves (tokens kept) is part of all.
    """
    from vllm_sparse.stats.counters import StepCounter

    core = engine.llm.llm_engine.engine_core.engine_core
    reporter = core.scheduler.make_stats.__self__
    # An engine that falls idle asks at once, after what is timed.
    add, interval = StepCounter.add, reporter._interval

    def switch(counting: bool, seconds: float) -> Callable[[], None]:
        def apply() -> None:
            StepCounter.add = add if counting else lambda *args: None
            reporter._interval = seconds
            reporter._working = counting

        return apply

    return {
        "off": switch(False, interval),
        "on": switch(True, interval),
        "every second step": switch(True, 0.0),
    }

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""In the engine core: asks the workers now and then, and tells the front end and log.

While requests run, the workers are asked without waiting for the answer, and a GPU is
not waited for either. When the engine runs out of requests they are asked once more and
waited for, so that what is reported then is complete.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..plugin.channel import put
from ..plugin.versions import init_logger
from .figures import Figures, add_up
from .reader import report

logger = init_logger(__name__)

REPORT_SECONDS = 2.0
LOG_SECONDS = 30.0
# Multiprocess executors' futures are done only when a later step's answer was read.
ANSWER_SECONDS = 1.0


class Reporter:
    """Stands in for the scheduler's ``make_stats``; errors switch it off, no more."""

    def __init__(
        self,
        make_stats: Callable,
        collective_rpc: Callable,
        is_idle: Callable[[], bool],
        is_asleep: Callable[[], bool],
        log_stats: bool,
        engine_index: int,
        drafting=None,
        held=None,
    ) -> None:
        """
        Args:
            make_stats: the scheduler's own; it returns None if statistics are off.
            collective_rpc: the executor's.
            is_idle: whether no request is left and no step under way.
            is_asleep: whether the workers' counters are not in memory: reading them
                there would end the CUDA context.
            log_stats: whether the front end gets statistics; if not, there is the log
                line alone.
            drafting: the scheduler of a lossless engine, which counts its drafts
                (``drafted``, ``drafts_now``); resets of the workers leave it alone.
            held: of an engine whose requests give blocks back, what they hold
                (:class:`vllm_sparse.plugin.held.HeldBlocks`); likewise.
        """
        self._make_stats = make_stats
        self._collective_rpc = collective_rpc
        self._is_idle = is_idle
        self._is_asleep = is_asleep
        self._log_stats = log_stats
        self._engine_index = engine_index
        self._interval = REPORT_SECONDS if log_stats else LOG_SECONDS
        self._drafting, self._held = drafting, held
        self._scheduled: Counter[str] = Counter()  # up to the last answer
        self._working = True
        self._answer = None  # a future, while the workers are asked
        self._asked = self._logged = float("-inf")
        self._resets: int | None = None
        # Up to the start; up to the last answer.
        self._before: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        # New since the front end was told, and since the last line in the log.
        self._to_send: Counter[str] = Counter()
        self._to_log: Counter[str] = Counter()

    def start(self) -> None:
        """What was counted up to now (vLLM's warm-up) is left out of all reports."""
        self._before = self._seen = self._counts(
            self._collective_rpc(report, args=(True,))
        )
        self._asked = time.monotonic()

    def figures(self) -> dict[str, int]:
        """Counts since the start or the last reset; waits for the workers.

        Raises:
            RuntimeError: the engine sleeps.
        """
        if self._is_asleep():
            raise RuntimeError("the engine sleeps: wake it up first")
        self._answer = None  # it would be older than this one
        counts = self._counts(self._collective_rpc(report, args=(True,)))
        return {**(counts - self._before), **self._of_scheduler(), **self._now()}

    def _of_scheduler(self) -> Counter[str]:
        """Counts of this process."""
        drafted = Counter(self._drafting.drafted if self._drafting else {})
        return drafted + Counter(self._held.counts() if self._held else {})

    def _now(self) -> dict[str, int]:
        """What is not a count."""
        now = (
            {} if self._drafting is None else {"drafts_now": self._drafting.drafts_now}
        )
        return now | (self._held.now() if self._held else {})

    def make_stats(self, *args, **kwargs):
        """The scheduler's statistics, with what is new since the last ones."""
        stats = self._make_stats(*args, **kwargs)
        # Without arguments vLLM describes an error: workers may be gone.
        if self._working and args:
            try:
                self._look()
                if self._to_send and stats is not None:
                    put(stats, {**self._to_send, **self._now()})
                    self._to_send.clear()
            except Exception:
                self._working = False
                logger.exception(
                    "Live figures of sparse attention end here (serving goes on)."
                )
        return stats

    def _look(self) -> None:
        if self._is_asleep():  # steps without tokens happen, as when a client leaves
            self._answer = None
            return
        now = time.monotonic()
        if self._log_stats and self._is_idle():
            self._answer = None
            self._asked = now
            self._add(self._collective_rpc(report, args=(True,)), now)
        elif self._answer is not None:
            if self._answer.done() or now - self._asked > ANSWER_SECONDS:
                replies, self._answer = self._answer.result(), None
                self._add(replies, now)
        elif now - self._asked > self._interval:
            self._asked = now
            self._answer = self._collective_rpc(report, args=(False,), non_block=True)

    def _add(self, replies: list[dict[str, Any]], now: float) -> None:
        counts = self._counts(replies)
        new, self._seen = counts - self._seen, counts
        scheduled = self._of_scheduler()
        new, self._scheduled = new + (scheduled - self._scheduled), scheduled
        self._to_send += new
        self._to_log += new
        if now - self._logged < LOG_SECONDS:
            return
        figures = Figures.of_counts({**self._to_log, **self._now()})
        if figures.decode_rows:
            logger.info(
                "Engine %03d: sparse attention: %s", self._engine_index, figures
            )
            self._to_log.clear()
            self._logged = now

    def _counts(self, replies: list[dict[str, Any]]) -> Counter[str]:
        for reply in replies:
            if "error" in reply:
                raise RuntimeError(reply["error"])
        if replies[0]["resets"] != self._resets:
            self._resets = replies[0]["resets"]
            self._before, self._seen = Counter(), Counter()
        return add_up(replies)

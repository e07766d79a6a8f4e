# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How many tokens a lossless engine drafts before it verifies (docs/lossless.md)."""

from collections import deque
from math import log
from statistics import median

from ..config import SparseConfig

# "auto" of draft_above, by device type: shorter contexts were not faster.
DRAFT_ABOVE = {"cpu": 2048, "cuda": 8192}
# Steps that are timed for each number of drafts, and for how many steps the times hold.
TIMED, HOLDS = 5, 1000


def drafts_from(config: SparseConfig, device_type: str) -> int:
    """Tokens of the shortest context that drafts."""
    if config.draft_above == "auto":
        return DRAFT_ABOVE[device_type]
    return config.draft_above


def numbers_of_drafts(config: SparseConfig) -> list[int]:
    """What an engine chooses among: each has CUDA graphs of its own."""
    most = config.draft_tokens
    return sorted({0, (most + 1) // 2, most}) if config.draft_adapt else [most]


def tokens_per_verification(number: int, acceptance: float) -> float:
    """Expected tokens of one verification (Leviathan et al., arXiv 2211.17192, eq. 1).

    Args:
        number: drafted tokens.
        acceptance: of a drafted token, where all before it were accepted.
    """
    return sum(acceptance**i for i in range(number + 1))


class Acceptance:
    """How likely a drafted token is accepted where all before it were, of late."""

    def __init__(self) -> None:
        # As if ten had been drafted, so that the first tokens do not decide alone.
        self.accepted, self.rejected = 9.0, 1.0

    @property
    def rate(self) -> float:
        return self.accepted / (self.accepted + self.rejected)

    def add(self, drafted: int, accepted: int) -> None:
        """Count one verification of one request."""
        self.accepted += accepted
        self.rejected += accepted < drafted
        if self.accepted + self.rejected > 1000:
            self.accepted, self.rejected = self.accepted / 2, self.rejected / 2


class Load:
    """Steps of about one batch and context: what they took, by number of drafts."""

    def __init__(self, numbers: list[int]) -> None:
        self.seconds = {number: deque(maxlen=3 * TIMED) for number in numbers}
        self.steps = 0

    def add(self, number: int, seconds: float) -> None:
        self.seconds[number].append(seconds)

    def untimed(self) -> int | None:
        """A number whose steps are to be timed; None when all were."""
        return next((n for n, s in self.seconds.items() if len(s) < TIMED), None)

    def best(self, acceptance: float) -> int:
        """The number with the most tokens a second."""

        def rate(number: int) -> float:
            # Not the fastest: results of two steps may come together.
            seconds = median(self.seconds[number])
            return tokens_per_verification(number, acceptance) / seconds

        return max(self.seconds, key=rate)


class DraftRule:
    """Chooses a step's number of drafts: the one with the most tokens a second, by what
    steps took under the same load and by the acceptance of late.

    Loads are told apart by requests and context, in steps of a quarter. A load that is
    new is timed, with and without drafts; times are taken anew after ``HOLDS`` steps.
    """

    def __init__(self, numbers: list[int]) -> None:
        self.numbers, self.acceptance = numbers, Acceptance()
        self.loads: dict[tuple[int, int], Load] = {}

    def number(self, requests: int, context: int) -> int:
        """Tokens that each request drafts in a step.

        Args:
            requests: those that may draft.
            context: their tokens.
        """
        if not requests:
            return min(self.numbers)
        load = self._load(requests, context)
        load.steps += 1
        if load.steps > HOLDS:
            load = self.loads[self._key(requests, context)] = Load(self.numbers)
        untimed = load.untimed()
        return load.best(self.acceptance.rate) if untimed is None else untimed

    def add_time(
        self, number: int, requests: int, context: int, seconds: float
    ) -> None:
        """Record a step that drafted ``number`` tokens after verifying as many."""
        self._load(requests, context).add(number, seconds)

    @staticmethod
    def _key(requests: int, context: int) -> tuple[int, int]:
        return round(log(requests, 1.25)), round(log(max(context, 1), 1.25))

    def _load(self, requests: int, context: int) -> Load:
        key = self._key(requests, context)
        return self.loads.setdefault(key, Load(self.numbers))

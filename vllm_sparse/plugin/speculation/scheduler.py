# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""vLLM's schedulers, with the number of drafts chosen by what they bring.

Upstream: ``Scheduler.dynamic_sd_lookup``, which ``schedule`` asks for the number by
batch size; ``make_spec_decoding_stats``, called once per verified request;
``update_from_output``, called once per step.
"""

from collections import Counter
from itertools import takewhile
from time import perf_counter

from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds

from ...methods.drafting import DraftRule, drafts_from, numbers_of_drafts
from ..versions import init_logger
from .configure import options

logger = init_logger(__name__)


class _Drafting:
    """What both schedulers of a lossless engine have; goes before vLLM's."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        config = options(self.vllm_config)
        self.most, self.adapts = config.draft_tokens, config.draft_adapt
        self.above = drafts_from(config, current_platform.device_type)
        self.rule = DraftRule(numbers_of_drafts(config))
        # For the live figures: counts since the start, and the number of drafts now.
        self.drafted: Counter[str] = Counter()
        self.drafts_now = 0
        self.dynamic_sd_lookup = _Numbers(self)
        # Of the last step, where it only decoded: its number of drafts, and when it
        # ended.
        self.last: tuple[int, float] | None = None
        logger.info(
            "Lossless: requests of %d tokens and more draft %s with sparse attention, "
            "and dense attention verifies. Answers are those of dense attention.",
            self.above,
            f"up to {self.most} tokens, as many as pay,"
            if self.adapts
            else f"{self.most} tokens",
        )

    def number_of_drafts(self) -> int:
        """Tokens that each request drafts at the end of the step being scheduled."""
        number = self._number_of_drafts()
        if self.running:
            self.drafts_now = number
        return number

    def _number_of_drafts(self) -> int:
        seeded = any(_has_seed(request) for request in self.running)
        # With a seed the same tokens come again only where as many are drafted: on GPUs
        # all requests of a step draft alike, so company must not decide.
        if seeded and self.use_v2_model_runner:
            return self.most
        if max((r.num_tokens for r in self.running), default=0) < self.above:
            return 0
        if seeded or not self.adapts:
            return self.most
        return self.rule.number(*self._load())

    def _load(self) -> tuple[int, int]:
        """Requests, and tokens of their contexts; none where all ended while a step was
        under way."""
        return len(self.running), sum(request.num_tokens for request in self.running)

    def make_spec_decoding_stats(
        self,
        stats,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ):
        self.rule.acceptance.add(num_draft_tokens, num_accepted_tokens)
        # As vLLM's metrics: without drafts that a grammar does not allow.
        invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
        self.drafted["verifications"] += 1
        self.drafted["drafted_tokens"] += num_draft_tokens - invalid
        self.drafted["accepted_tokens"] += num_accepted_tokens
        return super().make_spec_decoding_stats(
            stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )

    def update_from_output(self, scheduler_output, model_runner_output):
        load = self._load()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._time(scheduler_output, load)
        return outputs

    def _time(self, step, load: tuple[int, int]) -> None:
        """Record what a step took, if it and the one before drafted alike and had no
        prompts in them."""
        now, number = perf_counter(), step.num_spec_tokens_to_schedule
        scheduled = step.scheduled_spec_decode_tokens
        decoded = step.total_num_scheduled_tokens == len(
            step.num_scheduled_tokens
        ) + sum(map(len, scheduled.values()))
        last, self.last = self.last, None
        if not (decoded and step.num_scheduled_tokens):
            return
        self.last = number, now
        verified = max(map(len, scheduled.values()), default=0)
        alike = last is not None and last[0] == number == verified
        if alike and load[0] and self.adapts:
            self.rule.add_time(number, *load, now - last[1])

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Without the rows of requests that did not draft (v1.py); V2 keeps its drafts
        on the device and hands out placeholders."""
        if self.use_v2_model_runner:
            return super().update_draft_token_ids(draft_token_ids)
        tokens = [
            list(takewhile(lambda token: token >= 0, row))
            for row in draft_token_ids.draft_token_ids
        ]
        super().update_draft_token_ids(DraftTokenIds(draft_token_ids.req_ids, tokens))


class _Numbers:
    """Stands where vLLM has a table over batch sizes, which it reads once a step."""

    def __init__(self, scheduler: _Drafting) -> None:
        self.scheduler = scheduler

    def __getitem__(self, batch_size: int) -> int:
        return self.scheduler.number_of_drafts()


def _has_seed(request) -> bool:
    sampling = request.sampling_params
    return sampling is not None and sampling.seed is not None


class DraftScheduler(_Drafting, Scheduler):
    """Of a lossless engine."""


class AsyncDraftScheduler(_Drafting, AsyncScheduler):
    """The same with asynchronous scheduling."""

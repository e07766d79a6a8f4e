# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sampling parameters on rows of drafts in vLLM's first model runner, on CPUs.

Beside any speculation vLLM leaves the processors of ``min_p`` and ``logit_bias`` out,
and forbids stop tokens after all drafts while ``min_tokens`` are not reached before
them. Bonus tokens go through vLLM's sampler, which has a row per request; drafts
through vLLM's rejection sampler, here in the order in which that sampler works: bias,
penalties, ``min_p``.

Upstream: ``build_logitsprocs``; ``RejectionSampler.apply_logits_processors``;
``LogitBiasLogitsProcessor.biases``, ``MinPLogitsProcessor.min_p`` and ``.min_p_count``,
``MinTokensLogitsProcessor.min_toks``. Second processors, and :class:`MinTokens`, can go
when vLLM's rejection sampler applies its own.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from .v1_thinking import ThinkingBudgets

WARNING = "min_p and logit_bias parameters won't work with speculative decoding."
# Below it vLLM samples greedily.
LEAST_TEMPERATURE = 1e-5


def serve_all_parameters(runner) -> None:
    """Give a V1 runner, before its first request, what drafts need."""
    args = runner.vllm_config, runner.device, False
    processors = [MinTokens(*args), LogitBiasLogitsProcessor(*args)]
    processors.append(MinPLogitsProcessor(*args))
    batch = runner.input_batch
    batch.logitsprocs = LogitsProcessors(processors)
    if batch.thinking_budget_state_holder is not None:
        batch.thinking_budget_state_holder = ThinkingBudgets(
            runner.vllm_config.reasoning_config,
            runner.max_num_reqs,
            0,
            runner.device,
            False,
        )
    runner.rejection_sampler = DraftRowsSampler(
        runner.sampler, runner.vllm_config.speculative_config, runner.device
    )


@contextmanager
def without_the_warning() -> Iterator[None]:
    """That ``min_p`` and ``logit_bias`` would not work; they do."""
    logger = logging.getLogger("vllm.v1.sample.logits_processor")
    others = lambda record: record.msg != WARNING
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


class MinTokens(MinTokensLogitsProcessor):
    """vLLM's, which looks at the tokens after a request's drafts as at those before."""

    # [num_reqs]: of the step that is sampled.
    num_draft_tokens: Sequence[int] | None = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        drafts = self.num_draft_tokens
        if drafts is None:
            return super().apply(logits)
        free = [
            req
            for req, (min_tokens, output, *_) in self.min_toks.items()
            if len(output) + drafts[req] >= min_tokens
        ]
        kept = logits[free]
        logits = super().apply(logits)
        logits[free] = kept
        return logits


class DraftRowsSampler(RejectionSampler):
    """vLLM's, with all parameters on drafts' rows."""

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ):
        counting = [
            processor
            for processor in sampling_metadata.logitsprocs.non_argmax_invariant
            if isinstance(processor, MinTokens)
        ]
        try:
            for processor in counting:
                processor.num_draft_tokens = metadata.num_draft_tokens
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        finally:
            for processor in counting:
                processor.num_draft_tokens = None

    def apply_logits_processors(
        self,
        logits: torch.Tensor,  # [num_tokens, vocab_size] fp32
        sampling_metadata: SamplingMetadata,
        metadata: SpecDecodeMetadata,
    ) -> torch.Tensor:
        processors, counts = sampling_metadata.logitsprocs, metadata.num_draft_tokens
        for processor in processors.non_argmax_invariant:
            if isinstance(processor, LogitBiasLogitsProcessor):
                add_bias(logits, processor.biases, counts)
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        for processor in processors.argmax_invariant:
            if isinstance(processor, MinPLogitsProcessor) and processor.min_p_count:
                mask_below_min_p(
                    logits, processor.min_p[:, 0], sampling_metadata.temperature, counts
                )
        return logits


def add_bias(
    logits: torch.Tensor,  # [num_tokens, vocab_size] fp32, changed
    biases: dict[int, dict[int, float]],  # request -> token -> bias
    num_draft_tokens: Sequence[int],  # [num_reqs]
) -> None:
    """Each request's bias on the rows of its drafts."""
    of_requests = logits.split(list(num_draft_tokens))
    for req, bias in biases.items():
        of_requests[req][:, list(bias)] += torch.tensor(list(bias.values()))


def mask_below_min_p(
    logits: torch.Tensor,  # [num_tokens, vocab_size] fp32, changed
    min_p: torch.Tensor,  # [num_reqs] fp32
    temperature: torch.Tensor | None,  # [num_reqs] fp32; None: all are greedy
    num_draft_tokens: Sequence[int],  # [num_reqs]
) -> None:
    """Leave out tokens that are less than ``min_p`` times as likely as the likeliest,
    after temperature, which the sampler applies later."""
    if temperature is None:
        return
    temperature = temperature.masked_fill(temperature < LEAST_TEMPERATURE, 1)
    counts = torch.tensor(num_draft_tokens)
    temperature, min_p = (
        values.repeat_interleave(counts)[:, None] for values in (temperature, min_p)
    )
    probs = (logits / temperature).softmax(-1)
    logits.masked_fill_(probs < min_p * probs.amax(-1, keepdim=True), float("-inf"))

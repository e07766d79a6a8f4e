# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sampling on the CPU where vLLM 0.32 and 0.33 sample wrongly or fail.

- ``_expand_kernel_impl`` gives every draft token its request's temperature, top_k and
  top_p. It casts to int64 (0.7 becomes 0) and writes to the copy: the sampler reads
  memory that nobody wrote. vLLM's issue 55005.
- ``_rejection_random_sample_kernel_impl`` looks up the probability of draft -1, which
  the scheduler writes where it pads a request without drafts (one that has one token
  left to compute, as after a hit in the prefix cache): it reads before the row, and
  may accept the -1.
- ``apply_top_k_only`` fails on no rows, which is every step without drafts.
- ``CPUModelRunner.sample_tokens`` draws from a request's generator for each chunk of
  its prompt and winds it back by ``set_offset``, which generators of CPUs refuse: a
  seeded request whose prompt comes in chunks ends the engine, drafts or not.

The kernels are replaced in the module from which ``CpuPlatform.
register_triton_kernel_overrides`` takes them at each start of a worker, so that it
registers ours; ``register_kernels`` itself would walk all modules once more, which
fails beside llvmlite. vLLM's kernels for the inputs of draft models, for greedy
requests and for recovered tokens are as they should be.

Upstream: the four names above. Each can go when vLLM's passes the tests whose names end
in ``_fails`` (tests/unit/test_cpu_sampler.py).
"""

from collections.abc import Callable

import torch

# What was replaced, by name.
vllms: dict[str, Callable] = {}


def install() -> None:
    """Let CPU workers of this process sample as GPUs do. Idempotent."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    for owner, ours in (
        (cpu_triton_utils, _expand_kernel_impl),
        (cpu_triton_utils, _rejection_random_sample_kernel_impl),
        (topk_topp_sampler, apply_top_k_only),
        (CPUModelRunner, sample_tokens),
    ):
        name = ours.__name__
        if getattr(owner, name) is not ours:
            vllms[name] = getattr(owner, name)
            setattr(owner, name, ours)


def check(speculative_config) -> None:
    """Refuse ways to verify drafts that vLLM's CPU sampler does not have.

    Raises:
        ValueError: vLLM would verify as ``standard`` does, or end the engine at the
            first step.
    """
    method = getattr(speculative_config, "rejection_sample_method", "standard")
    if method != "standard":
        raise ValueError(
            f"rejection_sample_method {method!r} is not served on CPUs, remove it from "
            "--speculative-config"
        )


def _expand_kernel_impl(
    output: torch.Tensor,  # [num_tokens]
    input_val: torch.Tensor,  # [num_reqs], of output's dtype
    cu_num_tokens: torch.Tensor,  # [num_reqs] int32, the first request's end first
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = input_val.masked_fill(input_val == replace_from, replace_to)
    output.copy_(values.repeat_interleave(counts, output_size=output.shape[0]))


def _rejection_random_sample_kernel_impl(
    output_token_ids: torch.Tensor,  # [num_reqs, max_spec_len + 1] int32
    cu_num_draft_tokens: torch.Tensor,  # [num_reqs] int32
    draft_token_ids: torch.Tensor,  # [num_tokens] int32
    draft_probs: torch.Tensor | None,  # [num_tokens, vocab_size] fp32
    target_probs: torch.Tensor,  # [num_tokens, vocab_size] fp32
    bonus_token_ids: torch.Tensor,  # [num_reqs, 1] int32
    recovered_token_ids: torch.Tensor,  # [num_tokens] int32
    uniform_probs: torch.Tensor,  # [num_tokens] fp64
    *others,
) -> None:
    """vLLM's, which accepts a draft where its ratio is at least ``uniform_probs``: NaN
    refuses what is no token."""
    padding = draft_token_ids < 0
    vllms["_rejection_random_sample_kernel_impl"](
        output_token_ids,
        cu_num_draft_tokens,
        draft_token_ids.clamp(min=0),
        draft_probs,
        target_probs,
        bonus_token_ids,
        recovered_token_ids,
        uniform_probs.masked_fill(padding, float("nan")),
        *others,
    )


def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return vllms["apply_top_k_only"](logits, k) if logits.shape[0] else logits


def sample_tokens(runner, grammar_output):
    """vLLM's, while requests in their prompts, whose tokens are thrown away, have no
    generator."""
    batch = runner.input_batch
    in_prompts = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    generators = {
        i: batch.generators.pop(i) for i in in_prompts if i in batch.generators
    }
    try:
        return vllms["sample_tokens"](runner, grammar_output)
    finally:
        batch.generators.update(generators)

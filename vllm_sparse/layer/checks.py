# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What a layer refuses when it is made."""

from collections.abc import Mapping
from typing import Any

from vllm.platforms import current_platform

from ..config import SparseConfig, SparseConfigError


def refuse_unsupported(backend: str, arguments: Mapping[str, Any]) -> None:
    """Raise for arguments of a layer that have a value and no meaning for us."""
    given = sorted(name for name, value in arguments.items() if value is not None)
    if given:
        raise NotImplementedError(
            f"--attention-backend {backend} does not support {given} of this model's "
            "attention; leave --attention-backend out"
        )


# What FlashAttention 3 takes.
MOST_HEADS_WITH_SINKS = 64


def check_sinks(impl) -> None:
    """Raise where a layer's attention sinks cannot be served."""
    if impl.sinks is None or impl.shape.flash_attention is None:
        return
    if impl.num_heads > MOST_HEADS_WITH_SINKS:
        raise NotImplementedError(
            f"--attention-backend {impl.backend} serves attention sinks of at most "
            f"{MOST_HEADS_WITH_SINKS} query heads a rank, not {impl.num_heads}: raise "
            "--tensor-parallel-size, or leave --attention-backend out"
        )


def check_format(impl, config: SparseConfig, vllm_config) -> None:
    """Raise where a layer's quantised cache could not be right."""
    layout = impl.shape.layout
    chosen = f"sparse.kv_format = {impl.fmt.name!r}"
    if impl.ops.kernels == "triton":
        raise SparseConfigError(
            f"{chosen} has no Triton kernels, and the CUDA library does not serve this "
            "GPU: leave it out"
        )
    if not impl.owns_cache:
        raise NotImplementedError(
            f"{chosen} does not serve models whose layers share a cache: leave it out"
        )
    speculation = getattr(vllm_config.speculative_config, "method", "ngram")
    if speculation not in ("ngram", "suffix") and not config.lossless:
        _check_drafter(chosen, vllm_config.speculative_config)
    drafts = vllm_config.num_speculative_tokens
    # A draft model's first step brings one token more than is verified.
    further = speculation not in ("ngram", "suffix") and not config.lossless
    most = layout.rows_per_block - 1 - further
    if drafts > most:
        raise SparseConfigError(
            f"{chosen} verifies at most {most} draft tokens a "
            f"step, num_speculative_tokens is {drafts}: lower it"
        )


def _check_drafter(chosen: str, speculation) -> None:
    """Raise where drafts of a model were not proven right over quantised blocks."""
    method = speculation.method
    if not current_platform.is_cpu():
        raise SparseConfigError(
            f"{chosen} works with the speculative method ngram only on GPUs, not with "
            f"{method!r}: choose ngram, or leave kv_format out"
        )
    if speculation.parallel_drafting:
        raise SparseConfigError(
            f"{chosen} does not serve parallel_drafting: remove it from "
            "--speculative-config, or leave kv_format out"
        )
    if method not in ("draft_model", "eagle", "eagle3", "mtp"):
        raise SparseConfigError(
            f"{chosen} does not serve the speculative method {method!r}: choose ngram, "
            "draft_model, eagle, eagle3 or mtp, or leave kv_format out"
        )


def check_eviction(impl, vllm_config) -> None:
    """Raise where blocks that are given back would be missed."""
    if impl.eviction is not None and impl.ops.kernels == "triton":
        raise SparseConfigError(
            f"--attention-backend {impl.backend} has no Triton kernels, and the CUDA "
            "library does not serve this GPU: choose --attention-backend sparq"
        )
    if impl.shape.fmt.state_bytes and not impl.owns_cache:
        raise NotImplementedError(
            f"--attention-backend {impl.backend} does not serve models whose layers "
            "share a cache: each has learnt a state of its own. Choose "
            "--attention-backend streaming"
        )
    if impl.eviction is None or vllm_config.speculative_config is None:
        return
    method = vllm_config.speculative_config.method
    if method not in ("ngram", "suffix"):
        raise SparseConfigError(
            f"--attention-backend {impl.backend} gives blocks back, which drafts by "
            f"{method!r} may still need: choose ngram, or remove --speculative-config"
        )

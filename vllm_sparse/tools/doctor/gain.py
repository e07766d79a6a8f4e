# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Bytes that a decode step reads, dense and sparse, and how many tokens memory holds.

Decoding is bound by memory, so the ratio of the bytes is the most that sparsity can
gain; what was measured beside it is in docs/performance.md.
"""

from dataclasses import dataclass, replace

import torch

from ...cache.eviction import LAG_BLOCKS
from ...cache.layout import BLOCK_SIZE, BlockLayout
from ...cache.lines import LINE_GROUP, NEAR_BLOCKS, attended
from ...config import SparseConfig
from ...methods import METHODS
from ...methods.budgets import budget
from ...methods.drafting import drafts_from, tokens_per_verification
from .model import Layers, Model


@dataclass(frozen=True)
class Gain:
    """One context length and batch, on one rank.

    Attributes:
        tokens_kept: of a KV head in sparse layers; adaptive budgets: the fewest.
        tokens_kept_most: adaptive budgets: the most, else the same.
        kv_bytes_dense: a step's KV reads of vLLM's own backends.
        kv_bytes_sparse, kv_bytes_sparse_most: of ours, for the two counts.
        weight_bytes: read in every step; None where unknown.
        attention_gain: the ratio of KV bytes; adaptive budgets: the best case.
        step_gain: the same of a whole step, KV and weights; None where unknown.
    """

    context: int
    batch: int
    tokens_kept: int
    tokens_kept_most: int
    kv_bytes_dense: int
    kv_bytes_sparse: int
    kv_bytes_sparse_most: int
    weight_bytes: int | None
    attention_gain: float
    step_gain: float | None


# Drafted tokens that are accepted where all before them were: measured at the usual
# budgets and plain texts.
ACCEPTANCE = 0.95
# Bytes leave out what a draft step costs beside them: it took a quarter longer on GPUs.
PAYS_FROM = 1.2


@dataclass(frozen=True)
class LosslessGain:
    """Of drafts with sparse attention that dense attention verifies: one context length
    and batch, on one rank.

    Attributes:
        drafts: tokens that a request drafts before a verification.
        tokens: that a verification gives in the mean, at :data:`ACCEPTANCE`.
        draft_bytes: KV and weights that one draft step reads.
        verify_bytes: the same of a verification.
        gain: bytes per token of dense decoding over those of drafts and verification;
            None where the weights' are unknown.
        verdict: whether that pays, and why not.
    """

    context: int
    batch: int
    drafts: int
    tokens: float
    draft_bytes: int | None
    verify_bytes: int | None
    gain: float | None
    verdict: str


@dataclass(frozen=True)
class Memory:
    """KV bytes per token on one rank, all layers that share our blocks.

    Attributes:
        held_bytes: of a request beside its tokens (quantised formats; lines).
        most_bytes: that a request holds while it decodes, however long it is; None:
            it holds all of its context.
    """

    bytes_per_token: int
    bytes_per_token_dense: int
    held_bytes: int
    most_bytes: int | None


def _layout(layers: Layers, model: Model, config: SparseConfig) -> BlockLayout:
    fmt = config.format(layers.head_size, layers.num_heads // layers.num_kv_heads)
    return BlockLayout(layers.head_size, model.dtype.itemsize, fmt)


def memory(model: Model, config: SparseConfig) -> Memory:
    ours = dense = held = 0
    for layers in model.served:
        layout = _layout(layers, model, config)
        heads = layers.num_kv_heads * layers.count
        ours += heads * layout.content_bytes
        dense += heads * layout.row_bytes
        held += heads * BLOCK_SIZE * layout.content_bytes * layout.lookahead_blocks
    if config.selector == "anchor":
        # The own block, those near it, and one that is about to be given back.
        held = (NEAR_BLOCKS + 2) * BLOCK_SIZE * ours
        return Memory(ours // LINE_GROUP, dense, held, None)
    kept, most = METHODS[config.selector].eviction(config), None
    if kept is not None:
        most = (kept.kept_blocks + LAG_BLOCKS) * BLOCK_SIZE * ours
    return Memory(ours, dense, held, most)


def expected_gain(
    model: Model, config: SparseConfig, device_type: str, context: int, batch: int
) -> Gain:
    """By the byte model.

    Args:
        config: not resolved.
        context: tokens of every request.
        batch: requests of a decode step.
    """
    fewest, most = context, context
    dense = sparse = sparse_most = 0
    for layers in model.served:
        options = config.resolve(
            layers.head_size, layers.num_heads // layers.num_kv_heads, device_type
        )
        layout = _layout(layers, model, options)
        items = batch * layers.num_kv_heads * layers.count
        length = min(context, layers.chunk or context)
        dense += items * length * layout.row_bytes
        kept = kept_most = length
        if layers.dense is None:
            kept = fewest = _fewest(options, layout, length)
            kept_most = most = _most(options, layout, length)
        sparse += items * _row_bytes(options, layout, length, kept)
        sparse_most += items * _row_bytes(options, layout, length, kept_most)
    weights = model.weight_bytes
    step = None
    if weights is not None:
        weights //= model.tensor_parallel_size
        step = (weights + dense) / (weights + sparse)
    return Gain(
        context=context,
        batch=batch,
        tokens_kept=fewest,
        tokens_kept_most=most,
        kv_bytes_dense=dense,
        kv_bytes_sparse=sparse,
        kv_bytes_sparse_most=sparse_most,
        weight_bytes=weights,
        attention_gain=dense / max(1, sparse),
        step_gain=step,
    )


def lossless_gain(
    model: Model, config: SparseConfig, device_type: str, context: int, batch: int
) -> LosslessGain:
    """By the byte model; arguments as of :func:`expected_gain`."""
    dense_step = expected_gain(model, config, device_type, context, batch)
    whole = replace(config, top_p=None, top_k=1.0)
    verified = expected_gain(model, whole, device_type, context, batch)
    drafts = config.draft_tokens
    tokens = tokens_per_verification(drafts, ACCEPTANCE)
    weights = dense_step.weight_bytes
    draft = verify = gain = None
    if weights is not None:
        # Of models without experts and quantised layers, which are not copied.
        read = weights // 2 if config.draft_weights == "fp8" else weights
        draft = read + dense_step.kv_bytes_sparse
        verify = weights + verified.kv_bytes_sparse
        dense = weights + dense_step.kv_bytes_dense
        gain = tokens * dense / (drafts * draft + verify)
    above = drafts_from(config, device_type)
    if context < above:
        verdict = f"no drafts below {above:,}"
    elif gain is None or device_type == "cpu":
        verdict = "unknown"  # computing costs on CPUs, too: drafting measures it
    else:
        verdict = "pays" if gain >= PAYS_FROM else "does not pay"
    return LosslessGain(context, batch, drafts, tokens, draft, verify, gain, verdict)


def _most(config: SparseConfig, layout: BlockLayout, context: int) -> int:
    if config.selector == "anchor":
        return int(attended(torch.tensor(context)))
    evicting = METHODS[config.selector].eviction(config)
    if evicting is not None:
        skipped = evicting.skipped_blocks(torch.tensor(context))
        return context - int(skipped) * BLOCK_SIZE
    kept = budget(context, config, layout.fmt)
    return context if kept < 0 else kept


def _fewest(config: SparseConfig, layout: BlockLayout, context: int) -> int:
    most = _most(config, layout, context)
    if config.top_p is None or most == context:
        return most
    tail = max(config.local_window, layout.fmt.tail_tokens(context))
    return min(most, max(config.min_tokens, config.sink_tokens + tail))


def _row_bytes(
    config: SparseConfig, layout: BlockLayout, context: int, kept: int
) -> int:
    """Of one query position and KV head."""
    sealed = layout.fmt.sealed_blocks(context)
    evicts = METHODS[config.selector].eviction(config) is not None
    if evicts or config.selector == "anchor":
        return layout.attended_bytes(kept)
    if kept >= context:
        return layout.attended_bytes(context, sealed * BLOCK_SIZE, sealed)
    listed = max(0, kept - layout.fmt.tail_tokens(context))
    size = layout.score_bytes(sealed, config.rank)
    size += 2 * layout.head_size * bool(config.mean_value)
    # Kept tokens may lie in as many blocks as there are.
    return size + layout.attended_bytes(kept, listed, min(sealed, listed))

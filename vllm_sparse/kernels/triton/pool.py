# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The softmax of the logits, summed over the group, as a sortable ranking."""

import triton.language as tl

from .common import BLOCK_SIZE, kernel
from .plan import plan_row
from .threshold import HISTOGRAM, SPAN, add_histogram


@kernel
def normaliser_kernel(
    seq_lens_ptr,  # [num_rows] int32
    budgets_ptr,  # [items] int32
    logits_ptr,  # [items, group, max_blocks * BLOCK_SIZE] fp32
    top_ptr,  # [items, group, spans] fp32, written: largest logit of the span
    sum_ptr,  # [items, group, spans] fp32, written: sum of exp(logit - top)
    num_kv_heads,
    group,
    max_blocks,
    local_window,
    sink_tokens,
):
    """One program per item and SPAN tokens."""
    item, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length, dense, _, _, _ = plan_row(
        seq_lens_ptr,
        budgets_ptr,
        item // num_kv_heads,
        item,
        max_blocks,
        local_window,
        sink_tokens,
    )
    if dense | (span * SPAN >= length):
        return
    t = span * SPAN + tl.arange(0, SPAN)
    for g in range(group):
        head = item * group + g
        at = logits_ptr + head * (max_blocks * BLOCK_SIZE) + t
        logits = tl.load(at, mask=t < length, other=float("-inf"))
        top = tl.max(logits, 0)
        tl.store(top_ptr + head * tl.num_programs(1) + span, top)
        total = tl.sum(tl.exp(logits - top), 0)
        tl.store(sum_ptr + head * tl.num_programs(1) + span, total)


@kernel
def pool_kernel(
    seq_lens_ptr,  # [num_rows] int32
    budgets_ptr,  # [items] int32
    logits_ptr,  # [items, group, max_blocks * BLOCK_SIZE] fp32
    top_ptr,  # [items, group, spans] fp32
    sum_ptr,  # [items, group, spans] fp32
    norm_ptr,  # [items, group] fp32, written: logarithm of the softmax's denominator
    keys_ptr,  # [items, max_blocks * BLOCK_SIZE] int32, written for candidates
    histogram_ptr,  # [items, HISTOGRAM] int32 zeros, added to
    num_kv_heads,
    group,
    max_blocks,
    local_window,
    sink_tokens,
    SPANS: tl.constexpr,  # spans, rounded up to a power of 2
):
    """One program per item and SPAN tokens."""
    item, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = item // num_kv_heads
    length, dense, sinks, recent, _ = plan_row(
        seq_lens_ptr, budgets_ptr, row, item, max_blocks, local_window, sink_tokens
    )
    if dense | (span * SPAN >= recent):
        return
    t = span * SPAN + tl.arange(0, SPAN)
    candidate = (t >= sinks) & (t < recent)
    other = tl.arange(0, SPANS)
    used = other * SPAN < length
    pooled = tl.zeros([SPAN], tl.float32)
    for g in range(group):
        head = item * group + g
        at = head * tl.num_programs(1) + other
        tops = tl.load(top_ptr + at, mask=used, other=float("-inf"))
        sums = tl.load(sum_ptr + at, mask=used, other=0.0)
        top = tl.max(tops, 0)
        norm = top + tl.log(tl.sum(sums * tl.exp(tops - top), 0))
        if span == 0:
            tl.store(norm_ptr + head, norm)
        from_ptr = logits_ptr + head * (max_blocks * BLOCK_SIZE) + t
        logits = tl.load(from_ptr, mask=candidate, other=float("-inf"))
        pooled += tl.exp(logits - norm)
    # Bits of a float that is not negative sort like the float; NaN ranks lowest.
    keys = tl.where(pooled > 0, pooled, 0.0).to(tl.int32, bitcast=True)
    tl.store(keys_ptr + item * (max_blocks * BLOCK_SIZE) + t, keys, mask=candidate)
    add_histogram(histogram_ptr + item * HISTOGRAM, keys, candidate, 0)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Probabilities summed over the group, as sortable integers, and their histogram."""

import triton.language as tl

from .common import BLOCK_SIZE, kernel
from .plan import plan_row
from .score import BLOCKS
from .threshold import HISTOGRAM, SPAN, add_histogram


@kernel
def pool_kernel(
    seq_lens_ptr,  # [num_rows] int32
    budgets_ptr,  # [num_rows] int32
    logits_ptr,  # [items, group, max_blocks * BLOCK_SIZE] fp32
    top_ptr,  # [items, group, parts] fp32
    sum_ptr,  # [items, group, parts] fp32
    norm_ptr,  # [items, group] fp32, written: logarithm of the softmax's denominator
    keys_ptr,  # [items, max_blocks * BLOCK_SIZE] int32, written for candidates
    histogram_ptr,  # [items, HISTOGRAM] int32 zeros, added to
    num_kv_heads,
    group,
    max_blocks,
    local_window,
    sink_tokens,
    parts,
    PARTS: tl.constexpr,  # parts, rounded up to a power of 2
):
    """One program per item and SPAN tokens."""
    item, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = item // num_kv_heads
    length, dense, sinks, recent, _ = plan_row(
        seq_lens_ptr, budgets_ptr, row, max_blocks, local_window, sink_tokens
    )
    if dense | (span * SPAN >= recent):
        return
    t = span * SPAN + tl.arange(0, SPAN)
    candidate = (t >= sinks) & (t < recent)
    part = tl.arange(0, PARTS)
    used = part < tl.cdiv(length, BLOCKS * BLOCK_SIZE)
    pooled = tl.zeros([SPAN], tl.float32)
    for g in range(group):
        head = item * group + g
        tops = tl.load(top_ptr + head * parts + part, mask=used, other=float("-inf"))
        sums = tl.load(sum_ptr + head * parts + part, mask=used, other=0.0)
        top = tl.max(tops, 0)
        norm = top + tl.log(tl.sum(sums * tl.exp(tops - top), 0))
        if span == 0:
            tl.store(norm_ptr + head, norm)
        at = logits_ptr + head * (max_blocks * BLOCK_SIZE) + t
        logits = tl.load(at, mask=candidate, other=float("-inf"))
        pooled += tl.exp(logits - norm)
    # Bits of a float that is not negative sort like the float; NaN ranks lowest.
    keys = tl.where(pooled > 0, pooled, 0.0).to(tl.int32, bitcast=True)
    tl.store(keys_ptr + item * (max_blocks * BLOCK_SIZE) + t, keys, mask=candidate)
    add_histogram(histogram_ptr + item * HISTOGRAM, keys, candidate, 0)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Merging the parts of a list, and SparQ's mean-value term."""

import triton
import triton.language as tl

from .common import BLOCK_SIZE, chunk_of, kernel
from .splits import SPLITS, share_of, tokens_of

TOKENS = tl.constexpr(32)  # of the tail, read at a time


@triton.jit
def mean_value(
    table_ptr,
    head,
    length,
    d,
    kv_cache_ptr,
    block_stride,
    head_stride,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
):
    """[WIDTH] mean of V: the last sealed block knows it up to its end."""
    valid = d < HEAD_SIZE
    sealed, tail = length // BLOCK_SIZE, length % BLOCK_SIZE
    total = tl.zeros([WIDTH], tl.float32)
    if tail > 0:
        block = tl.load(table_ptr + sealed)
        chunk = chunk_of(
            kv_cache_ptr, block, head, block_stride, head_stride, num_blocks
        )
        for first in range(0, tail, TOKENS):
            t = first + tl.arange(0, TOKENS)[:, None]
            at = chunk + t * (2 * HEAD_SIZE) + HEAD_SIZE + d[None, :]
            v = tl.load(at, mask=(t < tail) & valid[None, :], other=0.0)
            total += tl.sum(v.to(tl.float32), 0)
    if sealed > 0:
        block = tl.load(table_ptr + sealed - 1)
        chunk = chunk_of(
            kv_cache_ptr, block, head, block_stride, head_stride, num_blocks
        )
        means = chunk.to(tl.pointer_type(tl.float16), bitcast=True) + MEAN
        mean = tl.load(means + d, mask=valid, other=0.0).to(tl.float32)
        total += mean * (sealed * BLOCK_SIZE)
    return total / tl.maximum(length, 1)


@kernel
def merge_kernel(
    block_table_ptr,  # [num_rows, max_blocks] int32
    seq_lens_ptr,  # [num_rows] int32
    counts_ptr,  # [items] int32
    partial_ptr,  # [items, group, SPLITS, HEAD_SIZE] fp32
    top_ptr,  # [items, group, SPLITS] fp32
    sum_ptr,  # [items, group, SPLITS] fp32
    kept_mass_ptr,  # [items, group] fp32
    sinks_ptr,  # [num_kv_heads * group] fp32
    out_ptr,  # [num_rows, num_kv_heads * group, HEAD_SIZE], written
    block_table_stride,
    out_stride,
    num_kv_heads,
    group,
    max_blocks,
    max_kept,
    kv_cache_ptr,
    block_stride,
    head_stride,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
    MEAN: tl.constexpr,
    WITH_MASS: tl.constexpr,
    WITH_SINKS: tl.constexpr,
):
    """One program per item and query head. A row without tokens is 0."""
    item, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = item // num_kv_heads, item % num_kv_heads
    length, count, _ = tokens_of(
        seq_lens_ptr, counts_ptr, item, row, max_blocks, max_kept, LISTED
    )
    split = tl.arange(0, SPLITS)
    used = split * share_of(count, TILE) < count
    at = (item * group + g) * SPLITS + split
    tops = tl.load(top_ptr + at, mask=used, other=float("-inf"))
    sums = tl.load(sum_ptr + at, mask=used, other=0.0)
    top = tl.where(count > 0, tl.max(tops, 0), 0.0)
    if WITH_SINKS:
        sink = tl.load(sinks_ptr + head * group + g)
        top = tl.maximum(top, sink)
    factor = tl.exp(tops - top)
    d = tl.arange(0, WIDTH)
    valid = d < HEAD_SIZE
    parts = partial_ptr + at[:, None] * HEAD_SIZE + d[None, :]
    acc = tl.load(parts, mask=used[:, None] & valid[None, :], other=0.0)
    total = tl.sum(sums * factor, 0)
    if WITH_SINKS:
        total += tl.exp(sink - top)
    y = tl.sum(acc * factor[:, None], 0) / tl.where(count > 0, total, 1.0)
    if WITH_MASS:
        mean = mean_value(
            block_table_ptr + row * block_table_stride,
            head,
            length,
            d,
            kv_cache_ptr,
            block_stride,
            head_stride,
            num_blocks,
            HEAD_SIZE,
            WIDTH,
            MEAN,
        )
        alpha = tl.load(kept_mass_ptr + item * group + g)
        y = tl.where(length > 0, alpha * y + (1.0 - alpha) * mean, y)
    to = out_ptr + row * out_stride + (head * group + g) * HEAD_SIZE + d
    tl.store(to, y.to(out_ptr.dtype.element_ty), mask=valid)

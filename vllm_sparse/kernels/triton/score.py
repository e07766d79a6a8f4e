# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Logits of every token from the chosen channels: codes, and exact keys in the tail."""

import triton
import triton.language as tl

from .common import (
    BLOCK_SIZE,
    CODE_BITS,
    FP16_MAX,
    LANES,
    NIBBLES,
    capped,
    chunk_of,
    kernel,
)
from .plan import plan_row

HEADS = tl.constexpr(16)  # rows of a tensor-core tile
CHANNELS = tl.constexpr(32)  # of a step
BLOCKS = tl.constexpr(2)  # of a program
# A 16-bit integer c below 2^10, taken for an fp16 number, is c * 2^-24. Queries carry
# 2^5, so that what they lose to fp16 stays far below a code unit.
QUERY_UNIT = tl.constexpr(2.0**5)
PRODUCT_UNIT = tl.constexpr(2.0**19)


@triton.jit
def score_codes(
    chunk,
    channels_ptr,  # [HEAD_SIZE] int32
    scaled_ptr,  # [group, HEAD_SIZE] fp32
    g,
    group,
    HEAD_SIZE: tl.constexpr,
    CODES: tl.constexpr,
    PARAMS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """[HEADS, BLOCK_SIZE] logits of a sealed block, on tensor cores.

    Codes are exact in fp16; queries, times the channel's step, are the sum of two fp16
    numbers.
    """
    codes_ptr = chunk.to(tl.pointer_type(tl.int32), bitcast=True) + CODES
    params_ptr = chunk.to(tl.pointer_type(tl.float16), bitcast=True) + PARAMS
    logits = tl.zeros([HEADS, BLOCK_SIZE], tl.float32)
    offset = tl.zeros([HEADS], tl.float32)
    lane = tl.arange(0, LANES)
    shift = (tl.arange(0, NIBBLES) * CODE_BITS)[None, :, None]
    for i in tl.static_range(STEPS):
        r = i * CHANNELS + tl.arange(0, CHANNELS)
        inside = r < HEAD_SIZE
        d = tl.load(channels_ptr + r, mask=inside, other=0)
        at = g[:, None] * HEAD_SIZE + r[None, :]
        mask = (g < group)[:, None] & inside[None, :]
        q = tl.load(scaled_ptr + at, mask=mask, other=0.0)
        step = tl.load(params_ptr + 2 * d).to(tl.float32)
        minimum = tl.load(params_ptr + 2 * d + 1).to(tl.float32)
        words = tl.load(codes_ptr + d[:, None] * LANES + lane[None, :])
        # Nibble j of word i is token 16 j + i.
        codes = (words[:, None, :] >> shift) & (2**CODE_BITS - 1)
        codes = tl.reshape(codes, [CHANNELS, BLOCK_SIZE]).to(tl.int16)
        codes = codes.to(tl.float16, bitcast=True)
        offset += tl.sum(q * minimum[None, :], 1)
        x = q * (step * QUERY_UNIT)[None, :]
        x = tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX)
        high = x.to(tl.float16)
        low = (x - high.to(tl.float32)).to(tl.float16)
        logits = tl.dot(high, codes, logits)
        logits = tl.dot(low, codes, logits)
    return logits * PRODUCT_UNIT + offset[:, None]


@triton.jit
def score_rows(
    chunk,
    count,
    channels_ptr,  # [HEAD_SIZE] int32
    query_ptr,  # [HEAD_SIZE] fp32
    HEAD_SIZE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """[BLOCK_SIZE] logits of one query head in the block that is not sealed."""
    t = tl.arange(0, BLOCK_SIZE)
    logits = tl.zeros([BLOCK_SIZE], tl.float32)
    for i in tl.static_range(STEPS):
        r = i * CHANNELS + tl.arange(0, CHANNELS)
        inside = r < HEAD_SIZE
        d = tl.load(channels_ptr + r, mask=inside, other=0)
        q = tl.load(query_ptr + r, mask=inside, other=0.0)
        at = chunk + t[:, None] * (2 * HEAD_SIZE) + d[None, :]
        k = tl.load(at, mask=(t < count)[:, None] & inside[None, :], other=0.0)
        logits += tl.sum(k.to(tl.float32) * q[None, :], 1)
    return logits


@kernel
def score_kernel(
    block_table_ptr,  # [num_rows, max_blocks] int32
    seq_lens_ptr,  # [num_rows] int32
    budgets_ptr,  # [items] int32
    channels_ptr,  # [items, HEAD_SIZE] int32
    scaled_ptr,  # [items, group, HEAD_SIZE] fp32
    logits_ptr,  # [items, group, max_blocks * BLOCK_SIZE] fp32, written
    block_table_stride,
    num_kv_heads,
    group,
    max_blocks,
    local_window,
    sink_tokens,
    soft_cap,
    kv_cache_ptr,
    block_stride,
    head_stride,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
    PARAMS: tl.constexpr,
    STEPS: tl.constexpr,  # of CHANNELS, to cover the rank
):
    """One program per item and BLOCKS blocks."""
    item, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCKS
    row, head = item // num_kv_heads, item % num_kv_heads
    length, dense, _, _, _ = plan_row(
        seq_lens_ptr, budgets_ptr, row, item, max_blocks, local_window, sink_tokens
    )
    if dense | (first * BLOCK_SIZE >= length):
        return
    table = block_table_ptr + row * block_table_stride
    channels = channels_ptr + item * HEAD_SIZE
    scaled = scaled_ptr + item * group * HEAD_SIZE
    capacity = max_blocks * BLOCK_SIZE
    t = tl.arange(0, BLOCK_SIZE)
    sealed = length // BLOCK_SIZE
    for first_head in range(0, group, HEADS):
        g = first_head + tl.arange(0, HEADS)
        to = logits_ptr + (item * group + g)[:, None] * capacity + t[None, :]
        written = (g < group)[:, None] & (t >= 0)[None, :]
        for b in range(first, tl.minimum(first + BLOCKS, sealed)):
            block = tl.load(table + b)
            chunk = chunk_of(
                kv_cache_ptr, block, head, block_stride, head_stride, num_blocks
            )
            logits = score_codes(
                chunk, channels, scaled, g, group, HEAD_SIZE, CODES, PARAMS, STEPS
            )
            logits = capped(logits, soft_cap)
            tl.store(to + b * BLOCK_SIZE, logits, mask=written)
    count = length - sealed * BLOCK_SIZE
    if (count > 0) & (sealed - first < BLOCKS):
        block = tl.load(table + sealed)
        chunk = chunk_of(
            kv_cache_ptr, block, head, block_stride, head_stride, num_blocks
        )
        for head_of_group in range(group):
            query = scaled + head_of_group * HEAD_SIZE
            tail = score_rows(chunk, count, channels, query, HEAD_SIZE, STEPS)
            tail = capped(tail, soft_cap)
            at = (item * group + head_of_group) * capacity + sealed * BLOCK_SIZE + t
            tl.store(logits_ptr + at, tail, mask=t < count)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Logits of every token from the chosen channels: codes, and exact keys in the tail."""

import triton
import triton.language as tl

from .common import BLOCK_SIZE, CODE_BITS, LANES, NIBBLES, capped, chunk_of, kernel
from .plan import plan_row

HEADS = tl.constexpr(16)  # rows of a tensor-core tile
CHANNELS = tl.constexpr(32)  # of a step
# Blocks of one program. A constant: sums must not depend on the batch.
BLOCKS = tl.constexpr(4)


@triton.jit
def queries_of(
    channels_ptr, scaled_ptr, item, g, group, first, HEAD_SIZE: tl.constexpr
):
    """Channels [CHANNELS] and queries [HEADS, CHANNELS] of one step."""
    r = first + tl.arange(0, CHANNELS)
    inside = r < HEAD_SIZE
    d = tl.load(channels_ptr + item * HEAD_SIZE + r, mask=inside, other=0)
    at = (item * group + g)[:, None] * HEAD_SIZE + r[None, :]
    mask = (g < group)[:, None] & inside[None, :]
    return d, tl.load(scaled_ptr + at, mask=mask, other=0.0)


@triton.jit
def score_codes(
    chunk,
    channels_ptr,
    scaled_ptr,
    item,
    g,
    group,
    rank,
    HEAD_SIZE: tl.constexpr,
    CODES: tl.constexpr,
    PARAMS: tl.constexpr,
):
    """[HEADS, BLOCK_SIZE] logits of a sealed block.

    Codes are exact in fp16; queries, times the channel's step, are split into two fp16
    numbers, so that tensor cores lose nothing.
    """
    codes_ptr = chunk.to(tl.pointer_type(tl.int32), bitcast=True) + CODES
    params_ptr = chunk.to(tl.pointer_type(tl.float16), bitcast=True) + PARAMS
    logits = tl.zeros([HEADS, BLOCK_SIZE], tl.float32)
    offset = tl.zeros([HEADS], tl.float32)
    lane = tl.arange(0, LANES)
    shift = (tl.arange(0, NIBBLES) * CODE_BITS)[None, :, None]
    for first in range(0, rank, CHANNELS):
        d, q = queries_of(channels_ptr, scaled_ptr, item, g, group, first, HEAD_SIZE)
        step = tl.load(params_ptr + 2 * d).to(tl.float32)
        minimum = tl.load(params_ptr + 2 * d + 1).to(tl.float32)
        words = tl.load(codes_ptr + d[:, None] * LANES + lane[None, :])
        # Nibble j of word i is token 16 j + i.
        codes = (words[:, None, :] >> shift) & (2**CODE_BITS - 1)
        codes = tl.reshape(codes, [CHANNELS, BLOCK_SIZE]).to(tl.float16)
        offset += tl.sum(q * minimum[None, :], 1)
        x = q * step[None, :]
        unit = tl.max(tl.abs(x), 1)
        unit = tl.where(unit > 0, unit, 1.0)[:, None]
        x = x / unit
        high = x.to(tl.float16)
        low = (x - high.to(tl.float32)).to(tl.float16)
        logits += (tl.dot(high, codes) + tl.dot(low, codes)) * unit
    return logits + offset[:, None]


@triton.jit
def score_rows(
    chunk,
    count,
    channels_ptr,
    scaled_ptr,
    item,
    g,
    group,
    rank,
    HEAD_SIZE: tl.constexpr,
):
    """[HEADS, BLOCK_SIZE] logits of the block that is not sealed: ``count`` tokens."""
    t = tl.arange(0, BLOCK_SIZE)
    logits = tl.zeros([HEADS, BLOCK_SIZE], tl.float32)
    for first in range(0, rank, CHANNELS):
        d, q = queries_of(channels_ptr, scaled_ptr, item, g, group, first, HEAD_SIZE)
        at = chunk + t[None, :] * (2 * HEAD_SIZE) + d[:, None]
        stored = (t < count)[None, :] & (d >= 0)[:, None]
        k = tl.load(at, mask=stored, other=0.0).to(tl.float32)
        logits = tl.dot(q, k, logits, input_precision="ieee")
    return logits


@kernel
def score_kernel(
    block_table_ptr,  # [num_rows, max_blocks] int32
    seq_lens_ptr,  # [num_rows] int32
    budgets_ptr,  # [num_rows] int32
    channels_ptr,  # [items, HEAD_SIZE] int32
    scaled_ptr,  # [items, group, HEAD_SIZE] fp32
    logits_ptr,  # [items, group, max_blocks * BLOCK_SIZE] fp32, written
    top_ptr,  # [items, group, parts] fp32, written: largest logit of the part
    sum_ptr,  # [items, group, parts] fp32, written: sum of exp(logit - top)
    block_table_stride,
    num_kv_heads,
    group,
    max_blocks,
    rank,
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
):
    """One program per item and part of BLOCKS blocks."""
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = item // num_kv_heads, item % num_kv_heads
    length, dense, _, _, _ = plan_row(
        seq_lens_ptr, budgets_ptr, row, max_blocks, local_window, sink_tokens
    )
    first = part * BLOCKS
    if dense | (first * BLOCK_SIZE >= length):
        return
    end = tl.minimum(first + BLOCKS, tl.cdiv(length, BLOCK_SIZE))
    t = tl.arange(0, BLOCK_SIZE)
    for first_head in range(0, group, HEADS):
        g = first_head + tl.arange(0, HEADS)
        valid = g < group
        top = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        for b in range(first, end):
            block = tl.load(block_table_ptr + row * block_table_stride + b)
            chunk = chunk_of(
                kv_cache_ptr, block, head, block_stride, head_stride, num_blocks
            )
            count = tl.minimum(length - b * BLOCK_SIZE, BLOCK_SIZE)
            if count == BLOCK_SIZE:
                logits = score_codes(
                    chunk,
                    channels_ptr,
                    scaled_ptr,
                    item,
                    g,
                    group,
                    rank,
                    HEAD_SIZE,
                    CODES,
                    PARAMS,
                )
            else:
                logits = score_rows(
                    chunk,
                    count,
                    channels_ptr,
                    scaled_ptr,
                    item,
                    g,
                    group,
                    rank,
                    HEAD_SIZE,
                )
            logits = capped(logits, soft_cap)
            inside = (t < count)[None, :]
            at = (item * group + g)[:, None] * (max_blocks * BLOCK_SIZE)
            at += b * BLOCK_SIZE + t[None, :]
            tl.store(logits_ptr + at, logits, mask=valid[:, None] & inside)
            logits = tl.where(inside, logits, float("-inf"))
            peak = tl.maximum(top, tl.max(logits, 1))
            total = total * tl.exp(top - peak)
            total += tl.sum(tl.exp(logits - peak[:, None]), 1)
            top = peak
        at = (item * group + g) * tl.num_programs(1) + part
        tl.store(top_ptr + at, top, mask=valid)
        tl.store(sum_ptr + at, total, mask=valid)

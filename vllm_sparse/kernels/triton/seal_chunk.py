# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sealing one (block, KV head): what all kernels that seal share."""

import triton
import triton.language as tl

from .common import BLOCK_SIZE, CODE_BITS, CODE_MAX, FP16_MAX, LANES, NIBBLES

CHANNELS = 64  # of a program


@triton.jit
def round_half_even(x):
    """Of 0 <= x < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def extended_mean(before, mean, index):
    """Prefix mean up to block ``index`` from the one before it and the block's own."""
    return before + (mean - before) / (index + 1)


@triton.jit
def to_half(x):
    """Rounded to fp16, within its range."""
    return tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX).to(tl.float16)


@triton.jit
def seal_chunk(
    chunk,
    d,  # [CHANNELS] channels
    HEAD_SIZE: tl.constexpr,
    CODES: tl.constexpr,
    PARAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Writes codes and parameters of K; returns [CHANNELS] the block's mean of V."""
    valid = d < HEAD_SIZE
    lane = tl.arange(0, LANES)
    rows = chunk + lane[:, None] * (2 * HEAD_SIZE) + d[None, :]
    mask = (lane[:, None] >= 0) & valid[None, :]

    low = tl.full([LANES, CHANNELS], float("inf"), tl.float32)
    high = tl.full([LANES, CHANNELS], float("-inf"), tl.float32)
    total = tl.zeros([LANES, CHANNELS], tl.float32)
    for j in range(NIBBLES):
        at = rows + j * LANES * 2 * HEAD_SIZE
        k = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        low, high = tl.minimum(low, k), tl.maximum(high, k)
        total += tl.load(at + HEAD_SIZE, mask=mask, other=0.0).to(tl.float32)
    lowest, highest = tl.min(low, 0), tl.max(high, 0)
    mean = tl.sum(total, 0) / BLOCK_SIZE

    # Rounded to fp16 before the codes are taken; exact division, as in the reference.
    minimum = to_half(lowest)
    step = tl.math.div_rn(highest - lowest, tl.full([CHANNELS], CODE_MAX, tl.float32))
    scale = to_half(step)
    base = minimum.to(tl.float32)[None, :]
    divisor = tl.where(scale > 0, scale.to(tl.float32), 1.0)[None, :]
    words = tl.zeros([LANES, CHANNELS], tl.int32)
    for j in range(NIBBLES):
        at = rows + j * LANES * 2 * HEAD_SIZE
        k = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        x = tl.math.div_rn(k - base, divisor + tl.zeros_like(k))
        x = round_half_even(tl.minimum(tl.maximum(x, 0.0), 15.0))
        words |= x.to(tl.int32) << (CODE_BITS * j)
    codes = chunk.to(tl.pointer_type(tl.int32), bitcast=True) + CODES
    tl.store(codes + d[None, :] * LANES + lane[:, None], words, mask=mask)
    params = chunk.to(tl.pointer_type(tl.float16), bitcast=True) + PARAMS + 2 * d
    tl.store(params, scale, mask=valid)
    tl.store(params + 1, minimum, mask=valid)
    return mean

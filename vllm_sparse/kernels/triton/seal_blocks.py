# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sealing full blocks: 4-bit codes of K, then the prefix mean of V."""

import torch
import triton
import triton.language as tl

from .checks import check, check_cache, expect
from .common import (
    BLOCK_SIZE,
    CODE_BITS,
    CODE_MAX,
    FP16_MAX,
    LANES,
    NIBBLES,
    cache_args,
    chunk_of,
    kernel,
    sidecar_args,
)
from .prefix_mean import write_prefix_means


@triton.jit
def round_half_even(x):
    """Of 0 <= x < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@kernel
def seal_kernel(
    block_ids_ptr,  # [num_jobs] int32, negative: nothing to seal
    block_mean_ptr,  # [num_jobs, num_kv_heads, HEAD_SIZE] fp32, written
    kv_cache_ptr,
    block_stride,
    head_stride,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
    PARAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Codes, parameters and mean of V of CHANNELS channels of one (job, KV head)."""
    job, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = tl.load(block_ids_ptr + job)
    if (block < 0) | (block >= num_blocks):
        return
    chunk = chunk_of(kv_cache_ptr, block, head, block_stride, head_stride, num_blocks)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
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
    to = (job * tl.num_programs(1) + head) * HEAD_SIZE + d
    tl.store(block_mean_ptr + to, mean, mask=valid)

    # Rounded to fp16 before the codes are taken; exact division, as in the reference.
    minimum = tl.minimum(tl.maximum(lowest, -FP16_MAX), FP16_MAX).to(tl.float16)
    step = tl.math.div_rn(highest - lowest, tl.full([CHANNELS], CODE_MAX, tl.float32))
    scale = tl.minimum(step, FP16_MAX).to(tl.float16)
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


def seal_blocks(
    kv_cache: torch.Tensor,
    block_ids: torch.Tensor,
    prev_block_ids: torch.Tensor,
    block_index: torch.Tensor,
    head_size: int,
) -> None:
    """See :func:`vllm_sparse.ops.seal_blocks`; jobs with a negative id are skipped."""
    lay = check_cache(kv_cache, head_size)
    expect(block_ids.dim() == 1, "block_ids must have 1 dimensions")
    num_jobs, num_kv_heads = block_ids.shape[0], kv_cache.shape[1]
    for t, name in (
        (block_ids, "block_ids"),
        (prev_block_ids, "prev_block_ids"),
        (block_index, "block_index"),
    ):
        check(t, name, kv_cache, torch.int32, (num_jobs,))
    if num_jobs == 0:
        return
    shape = (num_jobs, num_kv_heads, head_size)
    block_mean = torch.empty(shape, dtype=torch.float32, device=kv_cache.device)
    channels = 64
    seal_kernel[num_jobs, num_kv_heads, triton.cdiv(head_size, channels)](
        block_ids,
        block_mean,
        **cache_args(kv_cache, lay),
        **sidecar_args(lay),
        CHANNELS=channels,
    )
    write_prefix_means(
        kv_cache, block_ids, prev_block_ids, block_index, block_mean, lay
    )

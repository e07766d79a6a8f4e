# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sealing full blocks: 4-bit codes of K, then the prefix mean of V."""

import torch
import triton
import triton.language as tl

from .checks import check, check_cache, expect
from .common import cache_args, chunk_of, kernel, sidecar_args
from .prefix_mean import write_prefix_means
from .seal_chunk import seal_chunk

CHANNELS = 64  # of a program


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
    mean = seal_chunk(chunk, d, HEAD_SIZE, CODES, PARAMS, CHANNELS)
    to = (job * tl.num_programs(1) + head) * HEAD_SIZE + d
    tl.store(block_mean_ptr + to, mean, mask=d < HEAD_SIZE)


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
    seal_kernel[num_jobs, num_kv_heads, triton.cdiv(head_size, CHANNELS)](
        block_ids,
        block_mean,
        **cache_args(kv_cache, lay),
        **sidecar_args(lay),
        CHANNELS=CHANNELS,
    )
    write_prefix_means(
        kv_cache, block_ids, prev_block_ids, block_index, block_mean, lay
    )

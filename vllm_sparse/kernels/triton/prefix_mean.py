# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The chain of prefix means: each block's needs that of the block before it."""

import torch
import triton.language as tl

from ...cache.layout import BlockLayout
from .common import cache_args, chunk_of, kernel
from .seal_chunk import extended_mean, to_half


@kernel
def prefix_mean_kernel(
    block_ids_ptr,  # [num_jobs] int32, in the order of their place in the context
    prev_block_ids_ptr,  # [num_jobs] int32
    block_index_ptr,  # [num_jobs] int32
    block_mean_ptr,  # [num_jobs, num_kv_heads, HEAD_SIZE] fp32
    num_jobs,
    kv_cache_ptr,
    block_stride,
    head_stride,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
):
    """One program per KV head walks the jobs."""
    head = tl.program_id(0)
    d = tl.arange(0, WIDTH)
    for job in range(num_jobs):
        block = tl.load(block_ids_ptr + job)
        prev = tl.load(prev_block_ids_ptr + job)
        index = tl.load(block_index_ptr + job)
        sealed = (block >= 0) & (block < num_blocks) & (prev < num_blocks)
        place = (tl.cast(job, tl.int64) * tl.num_programs(0) + head) * HEAD_SIZE
        # Widths and no scalar masks: triton 3.9's interpreter widens those to int32.
        valid = d < tl.where(sealed, HEAD_SIZE, 0)
        mean = tl.load(block_mean_ptr + place + d, mask=valid, other=0.0)
        chunk = chunk_of(
            kv_cache_ptr, prev, head, block_stride, head_stride, num_blocks
        )
        stored = chunk.to(tl.pointer_type(tl.float16), bitcast=True) + MEAN + d
        chained = sealed & (prev >= 0)
        known = d < tl.where(chained, HEAD_SIZE, 0)
        before = tl.load(stored, mask=known, other=0.0).to(tl.float32)
        mean = tl.where(chained, extended_mean(before, mean, index), mean)
        chunk = chunk_of(
            kv_cache_ptr, block, head, block_stride, head_stride, num_blocks
        )
        to = chunk.to(tl.pointer_type(tl.float16), bitcast=True) + MEAN + d
        tl.store(to, to_half(mean), mask=valid)
        # Another thread may read it for the next job.
        tl.debug_barrier()


def write_prefix_means(
    kv_cache: torch.Tensor,
    block_ids: torch.Tensor,
    prev_block_ids: torch.Tensor,
    block_index: torch.Tensor,
    block_mean: torch.Tensor,
    lay: BlockLayout,
) -> None:
    """Prefix means of the jobs from their blocks' own means.

    Args:
        block_mean: [num_jobs, num_kv_heads, head_size] fp32 mean of V in each block.
    """
    prefix_mean_kernel[(kv_cache.shape[1],)](
        block_ids,
        prev_block_ids,
        block_index,
        block_mean,
        block_ids.shape[0],
        **cache_args(kv_cache, lay),
        MEAN=lay.prefix_mean_offset // 2,
        num_warps=1,
    )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sealing the blocks that prompts and drafts fill: codes of K, then means of V."""

import torch
import triton
import triton.language as tl

from ...cache.layout import BLOCK_SIZE, BlockLayout
from .common import cache_args, chunk_of, kernel, sidecar_args
from .prefix_mean import write_prefix_means
from .seal_chunk import CHANNELS, seal_chunk


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


def find_jobs(
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks whose last token is among the new ones, found without the host.

    Returns:
        block, block before and place in the context: each [num_jobs] int32, by place,
        then -1, as there are no more jobs than shapes allow.
    """
    (num_tokens,), (num_rows,) = slot_mapping.shape, seq_lens.shape
    ends = query_start_loc[1:]
    token = torch.arange(num_tokens, dtype=torch.int32, device=ends.device)
    row = torch.searchsorted(ends, token, right=True).clamp_(max=num_rows - 1)
    position = token + (seq_lens - ends)[row]
    filling = (slot_mapping % BLOCK_SIZE == BLOCK_SIZE - 1) & (token < ends[-1])
    # Block 0 is vLLM's null block, which is never written.
    filling &= (slot_mapping >= BLOCK_SIZE) & (position > 0)
    never = torch.iinfo(torch.int32).max
    num_jobs = min(num_tokens, num_tokens // BLOCK_SIZE + num_rows)
    position, token = torch.where(filling, position, never).sort(stable=True)
    position, token = position[:num_jobs], token[:num_jobs]
    found, index = position < never, position // BLOCK_SIZE
    before = (index - 1).clamp_(0, block_table.shape[1] - 1)
    jobs = (
        slot_mapping[token] // BLOCK_SIZE,
        torch.where(index > 0, block_table[row[token], before], -1),
        index,
    )
    block, prev, index = (torch.where(found, job, -1).int() for job in jobs)
    return block, prev, index


def seal_jobs(
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    lay: BlockLayout,
) -> None:
    """Seal every block that the new tokens fill."""
    jobs = find_jobs(slot_mapping, block_table, seq_lens, query_start_loc)
    num_jobs, num_kv_heads = jobs[0].shape[0], kv_cache.shape[1]
    shape = (num_jobs, num_kv_heads, lay.head_size)
    block_mean = torch.empty(shape, dtype=torch.float32, device=kv_cache.device)
    seal_kernel[num_jobs, num_kv_heads, triton.cdiv(lay.head_size, CHANNELS)](
        jobs[0],
        block_mean,
        **cache_args(kv_cache, lay),
        **sidecar_args(lay),
        CHANNELS=CHANNELS,
    )
    write_prefix_means(kv_cache, *jobs, block_mean, lay)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sealing what decode requests have filled: one token each, so mostly nothing."""

import torch
import triton
import triton.language as tl

from ...cache.layout import BlockLayout
from .common import BLOCK_SIZE, cache_args, chunk_of, kernel, sidecar_args
from .seal_chunk import CHANNELS, extended_mean, seal_chunk, to_half


@kernel
def seal_rows_kernel(
    slot_mapping_ptr,  # [num_tokens] int64
    block_table_ptr,  # [num_rows, max_blocks] int32
    seq_lens_ptr,  # [num_rows] int32
    query_start_loc_ptr,  # [num_rows + 1] int32
    block_table_stride,
    max_blocks,
    num_tokens,
    kv_cache_ptr,
    block_stride,
    head_stride,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
    PARAMS: tl.constexpr,
    MEAN: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """CHANNELS channels of one (row, KV head).

    The block before was sealed in an earlier step: its mean can be read at once.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(query_start_loc_ptr + row)
    end = tl.load(query_start_loc_ptr + row + 1)
    if (token < 0) | (token >= end) | (token >= num_tokens):
        return
    slot = tl.load(slot_mapping_ptr + token)
    index = tl.load(seq_lens_ptr + row) // BLOCK_SIZE - 1
    block = slot // BLOCK_SIZE
    filled = slot % BLOCK_SIZE == BLOCK_SIZE - 1
    # Block 0 is vLLM's null block, which is never written.
    known = (block > 0) & (block < num_blocks) & (index >= 0) & (index < max_blocks)
    if (not filled) | (not known):
        return
    entry = block_table_ptr + row * block_table_stride + index
    prev = tl.load(entry - 1, mask=index > 0, other=-1)
    chunk = chunk_of(kv_cache_ptr, block, head, block_stride, head_stride, num_blocks)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    mean = seal_chunk(chunk, d, HEAD_SIZE, CODES, PARAMS, CHANNELS)
    earlier = chunk_of(kv_cache_ptr, prev, head, block_stride, head_stride, num_blocks)
    stored = earlier.to(tl.pointer_type(tl.float16), bitcast=True) + MEAN + d
    known = d < tl.where(index > 0, HEAD_SIZE, 0)
    before = tl.load(stored, mask=known, other=0.0).to(tl.float32)
    mean = tl.where(index > 0, extended_mean(before, mean, index), mean)
    to = chunk.to(tl.pointer_type(tl.float16), bitcast=True) + MEAN + d
    tl.store(to, to_half(mean), mask=d < HEAD_SIZE)


def seal_rows(
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    lay: BlockLayout,
) -> None:
    """Seal the block that each row's token fills, if any; one token a row at most."""
    blocks = triton.cdiv(lay.head_size, CHANNELS)
    seal_rows_kernel[seq_lens.shape[0], kv_cache.shape[1], blocks](
        slot_mapping,
        block_table,
        seq_lens,
        query_start_loc,
        block_table.stride(0),
        block_table.shape[1],
        slot_mapping.shape[0],
        **cache_args(kv_cache, lay),
        **sidecar_args(lay),
        MEAN=lay.prefix_mean_offset // 2,
        CHANNELS=CHANNELS,
    )

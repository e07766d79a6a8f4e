# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sealing what decode rows have filled: at most one block a row, mostly none."""

import torch
import triton
import triton.language as tl

from .checks import check, check_cache, expect
from .common import BLOCK_SIZE, cache_args, chunk_of, kernel, sidecar_args
from .seal_chunk import extended_mean, seal_chunk, to_half
from .store_kv import store_kv

CHANNELS = 64  # of a program


@kernel
def seal_rows_kernel(
    block_table_ptr,  # [num_rows, max_blocks] int32
    seq_lens_ptr,  # [num_rows] int32
    query_start_loc_ptr,  # [num_rows + 1] int32
    block_table_stride,
    max_blocks,
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
    length = tl.load(seq_lens_ptr + row)
    start = tl.load(query_start_loc_ptr + row)
    computed = length - (tl.load(query_start_loc_ptr + row + 1) - start)
    index = length // BLOCK_SIZE - 1
    if (index < 0) | (index >= max_blocks) | (computed >= (index + 1) * BLOCK_SIZE):
        return
    entry = block_table_ptr + row * block_table_stride + index
    block = tl.load(entry)
    prev = tl.load(entry - 1, mask=index > 0, other=-1)
    # Block 0 is vLLM's null block, which pads tables and is never written.
    if (block <= 0) | (block >= num_blocks) | (prev >= num_blocks):
        return
    chunk = chunk_of(kv_cache_ptr, block, head, block_stride, head_stride, num_blocks)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    mean = seal_chunk(chunk, d, HEAD_SIZE, CODES, PARAMS, CHANNELS)
    earlier = chunk_of(kv_cache_ptr, prev, head, block_stride, head_stride, num_blocks)
    stored = earlier.to(tl.pointer_type(tl.float16), bitcast=True) + MEAN + d
    known = d < tl.where(prev >= 0, HEAD_SIZE, 0)
    before = tl.load(stored, mask=known, other=0.0).to(tl.float32)
    mean = tl.where(prev >= 0, extended_mean(before, mean, index), mean)
    to = chunk.to(tl.pointer_type(tl.float16), bitcast=True) + MEAN + d
    tl.store(to, to_half(mean), mask=d < HEAD_SIZE)


def seal_rows(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    head_size: int,
) -> None:
    """See :func:`vllm_sparse.ops.seal_rows`."""
    lay = check_cache(kv_cache, head_size)
    expect(seq_lens.dim() == 1, "seq_lens must have 1 dimensions")
    num_rows, num_kv_heads = seq_lens.shape[0], kv_cache.shape[1]
    check(block_table, "block_table", kv_cache, torch.int32, (num_rows, None))
    check(seq_lens, "seq_lens", kv_cache, torch.int32, (num_rows,))
    check(query_start_loc, "query_start_loc", kv_cache, torch.int32, (num_rows + 1,))
    if num_rows == 0:
        return
    seal_rows_kernel[num_rows, num_kv_heads, triton.cdiv(head_size, CHANNELS)](
        block_table,
        seq_lens,
        query_start_loc,
        block_table.stride(0),
        block_table.shape[1],
        **cache_args(kv_cache, lay),
        **sidecar_args(lay),
        MEAN=lay.prefix_mean_offset // 2,
        CHANNELS=CHANNELS,
    )


def store_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """See :func:`vllm_sparse.ops.store_rows`."""
    store_kv(key, value, kv_cache, slot_mapping)
    # A row without a slot brings no token, and so fills no block.
    starts = seq_lens.new_zeros(seq_lens.shape[0] + 1)
    torch.cumsum(slot_mapping >= 0, 0, dtype=torch.int32, out=starts[1:])
    seal_rows(kv_cache, block_table, seq_lens, starts, key.shape[-1])

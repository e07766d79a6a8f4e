# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Copying contexts out of their blocks, for prefill."""

import torch
import triton.language as tl

from .checks import check, check_cache, expect, rows_only
from .common import BLOCK_SIZE, cache_args, chunk_of, context_length, kernel

TOKENS = 32  # moved at a time


@kernel
def gather_kernel(
    block_table_ptr,  # [num_rows, max_blocks] int32
    seq_lens_ptr,  # [num_rows] int32
    out_start_ptr,  # [num_rows] int64
    key_ptr,  # [num_tokens, num_kv_heads, HEAD_SIZE]
    value_ptr,
    block_table_stride,
    num_tokens,
    max_blocks,
    kv_cache_ptr,
    block_stride,
    head_stride,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    index, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = context_length(seq_lens_ptr, row, max_blocks)
    if index * BLOCK_SIZE >= length:
        return
    block = tl.load(block_table_ptr + row.to(tl.int64) * block_table_stride + index)
    chunk = chunk_of(kv_cache_ptr, block, head, block_stride, head_stride, num_blocks)
    start = tl.load(out_start_ptr + row)
    num_kv_heads = tl.num_programs(1)
    d = tl.arange(0, WIDTH)[None, :]
    for first in range(0, BLOCK_SIZE, TOKENS):
        t = first + tl.arange(0, TOKENS)
        out = start + index * BLOCK_SIZE + t
        inside = (index * BLOCK_SIZE + t < length) & (out >= 0) & (out < num_tokens)
        mask = inside[:, None] & (d < HEAD_SIZE)
        rows = chunk + t[:, None] * (2 * HEAD_SIZE) + d
        to = (out[:, None] * num_kv_heads + head) * HEAD_SIZE + d
        tl.store(key_ptr + to, tl.load(rows, mask=mask), mask=mask)
        tl.store(value_ptr + to, tl.load(rows + HEAD_SIZE, mask=mask), mask=mask)


def gather_kv(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out_start: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_format: int = 0,
) -> None:
    """See :meth:`vllm_sparse.ops.Ops.gather_kv`."""
    rows_only(kv_format)
    expect(key.dim() == 3, "key must have 3 dimensions")
    lay = check_cache(kv_cache, key.shape[2])
    num_kv_heads = kv_cache.shape[1]
    shape = (key.shape[0], num_kv_heads, lay.head_size)
    for t, name in ((key, "key"), (value, "value")):
        check(t, name, kv_cache, kv_cache.dtype, shape)
        expect(t.is_contiguous(), f"{name} must be contiguous")
    expect(seq_lens.dim() == 1, "seq_lens must have 1 dimensions")
    num_rows = seq_lens.shape[0]
    check(block_table, "block_table", kv_cache, torch.int32, (num_rows, None))
    check(seq_lens, "seq_lens", kv_cache, torch.int32, (num_rows,))
    check(out_start, "out_start", kv_cache, torch.int64, (num_rows,))
    max_blocks = block_table.shape[1]
    if num_rows == 0 or max_blocks == 0:
        return
    gather_kernel[max_blocks, num_kv_heads, num_rows](
        block_table,
        seq_lens,
        out_start,
        key,
        value,
        block_table.stride(0),
        key.shape[0],
        max_blocks,
        **cache_args(kv_cache, lay),
        TOKENS=TOKENS,
    )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Writing K and V rows at their slots, then sealing what they fill."""

import torch
import triton
import triton.language as tl

from .checks import check, check_cache, expect, rows_only
from .common import BLOCK_SIZE, cache_args, kernel
from .seal_jobs import seal_jobs
from .seal_rows import seal_rows

TOKENS = 16  # of a program


@kernel
def store_kernel(
    key_ptr,  # [>= num_tokens, num_kv_heads, HEAD_SIZE]
    value_ptr,
    slot_mapping_ptr,  # [num_tokens] int64
    query_start_loc_ptr,  # [num_rows + 1] int32
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    num_tokens,
    num_rows,
    kv_cache_ptr,
    block_stride,
    head_stride,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, WIDTH)[None, :]
    end = tl.minimum(tl.load(query_start_loc_ptr + num_rows), num_tokens)
    slot = tl.load(slot_mapping_ptr + token, mask=token < end, other=-1)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    # Block 0 is vLLM's null block, which is never written.
    stored = (slot >= BLOCK_SIZE) & (block < num_blocks)
    mask = stored[:, None] & (d < HEAD_SIZE)
    token = token[:, None]
    key = key_ptr + token * key_stride + head * key_head_stride + d
    value = value_ptr + token * value_stride + head * value_head_stride + d
    to = kv_cache_ptr + block[:, None] * block_stride + head * head_stride
    to += offset[:, None] * (2 * HEAD_SIZE) + d
    tl.store(to, tl.load(key, mask=mask), mask=mask)
    tl.store(to + HEAD_SIZE, tl.load(value, mask=mask), mask=mask)


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    kv_format: int = 0,
) -> None:
    """See :meth:`vllm_sparse.ops.Ops.store`."""
    rows_only(kv_format)
    expect(key.dim() == 3, "key must have 3 dimensions")
    lay = check_cache(kv_cache, key.shape[2])
    num_kv_heads = kv_cache.shape[1]
    check(slot_mapping, "slot_mapping", kv_cache, torch.int64, (None,))
    num_tokens = slot_mapping.shape[0]
    for t, name in ((key, "key"), (value, "value")):
        check(t, name, kv_cache, kv_cache.dtype, (None, num_kv_heads, lay.head_size))
        expect(t.shape[0] >= num_tokens, f"{name} must hold slot_mapping's tokens")
    expect(seq_lens.dim() == 1, "seq_lens must have 1 dimensions")
    num_rows = seq_lens.shape[0]
    check(block_table, "block_table", kv_cache, torch.int32, (num_rows, None))
    check(seq_lens, "seq_lens", kv_cache, torch.int32, (num_rows,))
    check(query_start_loc, "query_start_loc", kv_cache, torch.int32, (num_rows + 1,))
    if num_tokens == 0 or num_rows == 0:
        return
    store_kernel[triton.cdiv(num_tokens, TOKENS), num_kv_heads](
        key,
        value,
        slot_mapping,
        query_start_loc,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        num_tokens,
        num_rows,
        **cache_args(kv_cache, lay),
        TOKENS=TOKENS,
    )
    seal = seal_rows if num_tokens == num_rows else seal_jobs
    seal(kv_cache, slot_mapping, block_table, seq_lens, query_start_loc, lay)

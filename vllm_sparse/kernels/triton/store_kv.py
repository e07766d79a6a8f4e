# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Writing K and V rows at their slots."""

import torch
import triton
import triton.language as tl

from .checks import check, check_cache, expect
from .common import BLOCK_SIZE, cache_args, kernel

TOKENS = 16  # of a program


@kernel
def store_kernel(
    key_ptr,  # [>= num_tokens, num_kv_heads, HEAD_SIZE]
    value_ptr,
    slot_mapping_ptr,  # [num_tokens] int64
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    num_tokens,
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
    slot = tl.load(slot_mapping_ptr + token, mask=token < num_tokens, other=-1)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    stored = (slot >= 0) & (block < num_blocks)
    mask = stored[:, None] & (d < HEAD_SIZE)
    token = token[:, None]
    key = key_ptr + token * key_stride + head * key_head_stride + d
    value = value_ptr + token * value_stride + head * value_head_stride + d
    to = kv_cache_ptr + block[:, None] * block_stride + head * head_stride
    to += offset[:, None] * (2 * HEAD_SIZE) + d
    tl.store(to, tl.load(key, mask=mask), mask=mask)
    tl.store(to + HEAD_SIZE, tl.load(value, mask=mask), mask=mask)


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See :func:`vllm_sparse.ops.store_kv`; slots out of range are skipped."""
    expect(key.dim() == 3, "key must have 3 dimensions")
    lay = check_cache(kv_cache, key.shape[2])
    num_kv_heads = kv_cache.shape[1]
    check(slot_mapping, "slot_mapping", kv_cache, torch.int64, (None,))
    num_tokens = slot_mapping.shape[0]
    for t, name in ((key, "key"), (value, "value")):
        check(t, name, kv_cache, kv_cache.dtype, (None, num_kv_heads, lay.head_size))
        expect(t.shape[0] >= num_tokens, f"{name} must hold slot_mapping's tokens")
    if num_tokens == 0:
        return
    store_kernel[triton.cdiv(num_tokens, TOKENS), num_kv_heads](
        key,
        value,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        num_tokens,
        **cache_args(kv_cache, lay),
        TOKENS=TOKENS,
    )

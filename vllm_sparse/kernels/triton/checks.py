# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Contracts of the ops, as csrc/checks.h checks them for the compiled ones."""

import torch

from ...cache.layout import BLOCK_SIZE, BlockLayout

MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 256


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def check(
    t: torch.Tensor,
    name: str,
    like: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
) -> None:
    """Dimensions, device, dtype, layout, shape; None in ``shape``: any size."""
    expect(t.dim() == len(shape), f"{name} must have {len(shape)} dimensions")
    expect(t.device == like.device, f"{name} must be on kv_cache's device")
    expect(t.dtype == dtype, f"{name} must be {str(dtype).removeprefix('torch.')}")
    expect(
        t.shape[-1] <= 1 or t.stride(-1) == 1,
        f"{name} must be contiguous in its last dimension",
    )
    for dim, (size, expected) in enumerate(zip(t.shape, shape)):
        expect(
            expected is None or size == expected,
            f"{name} has size {size} in dimension {dim}, expected {expected}",
        )


def rows_only(kv_format: int) -> None:
    expect(kv_format == 0, "quantised formats have no Triton kernels")


def check_cache(kv_cache: torch.Tensor, head_size: int) -> BlockLayout:
    """[num_blocks, num_kv_heads, BLOCK_SIZE, C], each (block, head) contiguous."""
    expect(kv_cache.dim() == 4, "kv_cache must have 4 dimensions")
    expect(
        kv_cache.dtype in MODEL_DTYPES,
        "kv_cache must be float32, float16 or bfloat16",
    )
    expect(
        16 <= head_size <= MAX_HEAD_SIZE and head_size % 16 == 0,
        f"head_size must be a multiple of 16 from 16 to {MAX_HEAD_SIZE}, "
        f"got {head_size}",
    )
    layout = BlockLayout(head_size, kv_cache.element_size())
    size = layout.content_bytes // layout.element_size
    check(
        kv_cache, "kv_cache", kv_cache, kv_cache.dtype, (None, None, BLOCK_SIZE, size)
    )
    expect(
        kv_cache.stride(2) == size,
        "kv_cache must hold each (block, head) in one contiguous chunk",
    )
    # The sidecar is read as 32-bit words.
    strides = (
        kv_cache.data_ptr(),
        *(n * layout.element_size for n in kv_cache.stride()),
    )
    expect(
        all(n % 16 == 0 for n in strides[:3]), "kv_cache must be aligned to 16 bytes"
    )
    return layout


def check_heads(t: torch.Tensor, name: str, kv_cache: torch.Tensor, shape) -> None:
    """[num_rows, num_heads, head_size] in the cache's dtype, heads packed."""
    check(t, name, kv_cache, kv_cache.dtype, shape)
    expect(
        t.shape[1] <= 1 or t.stride(1) == t.shape[2],
        f"{name} must be contiguous in its last two dimensions",
    )


def check_rows(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
) -> BlockLayout:
    """The arguments that all attention ops share."""
    expect(query.dim() == 3, "query must have 3 dimensions")
    layout = check_cache(kv_cache, query.shape[2])
    check_heads(query, "query", kv_cache, (None, None, None))
    num_kv_heads = kv_cache.shape[1]
    expect(
        num_kv_heads > 0 and query.shape[1] % num_kv_heads == 0,
        f"query has {query.shape[1]} heads, not a multiple of kv_cache's "
        f"{num_kv_heads}",
    )
    rows = query.shape[0]
    check(block_table, "block_table", kv_cache, torch.int32, (rows, None))
    check(seq_lens, "seq_lens", kv_cache, torch.int32, (rows,))
    return layout


def check_lists(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor | None,
    counts: torch.Tensor | None,
    kept_mass: torch.Tensor | None,
) -> None:
    """Lists of tokens and the probability mass they keep; each may be left out."""
    expect(
        (indices is None) == (counts is None),
        "indices and counts must be given together",
    )
    rows, num_heads, _ = query.shape
    num_kv_heads = kv_cache.shape[1]
    given = [
        (indices, "indices", torch.int32, (rows, num_kv_heads, None)),
        (counts, "counts", torch.int32, (rows, num_kv_heads)),
        (kept_mass, "kept_mass", torch.float32, (rows, num_heads)),
    ]
    for t, name, dtype, shape in given:
        if t is not None:
            check(t, name, kv_cache, dtype, shape)
            expect(t.is_contiguous(), f"{name} must be contiguous")


def check_sinks(
    sinks: torch.Tensor | None, query: torch.Tensor, kept_mass: torch.Tensor | None
) -> None:
    """[num_heads] fp32 logits."""
    if sinks is None:
        return
    check(sinks, "sinks", query, torch.float32, (query.shape[1],))
    expect(
        kept_mass is None,
        "sinks cannot be had with kept_mass: the mean of V leaves them out",
    )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Exact attention over listed tokens or whole contexts, split over the tokens."""

import os

import torch
import triton
import triton.language as tl

from .checks import check_heads, check_lists, check_rows, check_sinks, rows_only
from .common import BLOCK_SIZE, cache_args, capped, chunk_of, kernel, row_chunks
from .merge import merge_kernel
from .splits import SPLITS, share_of, tokens_of

HEADS = tl.constexpr(16)  # rows of a tensor-core tile


@kernel
def attend_kernel(
    query_ptr,  # [num_rows, num_kv_heads * group, HEAD_SIZE]
    block_table_ptr,  # [num_rows, max_blocks] int32
    seq_lens_ptr,  # [num_rows] int32
    indices_ptr,  # [items, max_kept] int32
    counts_ptr,  # [items] int32, -1: the whole context
    partial_ptr,  # [items, group, SPLITS, HEAD_SIZE] fp32, written: weighted sum of V
    top_ptr,  # [items, group, SPLITS] fp32, written: largest logit
    sum_ptr,  # [items, group, SPLITS] fp32, written: sum of exp(logit - top)
    query_stride,
    block_table_stride,
    num_kv_heads,
    group,
    max_blocks,
    max_kept,
    scale,
    soft_cap,
    kv_cache_ptr,
    block_stride,
    head_stride,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the products' operands
):
    """One program per item (row, KV head), split and tile of HEADS query heads."""
    item, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = item // num_kv_heads, item % num_kv_heads
    length, count, listed = tokens_of(
        seq_lens_ptr, counts_ptr, item, row, max_blocks, max_kept, LISTED
    )
    share = share_of(count, TILE)
    first = split * share
    if first >= count:
        return
    end = tl.minimum(first + share, count)
    g = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, WIDTH)
    wide = (d < HEAD_SIZE)[None, :]
    heads = (g < group)[:, None] & wide
    query = query_ptr + row * query_stride + head * group * HEAD_SIZE
    q = tl.load(query + g[:, None] * HEAD_SIZE + d[None, :], mask=heads, other=0.0)
    q = q.to(DOT)

    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, WIDTH], tl.float32)
    for start in range(first, end, TILE):
        t = start + tl.arange(0, TILE)
        inside = t < end
        position = t
        if LISTED:
            entry = indices_ptr + item * max_kept + t
            given = tl.load(entry, mask=t < tl.where(listed, end, 0), other=0)
            given = tl.minimum(tl.maximum(given, 0), length - 1)
            position = tl.where(listed, given, t)
        entry = block_table_ptr + row * block_table_stride + position // BLOCK_SIZE
        block = tl.load(entry, mask=inside, other=0)
        chunk = chunk_of(
            kv_cache_ptr, block, head, block_stride, head_stride, num_blocks
        )
        rows = chunk[:, None] + (position % BLOCK_SIZE)[:, None] * (2 * HEAD_SIZE)
        rows += d[None, :]
        stored = inside[:, None] & wide
        k = tl.load(rows, mask=stored, other=0.0).to(DOT)
        v = tl.load(rows + HEAD_SIZE, mask=stored, other=0.0).to(DOT)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = capped(logits, soft_cap)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        peak = tl.maximum(top, tl.max(logits, 1))
        factor = tl.exp(top - peak)
        weights = tl.exp(logits - peak[:, None])
        total = total * factor + tl.sum(weights, 1)
        acc = acc * factor[:, None]
        acc = tl.dot(weights.to(DOT), v, acc, input_precision="ieee")
        top = peak
    at = (item * group + g) * SPLITS + split
    tl.store(top_ptr + at, top, mask=g < group)
    tl.store(sum_ptr + at, total, mask=g < group)
    tl.store(partial_ptr + at[:, None] * HEAD_SIZE + d[None, :], acc, mask=heads)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operands of products: the model's dtype, but Triton's interpreter multiplies the
    bits of bf16 (triton 3.9, interpreter.py, create_dot)."""
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    return {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }[dtype]


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    indices: torch.Tensor | None,
    counts: torch.Tensor | None,
    kept_mass: torch.Tensor | None,
    scale: float,
    soft_cap: float,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
    kv_format: int = 0,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """See :meth:`vllm_sparse.ops.Ops.attend`; ``workspace`` is not used."""
    rows_only(kv_format)
    lay = check_rows(query, kv_cache, block_table, seq_lens)
    check_lists(query, kv_cache, indices, counts, kept_mass)
    check_heads(out, "out", kv_cache, query.shape)
    check_sinks(sinks, query, kept_mass)
    if lse is not None:
        raise RuntimeError("lse is not written by the Triton kernels")
    num_rows, num_heads, head_size = query.shape
    num_kv_heads, max_blocks = kv_cache.shape[1], block_table.shape[1]
    if num_rows == 0 or max_blocks == 0:
        return
    group = num_heads // num_kv_heads
    listed = indices is not None
    max_kept = indices.shape[2] if listed else 0
    # 64 KiB of shared memory for K and V at most.
    tile = 64 if lay.row_bytes <= 512 else 32
    splits = SPLITS.value

    # Tensors of their own: Triton compiles anew where a pointer is aligned otherwise,
    # which must not happen while a CUDA graph is captured.
    def scratch(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    for rows in row_chunks(num_rows, num_heads * splits * (head_size + 2) * 4):
        lens, table = seq_lens[rows], block_table[rows]
        items = lens.shape[0] * num_kv_heads
        # A pointer is needed where there are no lists; it is not read.
        count = counts[rows] if listed else lens
        partial = scratch(items, group, splits, head_size)
        top, total = (scratch(items, group, splits) for _ in range(2))
        shared = dict(
            num_kv_heads=num_kv_heads,
            group=group,
            max_blocks=max_blocks,
            max_kept=max_kept,
            **cache_args(kv_cache, lay),
            TILE=tile,
            LISTED=listed,
        )
        attend_kernel[items, splits, triton.cdiv(group, HEADS.value)](
            query[rows],
            table,
            lens,
            indices[rows] if listed else lens,
            count,
            partial,
            top,
            total,
            query.stride(0),
            table.stride(0),
            scale=scale,
            soft_cap=soft_cap,
            **shared,
            DOT=dot_dtype(query.dtype),
        )
        merge_kernel[items, group](
            table,
            lens,
            count,
            partial,
            top,
            total,
            lens if kept_mass is None else kept_mass[rows],
            lens if sinks is None else sinks,
            out[rows],
            table.stride(0),
            out.stride(0),
            **shared,
            MEAN=lay.prefix_mean_offset // 2,
            WITH_MASS=kept_mass is not None,
            WITH_SINKS=sinks is not None,
        )

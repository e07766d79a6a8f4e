# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the kernels share: where blocks lie, and how long a row's context is."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ...cache import layout

BLOCK_SIZE = tl.constexpr(layout.BLOCK_SIZE)
CODE_MAX = tl.constexpr(layout.CODE_MAX)
CODE_BITS = tl.constexpr(layout.CODE_BITS)
LANES = tl.constexpr(layout.LANES)
NIBBLES = tl.constexpr(layout.BLOCK_SIZE // layout.LANES)  # of a word of codes
FP16_MAX = tl.constexpr(65504.0)

# Triton compiles a kernel anew where an integer is 1 or divisible by 16; for these
# that is worth nothing.
kernel = triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_rows",
        "num_jobs",
        "num_blocks",
        "num_kv_heads",
        "group",
        "max_blocks",
        "max_kept",
        "rank",
        "local_window",
        "sink_tokens",
        "min_tokens",
        "spans",
    ]
)

# Scratch memory of one launch; more rows are served by several.
WORKSPACE_BYTES = 256 * 1024 * 1024


def cache_args(kv_cache: torch.Tensor, lay: layout.BlockLayout) -> dict[str, Any]:
    """Arguments of every kernel that reads blocks.

    Strides are elements, offsets are counted in what lies there: 32-bit words of codes,
    fp16 numbers of parameters and means.
    """
    return dict(
        kv_cache_ptr=kv_cache,
        block_stride=kv_cache.stride(0),
        head_stride=kv_cache.stride(1),
        num_blocks=kv_cache.shape[0],
        HEAD_SIZE=lay.head_size,
        WIDTH=triton.next_power_of_2(lay.head_size),
    )


def sidecar_args(lay: layout.BlockLayout) -> dict[str, int]:
    return dict(CODES=lay.codes_offset // 4, PARAMS=lay.params_offset // 2)


def row_chunks(num_rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Rows whose scratch memory fits WORKSPACE_BYTES, one row at least."""
    step = max(1, WORKSPACE_BYTES // bytes_per_row)
    for first in range(0, num_rows, step):
        yield slice(first, first + step)


@triton.jit
def chunk_of(kv_cache_ptr, block, head, block_stride, head_stride, num_blocks):
    """First element of a (block, KV head). Ids out of range read block 0."""
    block = tl.where((block >= 0) & (block < num_blocks), block, 0)
    return kv_cache_ptr + block.to(tl.int64) * block_stride + head * head_stride


@triton.jit
def context_length(seq_lens_ptr, row, max_blocks):
    """Tokens of a row, kept within its block table."""
    length = tl.load(seq_lens_ptr + row)
    return tl.minimum(tl.maximum(length, 0), max_blocks * BLOCK_SIZE)


@triton.jit
def capped(x, soft_cap):
    """soft_cap * tanh(x / soft_cap); 0: no cap."""
    if soft_cap > 0:
        # Of exponentials that cannot overflow.
        e = tl.exp(-2.0 * tl.abs(x) / soft_cap)
        magnitude = soft_cap * (1.0 - e) / (1.0 + e)
        x = tl.where(x < 0, -magnitude, magnitude)
    return x

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""States of what has left a window (methods/less.py, whose functions are the meaning).

Nothing waits for the host, so that CUDA graphs may hold it.
"""

import torch
import triton
import triton.language as tl

from ...cache.layout import BLOCK_SIZE as TOKENS
from ...cache.layout import STATE_RANK, BlockLayout
from .common import BLOCK_SIZE, cache_args, chunk_of, kernel

RANK = tl.constexpr(STATE_RANK)
# The least width of a product on tensor cores.
PADDED = tl.constexpr(max(16, STATE_RANK))
# Tokens of a block, and channels of them, at a time.
STEP, CHANNELS = tl.constexpr(16), tl.constexpr(32)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def matrix(ptr, rows, columns, HEIGHT: tl.constexpr, BREADTH: tl.constexpr):
    """[HEIGHT, BREADTH] fp32, zero outside [rows, columns]."""
    i, j = tl.arange(0, HEIGHT)[:, None], tl.arange(0, BREADTH)[None, :]
    return tl.load(ptr + i * columns + j, mask=(i < rows) & (j < columns), other=0.0)


@kernel
def seal_state_kernel(
    block_ids_ptr,  # [num_jobs] int32, negative: nothing to seal
    given_ptr,  # [num_jobs, num_kv_heads, RANK, HEAD_SIZE + 1] fp32, written
    k1_ptr,
    k2_ptr,
    k3_ptr,
    s1_ptr,
    s2_ptr,
    kv_cache_ptr,
    block_stride,
    head_stride,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_WIDTH: tl.constexpr,
):
    """What the tokens of one (job, KV head) give."""
    job, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = tl.load(block_ids_ptr + job)
    if (block <= 0) | (block >= num_blocks):
        return
    chunk = chunk_of(kv_cache_ptr, block, head, block_stride, head_stride, num_blocks)
    k1_ptr += head * HEAD_SIZE * HIDDEN
    k2 = matrix(k2_ptr + head * HIDDEN * RANK, HIDDEN, RANK, HIDDEN_WIDTH, PADDED)
    k3 = matrix(k3_ptr + head * RANK * RANK, RANK, RANK, PADDED, PADDED)
    d, r = tl.arange(0, WIDTH)[None, :], tl.arange(0, PADDED)
    s1 = tl.load(s1_ptr + head * RANK + r, mask=r < RANK, other=0.0)
    s2 = tl.load(s2_ptr + head * RANK + r, mask=r < RANK, other=0.0)
    sums = tl.zeros((PADDED, WIDTH), tl.float32)
    total = tl.zeros((PADDED,), tl.float32)
    # Not all at once: shared memory holds what products take.
    for first in range(0, BLOCK_SIZE, STEP):
        token = first + tl.arange(0, STEP)[:, None]
        row = chunk + token * (2 * HEAD_SIZE)
        x = tl.zeros((STEP, HIDDEN_WIDTH), tl.float32)
        for part in range(0, HEAD_SIZE, CHANNELS):
            c = part + tl.arange(0, CHANNELS)[None, :]
            key = tl.load(row + c, mask=c < HEAD_SIZE, other=0.0).to(tl.float32)
            left = HEAD_SIZE - part
            k1 = matrix(k1_ptr + part * HIDDEN, left, HIDDEN, CHANNELS, HIDDEN_WIDTH)
            x += tl.dot(key, k1, input_precision="ieee")
        u = gelu(tl.dot(gelu(x), k2, input_precision="ieee")) * tl.abs(s1)[None, :]
        psi = tl.abs(u + tl.dot(u, k3, input_precision="ieee") * s2[None, :])
        value = tl.load(row + HEAD_SIZE + d, mask=d < HEAD_SIZE, other=0.0).to(
            tl.float32
        )
        sums += tl.dot(tl.trans(psi), value, input_precision="ieee")
        total += tl.sum(psi, 0)
    to = given_ptr + (job * tl.num_programs(1) + head) * RANK * (HEAD_SIZE + 1)
    place = to + r[:, None] * (HEAD_SIZE + 1) + d
    tl.store(place, sums, mask=(r[:, None] < RANK) & (d < HEAD_SIZE))
    tl.store(to + r * (HEAD_SIZE + 1) + HEAD_SIZE, total, mask=r < RANK)


@triton.jit
def state_ptr(chunk, HEAD_SIZE: tl.constexpr, STATE: tl.constexpr):
    """First number of a chunk's state."""
    return chunk.to(tl.pointer_type(tl.float32), bitcast=True) + STATE


@kernel
def chain_states_kernel(
    block_ids_ptr,  # [num_jobs] int32, in the order of their place in the context
    prev_block_ids_ptr,  # [num_jobs] int32
    block_index_ptr,  # [num_jobs] int32
    given_ptr,
    num_jobs,
    sink_blocks,
    kv_cache_ptr,
    block_stride,
    head_stride,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE: tl.constexpr,
    ROOM: tl.constexpr,
):
    """One program per KV head walks the jobs: a block's state needs the one before."""
    head = tl.program_id(0)
    i = tl.arange(0, ROOM)
    for job in range(num_jobs):
        block = tl.load(block_ids_ptr + job)
        prev = tl.load(prev_block_ids_ptr + job)
        index = tl.load(block_index_ptr + job)
        sealed = (block > 0) & (block < num_blocks)
        gives = sealed & (index >= sink_blocks)
        chained = sealed & (prev > 0) & (prev < num_blocks)
        size = RANK * (HEAD_SIZE + 1)
        place = (tl.cast(job, tl.int64) * tl.num_programs(0) + head) * size
        # Widths and no scalar masks: triton 3.9's interpreter widens those to int32.
        given = tl.load(
            given_ptr + place + i, mask=i < tl.where(gives, size, 0), other=0.0
        )
        before = chunk_of(
            kv_cache_ptr, prev, head, block_stride, head_stride, num_blocks
        )
        known = i < tl.where(chained, size, 0)
        state = tl.load(state_ptr(before, HEAD_SIZE, STATE) + i, mask=known, other=0.0)
        chunk = chunk_of(
            kv_cache_ptr, block, head, block_stride, head_stride, num_blocks
        )
        valid = i < tl.where(sealed, size, 0)
        tl.store(state_ptr(chunk, HEAD_SIZE, STATE) + i, state + given, mask=valid)
        # Another thread may read it for the next job.
        tl.debug_barrier()


@kernel
def add_state_kernel(
    query_ptr,  # [num_rows, num_heads, HEAD_SIZE]
    out_ptr,  # likewise, the exact part's result, changed
    query_stride,
    out_stride,
    lse_ptr,  # [num_rows, num_heads] fp32
    skipped_ptr,  # [num_rows] int32 blocks that have left
    block_table_ptr,
    table_stride,
    q1_ptr,
    q2_ptr,
    sink_blocks,
    group,
    least,
    kv_cache_ptr,
    block_stride,
    head_stride,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_WIDTH: tl.constexpr,
):
    """One (row, query head)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    skipped = tl.load(skipped_ptr + row)
    if skipped <= 0:
        return
    last = sink_blocks + skipped - 1
    block = tl.load(block_table_ptr + row * table_stride + last)
    chunk = chunk_of(
        kv_cache_ptr, block, head // group, block_stride, head_stride, num_blocks
    )
    d, r = tl.arange(0, WIDTH), tl.arange(0, PADDED)
    query = tl.load(
        query_ptr + row * query_stride + head * HEAD_SIZE + d,
        mask=d < HEAD_SIZE,
        other=0.0,
    ).to(tl.float32)
    q1 = matrix(
        q1_ptr + head * HEAD_SIZE * HIDDEN, HEAD_SIZE, HIDDEN, WIDTH, HIDDEN_WIDTH
    )
    q2 = matrix(q2_ptr + head * HIDDEN * RANK, HIDDEN, RANK, HIDDEN_WIDTH, PADDED)
    x = gelu(tl.sum(query[:, None] * q1, 0))
    phi = tl.abs(gelu(tl.sum(x[:, None] * q2, 0)))
    state = state_ptr(chunk, HEAD_SIZE, STATE)
    place = state + r[:, None] * (HEAD_SIZE + 1) + d[None, :]
    valid = (r[:, None] < RANK) & (d[None, :] < HEAD_SIZE)
    sums = tl.sum(phi[:, None] * tl.load(place, mask=valid, other=0.0), 0)
    z = tl.load(state + r * (HEAD_SIZE + 1) + HEAD_SIZE, mask=r < RANK, other=0.0)
    low = tl.log(tl.maximum(tl.sum(phi * z, 0), least))
    lse = tl.load(lse_ptr + row * tl.num_programs(1) + head)
    top = tl.maximum(lse, low)
    total = top + tl.log(tl.exp(lse - top) + tl.exp(low - top))
    to = out_ptr + row * out_stride + head * HEAD_SIZE + d
    exact = tl.load(to, mask=d < HEAD_SIZE, other=0.0).to(tl.float32)
    merged = exact * tl.exp(lse - total) + sums * tl.exp(-total)
    tl.store(to, merged.to(to.dtype.element_ty), mask=d < HEAD_SIZE)


def _sizes(lay: BlockLayout, hidden: int) -> dict[str, int]:
    return dict(HIDDEN=hidden, HIDDEN_WIDTH=max(16, triton.next_power_of_2(hidden)))


def _state_offset(lay: BlockLayout) -> int:
    """Of a chunk's state, in numbers of 32 bits."""
    return TOKENS * lay.row_bytes // 4


def seal_states(
    kv_cache: torch.Tensor, kernels, jobs, sink_blocks: int, lay: BlockLayout
) -> None:
    """Write the states of filled blocks.

    Args:
        kernels: the layer's :class:`vllm_sparse.methods.less.Kernels`.
        jobs: block, block before and place in the context, as ``find_jobs`` makes them.
    """
    (num_jobs,), num_kv_heads = jobs[0].shape, kv_cache.shape[1]
    size = STATE_RANK * (lay.head_size + 1)
    given = torch.empty(
        num_jobs, num_kv_heads, size, dtype=torch.float32, device=kv_cache.device
    )
    parts = (kernels.k1, kernels.k2, kernels.k3, kernels.s1, kernels.s2)
    seal_state_kernel[num_jobs, num_kv_heads](
        jobs[0],
        given,
        *parts,
        **cache_args(kv_cache, lay),
        **_sizes(lay, kernels.k1.shape[-1]),
    )
    chain_states_kernel[(num_kv_heads,)](
        *jobs,
        given,
        num_jobs,
        sink_blocks,
        **cache_args(kv_cache, lay),
        STATE=_state_offset(lay),
        ROOM=triton.next_power_of_2(size),
    )


def add_states(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    skipped: torch.Tensor,
    block_table: torch.Tensor,
    kv_cache: torch.Tensor,
    kernels,
    sink_blocks: int,
    least: float,
    lay: BlockLayout,
) -> None:
    """Merge ``out``, exact attention, with what the states say of blocks that left.

    Args:
        query, out: [num_rows, num_heads, head_size]; ``out`` is changed.
        lse: [num_rows, num_heads] fp32, the exact part's.
        skipped: [num_rows] int32.
        block_table: [num_rows, max_blocks] int32, of whole contexts.
    """
    num_rows, num_heads, _ = query.shape
    add_state_kernel[num_rows, num_heads](
        query,
        out,
        query.stride(0),
        out.stride(0),
        lse,
        skipped,
        block_table,
        block_table.stride(0),
        kernels.q1,
        kernels.q2,
        sink_blocks,
        num_heads // kv_cache.shape[1],
        least,
        **cache_args(kv_cache, lay),
        STATE=_state_offset(lay),
        **_sizes(lay, kernels.q1.shape[-1]),
    )

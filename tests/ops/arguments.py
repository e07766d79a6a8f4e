# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Good arguments of every op, small ones."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import torch

from vllm_sparse import ops
from vllm_sparse.testing.generate import PagedContext, paged_context

SEQ_LENS = [300, 131]
ROWS, HEADS, KV_HEADS, SIZE, ROOM = 2, 6, 3, 64, 80
TOKENS = sum(SEQ_LENS)


def context() -> PagedContext:
    """A stored and sealed batch that the caller may change."""
    return deepcopy(_context())


@cache
def _context() -> PagedContext:
    generator = torch.Generator().manual_seed(0)
    ctx = paged_context(SEQ_LENS, KV_HEADS, SIZE, torch.float32, generator)
    for row in range(ROWS):
        ops.store_kv(ctx.keys[row], ctx.values[row], ctx.kv_cache, ctx.slots(row))
    ops.seal_blocks(ctx.kv_cache, *ctx.seal_jobs(), SIZE)
    return ctx


def store_kv_arguments():
    ctx = context()
    return dict(
        key=ctx.keys[0],
        value=ctx.values[0],
        kv_cache=ctx.kv_cache,
        slot_mapping=ctx.slots(0),
    )


def seal_blocks_arguments():
    ctx = context()
    block, prev, index = ctx.seal_jobs()
    return dict(
        kv_cache=ctx.kv_cache,
        block_ids=block,
        prev_block_ids=prev,
        block_index=index,
        head_size=SIZE,
    )


def gather_kv_arguments():
    ctx = context()
    return dict(
        kv_cache=ctx.kv_cache,
        block_table=ctx.block_table,
        seq_lens=ctx.seq_lens,
        out_start=torch.tensor([0, 300]),
        key=torch.zeros(TOKENS, KV_HEADS, SIZE),
        value=torch.zeros(TOKENS, KV_HEADS, SIZE),
    )


def batch():
    ctx = context()
    return dict(
        query=torch.ones(ROWS, HEADS, SIZE),
        kv_cache=ctx.kv_cache,
        block_table=ctx.block_table,
        seq_lens=ctx.seq_lens,
    )


def lists():
    return dict(
        indices=torch.zeros(ROWS, KV_HEADS, ROOM, dtype=torch.int32),
        counts=torch.ones(ROWS, KV_HEADS, dtype=torch.int32),
        kept_mass=torch.ones(ROWS, HEADS),
    )


def sparq_select_arguments():
    return dict(
        **batch(),
        budgets=torch.tensor([70, 40], dtype=torch.int32),
        rank=16,
        local_window=16,
        sink_tokens=4,
        scale=0.125,
        soft_cap=0.0,
        **lists(),
    )


def sparq_attend_arguments():
    return sparq_select_arguments() | dict(
        out=torch.zeros(ROWS, HEADS, SIZE),
        tokens_read=torch.zeros(1, dtype=torch.int64),
    )


def attend_arguments():
    return dict(
        **batch(),
        **lists(),
        scale=0.125,
        soft_cap=0.0,
        out=torch.zeros(ROWS, HEADS, SIZE),
        tokens_read=torch.zeros(1, dtype=torch.int64),
    )


ARGUMENTS: dict[str, Callable[[], dict]] = {
    "store_kv": store_kv_arguments,
    "seal_blocks": seal_blocks_arguments,
    "gather_kv": gather_kv_arguments,
    "sparq_select": sparq_select_arguments,
    "sparq_attend": sparq_attend_arguments,
    "attend": attend_arguments,
}
TENSORS = [
    (op, name)
    for op, make in ARGUMENTS.items()
    for name, value in make().items()
    if isinstance(value, torch.Tensor)
]


def call(op: str, **changes) -> None:
    getattr(ops, op)(**ARGUMENTS[op]() | changes)

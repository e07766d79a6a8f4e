# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Good arguments of every op, small ones."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import torch

from vllm_sparse import ops

from .generate import PagedContext
from .inputs import filled, sparq_options

SEQ_LENS = [300, 131]
ROWS, HEADS, KV_HEADS, SIZE, ROOM = 2, 6, 3, 64, 80
TOKENS = sum(SEQ_LENS)


def context() -> PagedContext:
    """A stored and sealed batch that the caller may change."""
    return deepcopy(_context())


@cache
def _context() -> PagedContext:
    return filled(SEQ_LENS, KV_HEADS, SIZE, torch.float32)


def store_arguments():
    ctx = context()
    return dict(kv_cache=ctx.kv_cache, **ctx.new_tokens())


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


def rows_and_lists():
    ctx = context()
    return dict(
        query=torch.ones(ROWS, HEADS, SIZE),
        kv_cache=ctx.kv_cache,
        block_table=ctx.block_table,
        seq_lens=ctx.seq_lens,
        indices=torch.zeros(ROWS, KV_HEADS, ROOM, dtype=torch.int32),
        counts=torch.ones(ROWS, KV_HEADS, dtype=torch.int32),
        kept_mass=torch.ones(ROWS, HEADS),
        out=torch.zeros(ROWS, HEADS, SIZE),
    )


def sparq_attend_arguments():
    budgets = torch.tensor([70, 40], dtype=torch.int32)
    return rows_and_lists() | dict(budgets=budgets, options=sparq_options(16, 0.125))


def attend_arguments():
    return rows_and_lists() | dict(scale=0.125)


ARGUMENTS: dict[str, Callable[[], dict]] = {
    "store": store_arguments,
    "gather_kv": gather_kv_arguments,
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


def refused(op: str, **changes) -> str:
    with pytest.raises(RuntimeError) as error:
        call(op, **changes)
    return str(error.value)

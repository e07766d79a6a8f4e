# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The ops as PyTorch sees them: schemas, fake tensors, torch.compile."""

import pytest
import torch

from vllm_sparse.cache.formats import resolve_format
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout
from vllm_sparse.ops.library import load
from vllm_sparse.testing.generate import PagedContext, paged_context

SEQ_LENS = [300, 131]
HEADS, KV_HEADS, SIZE = 6, 3, 64
ROOM = 80
OPS = [
    "store_kv",
    "seal_blocks",
    "seal_rows",
    "store_rows",
    "store_quantised",
    "gather_kv",
    "sparq_select",
    "sparq_attend",
    "attend",
]


def context(dtype=torch.float32) -> PagedContext:
    """A stored and sealed batch; unused memory is zero, as opcheck compares it."""
    lib = load()
    generator = torch.Generator().manual_seed(0)
    ctx = paged_context(SEQ_LENS, KV_HEADS, SIZE, dtype, generator)
    ctx.kv_cache.zero_()
    for row in range(len(SEQ_LENS)):
        lib.store_kv(ctx.keys[row], ctx.values[row], ctx.kv_cache, ctx.slots(row))
    lib.seal_blocks(ctx.kv_cache, *ctx.seal_jobs(), SIZE)
    return ctx


def arguments(op: str, optional: bool = True) -> tuple:
    """Positional arguments of an op, in the order of its schema."""
    ctx = context()
    rows, tokens = len(SEQ_LENS), sum(SEQ_LENS)
    query = torch.randn(rows, HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    where = (ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    indices = torch.arange(ROOM, dtype=torch.int32).expand(rows, KV_HEADS, ROOM)
    lists = (indices.contiguous(), torch.full((rows, KV_HEADS), 70).int())
    mass = torch.full((rows, HEADS), 0.5) if optional else None
    budgets = torch.tensor([70, 60], dtype=torch.int32)
    if op == "store_kv":
        return ctx.keys[1] + 1, ctx.values[1], ctx.kv_cache, ctx.slots(1)
    if op == "seal_blocks":
        return ctx.kv_cache, *ctx.seal_jobs(), SIZE
    if op == "seal_rows":
        starts = torch.tensor([0, 50, 51], dtype=torch.int32)
        return *where, starts, SIZE
    if op == "store_rows":
        new = (t[-1:].expand(rows, -1, -1) + 1 for t in (ctx.keys[0], ctx.values[0]))
        slots = torch.tensor([int(ctx.slots(row)[-1]) for row in range(rows)])
        return *new, ctx.kv_cache, slots, ctx.block_table, ctx.seq_lens
    if op == "store_quantised":
        fmt = resolve_format("int4", None, SIZE)
        ctx = paged_context(
            [300, 5], KV_HEADS, SIZE, torch.float32, torch.Generator(), fmt=fmt
        )
        ctx.kv_cache.zero_()
        new = (torch.cat(ctx.keys), torch.cat(ctx.values), ctx.kv_cache)
        starts = torch.tensor([0, 300, 305], dtype=torch.int32)
        return *new, ctx.block_table, ctx.seq_lens, starts, fmt.code
    if op == "gather_kv":
        out = (torch.zeros(tokens, KV_HEADS, SIZE) for _ in range(2))
        return *where, torch.tensor([0, 300]), *out
    if op == "sparq_select":
        return query, *where, budgets, 16, 16, 4, 0.125, 0.0, 1.0, 0, *lists, mass
    read = torch.zeros(1, dtype=torch.int64) if optional else None
    if op == "sparq_attend":
        chosen = (*lists, mass, torch.zeros_like(query), read)
        return query, *where, budgets, 16, 16, 4, 0.125, 0.0, 0.9, 20, *chosen
    chosen = (*lists, mass) if optional else (None, None, None)
    return query, *where, *chosen, 0.125, 0.0, torch.zeros_like(query), read


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    torch.library.opcheck(getattr(load(), op).default, arguments(op))


@pytest.mark.parametrize("op", ["sparq_select", "sparq_attend", "attend"])
def test_opcheck_without_optional_tensors(op):
    torch.library.opcheck(getattr(load(), op).default, arguments(op, optional=False))


def test_every_op_of_the_library_is_checked():
    names = {
        name.removeprefix("vllm_sparse::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if load() and name.startswith("vllm_sparse::")
    }
    assert names == {*OPS, "cpu_isa", "workspace_bytes"}


def decode_step(key, value, kv_cache, slots, jobs, query, table, lens, budgets):
    """Store, seal, select, attend: what one layer does in a step."""
    lib = torch.ops.vllm_sparse
    lib.store_kv(key, value, kv_cache, slots)
    lib.seal_blocks(kv_cache, *jobs, SIZE)
    rows = query.shape[0]
    indices = torch.full((rows, KV_HEADS, ROOM), -1, dtype=torch.int32)
    counts = torch.zeros(rows, KV_HEADS, dtype=torch.int32)
    mass = torch.zeros(rows, HEADS)
    lib.sparq_select(
        query * 2,
        kv_cache,
        table,
        lens,
        budgets,
        16,
        16,
        4,
        0.125,
        0.0,
        1.0,
        0,
        indices,
        counts,
        mass,
    )
    out = torch.empty_like(query)
    read = torch.zeros(1, dtype=torch.int64)
    lib.attend(
        query * 2,
        kv_cache,
        table,
        lens,
        indices,
        counts,
        mass,
        0.125,
        0.0,
        out,
        read,
    )
    return out + 1, counts, read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_step_equals_the_eager_one(dtype):
    ctx = context(dtype)
    content = BlockLayout(SIZE, dtype.itemsize).content_bytes // dtype.itemsize
    assert ctx.kv_cache.shape[1:] == (KV_HEADS, BLOCK_SIZE, content)
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(len(SEQ_LENS), HEADS, SIZE, generator=generator).to(dtype)
    key = torch.randn(ctx.keys[0].shape, generator=generator).to(dtype)
    budgets = torch.tensor([70, 60], dtype=torch.int32)
    compiled = torch.compile(decode_step, fullgraph=True)
    results = []
    for step in (decode_step, compiled):
        cache = ctx.kv_cache.clone()
        rest = (query, ctx.block_table, ctx.seq_lens, budgets)
        out = step(key, ctx.values[0], cache, ctx.slots(0), ctx.seal_jobs(), *rest)
        results.append((*out, cache.view(torch.uint8)))
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)
    # The step did something: rows written, blocks sealed anew, tokens counted.
    assert not torch.equal(results[0][3], ctx.kv_cache.view(torch.uint8))
    assert int(results[0][2]) == KV_HEADS * (70 + 60)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The ops as PyTorch sees them: schemas, fake tensors, torch.compile."""

import pytest
import torch

from vllm_sparse.cache.formats import ROWS, KvFormat, resolve_format
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout
from vllm_sparse.ops.library import load

from .generate import PagedContext, paged_context
from .inputs import generator, sparq_options

SEQ_LENS = [300, 131]
HEADS, KV_HEADS, SIZE = 6, 3, 64
ROOM = 80
OPS = ["store", "gather_kv", "sparq_attend", "attend"]
OPTIONS = sparq_options(16, 0.125, top_p=0.9, min_tokens=20)
INT4 = resolve_format("int4", None, SIZE)


def context(dtype=torch.float32, fmt: KvFormat = ROWS) -> PagedContext:
    """A stored and sealed batch; unused memory is zero, as opcheck compares it."""
    ctx = paged_context(SEQ_LENS, KV_HEADS, SIZE, dtype, generator(), fmt=fmt)
    ctx.kv_cache.zero_()
    load().store(**stored(ctx), kv_format=fmt.code)
    return ctx


def stored(ctx: PagedContext) -> dict[str, torch.Tensor]:
    return dict(kv_cache=ctx.kv_cache, **ctx.new_tokens())


def arguments(op: str, optional: bool = True, fmt: KvFormat = ROWS) -> dict:
    """As its schema names them."""
    ctx = context(fmt=fmt)
    if op == "store":
        step = stored(ctx)
        return step | dict(key=step["key"] + 1, kv_format=fmt.code)
    rows, tokens = len(SEQ_LENS), sum(SEQ_LENS)
    where = dict(
        kv_cache=ctx.kv_cache, block_table=ctx.block_table, seq_lens=ctx.seq_lens
    )
    if op == "gather_kv":
        key, value = (torch.zeros(tokens, KV_HEADS, SIZE) for _ in range(2))
        return where | dict(out_start=torch.tensor([0, 300]), key=key, value=value)
    query = torch.randn(rows, HEADS, SIZE, generator=generator(1))
    indices = torch.arange(ROOM, dtype=torch.int32).expand(rows, KV_HEADS, ROOM)
    lists = dict(
        indices=indices.contiguous(), counts=torch.full((rows, KV_HEADS), 70).int()
    )
    given = dict(query=query, **where, out=torch.zeros_like(query))
    given["kept_mass"] = torch.full((rows, HEADS), 0.5) if optional else None
    if op == "attend":
        absent = lists if optional else dict(indices=None, counts=None)
        return given | absent | dict(scale=0.125, soft_cap=0.0)
    if not optional:
        given["out"] = None
    budgets = torch.tensor([70, 60], dtype=torch.int32)
    options = dict(sizes=OPTIONS.sizes, numbers=OPTIONS.numbers)
    return given | lists | dict(budgets=budgets) | options


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    torch.library.opcheck(getattr(load(), op).default, (), arguments(op))


@pytest.mark.parametrize("op", ["sparq_attend", "attend"])
def test_opcheck_without_optional_tensors(op):
    given = arguments(op, optional=False)
    torch.library.opcheck(getattr(load(), op).default, (), given)


def test_opcheck_of_a_quantised_store():
    torch.library.opcheck(load().store.default, (), arguments("store", fmt=INT4))


def test_every_op_of_the_library_is_checked():
    names = {
        name.removeprefix("vllm_sparse::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if load() and name.startswith("vllm_sparse::")
    }
    assert names == {*OPS, "cpu_isa", "workspace_bytes"}


def decode_step(step, query, budgets):
    """Store, seal, select, attend: what one layer does in a step."""
    lib = torch.ops.vllm_sparse
    lib.store(**step)
    where = (step["kv_cache"], step["block_table"], step["seq_lens"])
    rows = query.shape[0]
    indices = torch.full((rows, KV_HEADS, ROOM), -1, dtype=torch.int32)
    counts = torch.zeros(rows, KV_HEADS, dtype=torch.int32)
    lists = (indices, counts, torch.zeros(rows, HEADS))
    options = (OPTIONS.sizes, [0.125, 0.0, 1.0])
    lib.sparq_attend(query * 2, *where, budgets, *options, *lists, None)
    out = torch.empty_like(query)
    lib.attend(query * 2, *where, *lists, 0.125, 0.0, out)
    return out + 1, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_step_equals_the_eager_one(dtype):
    ctx = context(dtype)
    content = BlockLayout(SIZE, dtype.itemsize).content_bytes // dtype.itemsize
    assert ctx.kv_cache.shape[1:] == (KV_HEADS, BLOCK_SIZE, content)
    shape = (len(SEQ_LENS), HEADS, SIZE)
    query = torch.randn(shape, generator=generator(2)).to(dtype)
    budgets = torch.tensor([70, 60], dtype=torch.int32)
    new = stored(ctx)
    new["key"] = torch.randn(new["key"].shape, generator=generator(3)).to(dtype)
    results = []
    for run in (decode_step, torch.compile(decode_step, fullgraph=True)):
        cache = ctx.kv_cache.clone()
        out = run(new | dict(kv_cache=cache), query, budgets)
        results.append((*out, cache.view(torch.uint8)))
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)
    # The step did something: rows written, blocks sealed anew, tokens chosen.
    assert not torch.equal(results[0][2], ctx.kv_cache.view(torch.uint8))
    assert results[0][1].tolist() == [[70] * KV_HEADS, [60] * KV_HEADS]

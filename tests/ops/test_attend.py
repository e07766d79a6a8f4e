# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Attention and gathering, against the reference; both steps of SparQ in one op."""

from dataclasses import replace

import pytest
import torch

from vllm_sparse.cache.formats import BARE, resolve_format
from vllm_sparse.cache.layout import BlockLayout, state_bytes
from vllm_sparse.ops import reference

from .compare import assert_close
from .inputs import (
    BF16,
    CONTEXTS,
    F16,
    F32,
    GPU,
    INPUTS,
    INTERPRETED,
    QUANTISED,
    Kernels,
    attend,
    attend_as_reference,
    filled,
    generator,
    list_buffers,
    random_query,
    select,
    sparq_options,
)

LENS, BUDGETS = [n for n, _ in CONTEXTS], [budget for _, budget in CONTEXTS]
SHORT = [1, 127, 128, 129, 256, 400]
NOTHING = dict(indices=None, counts=None, kept_mass=None)
OPTIONS = sparq_options(24, 0.2)


def random_lists(ctx, num_heads, counts, with_mass):
    """Of random tokens; beyond its end, a list names no token."""
    lists = list_buffers(ctx, num_heads, max(counts) + 3, with_mass)
    lists["indices"].fill_(10**9)
    for row, (length, count) in enumerate(zip(ctx.seq_lens.tolist(), counts)):
        lists["counts"][row] = count
        for head in range(ctx.kv_cache.shape[1]):
            order = torch.randperm(length, generator=generator(head))[: max(count, 0)]
            lists["indices"][row, head, : len(order)] = order.sort().values.int()
    if with_mass:
        shape = lists["kept_mass"].shape
        lists["kept_mass"] = torch.rand(shape, generator=generator(3))
    return lists


@pytest.mark.parametrize(
    ("listed", "with_mass", "soft_cap"),
    [(False, False, 0.0), (True, False, 20.0), (True, True, 0.0)],
    ids=["whole", "lists", "mean-value"],
)
@pytest.mark.parametrize(("shape", "dtype"), INPUTS, ids=str)
def test_rows(kernels, shape, dtype, listed, with_mass, soft_cap):
    kernels.skip_unless_served(dtype)
    num_heads, num_kv_heads, head_size = shape
    ctx = filled(LENS, num_kv_heads, head_size, dtype, heads_apart=True)
    query = random_query(ctx, num_heads, dtype)
    counts = [min(n // 2, count) or -1 for n, count in CONTEXTS]
    lists = random_lists(ctx, num_heads, counts, with_mass) if listed else NOTHING
    options = dict(scale=head_size**-0.5, soft_cap=soft_cap)
    attend_as_reference(kernels, ctx, query, lists, **options)


@pytest.mark.skipif(INTERPRETED, reason="quantised formats have no Triton kernels")
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize(("shape", "dtype"), INPUTS, ids=str)
def test_codes_and_tails(kernels, shape, dtype, name, top_p):
    """The whole context, chosen tokens, and both steps in one op."""
    num_heads, num_kv_heads, head_size = shape
    fmt = resolve_format(name, None, head_size)
    kernels.skip_unless_served(dtype, fmt)
    ctx = filled(SHORT, num_kv_heads, head_size, dtype, fmt)
    query = random_query(ctx, num_heads, dtype)
    options = sparq_options(head_size // 4, head_size**-0.5, top_p=top_p, min_tokens=20)
    given = (kernels, ctx, query, [-1, 60, 60, 40, 150, 150], options)
    chosen, out = select(*given, fmt=fmt), torch.empty_like(query)
    select(*given, out=out, fmt=fmt)
    scale = dict(scale=options.scale, fmt=fmt)
    attend_as_reference(kernels, ctx, query, NOTHING, **scale)
    got = attend_as_reference(kernels, ctx, query, chosen, **scale)
    assert torch.equal(out, got)


def random_sinks(num_heads: int) -> torch.Tensor:
    """Some without weight, some with nearly all of it."""
    sinks = torch.randn(num_heads, generator=generator(5)) * 4
    sinks[0], sinks[-1] = -1e4, 30.0
    return sinks


# The interpreter is slow: both at once there.
CASES = [(0.9, 20.0)] if INTERPRETED else [(1.0, 0.0), (0.9, 0.0), (1.0, 20.0)]


@pytest.mark.parametrize("name", ["auto"] if INTERPRETED else ["auto", *QUANTISED])
@pytest.mark.parametrize(("top_p", "soft_cap"), CASES)
@pytest.mark.parametrize(("shape", "dtype"), INPUTS, ids=str)
def test_sinks_join_the_softmax(kernels, shape, dtype, top_p, soft_cap, name):
    """Of whole contexts, of lists, and where both steps are one op."""
    num_heads, num_kv_heads, head_size = shape
    fmt = resolve_format(name, None, head_size)
    kernels.skip_unless_served(dtype, fmt)
    ctx = filled([*SHORT, 1500], num_kv_heads, head_size, dtype, fmt)
    query, scale = random_query(ctx, num_heads, dtype), head_size**-0.5
    given = dict(scale=scale, soft_cap=soft_cap, fmt=fmt)
    given["sinks"] = random_sinks(num_heads)
    attend_as_reference(kernels, ctx, query, NOTHING, **given)
    budgets = [-1, 60, 60, 60, 90, 150, 200]
    changes = dict(soft_cap=soft_cap, top_p=top_p, min_tokens=20)
    options = sparq_options(head_size // 4, scale, **changes)
    out = torch.full_like(query, torch.nan)
    where = (kernels, ctx, query, budgets, options, False)
    lists = select(*where, out=out, fmt=fmt, sinks=given["sinks"])
    assert_close(out, attend(reference, ctx, query, lists, **given))
    attend_as_reference(kernels, ctx, query, lists, **given)
    both, twin = torch.empty_like(query), (reference, *where[1:])
    chosen = select(*twin, out=both, fmt=fmt, sinks=given["sinks"])
    assert_close(both, attend(reference, ctx, query, chosen, **given))
    # A sink takes weight from every value, and changes no choice.
    without = dict(given, sinks=None)
    assert not torch.allclose(out, attend(kernels, ctx, query, lists, **without))
    if kernels.name != "cuda":  # where blocks of threads share work, ties may differ
        for key, kept in select(*where, fmt=fmt).items():
            assert kept is None or torch.equal(kept, lists[key])


@pytest.mark.skipif(INTERPRETED, reason="quantised formats have no Triton kernels")
def test_an_attention_cap_and_long_contexts_of_codes(kernels):
    """More than one split of 256 tokens, lists that begin inside a block."""
    fmt = resolve_format("int4", None, 64)
    kernels.skip_unless_served(F16, fmt)
    ctx = filled([1500], 2, 64, F16, fmt)
    query = random_query(ctx, 4, F16)
    picked = torch.arange(0, 1500, 3).int()
    lists = dict(
        indices=picked.expand(1, 2, -1).contiguous(),
        counts=torch.full((1, 2), len(picked), dtype=torch.int32),
        kept_mass=None,
    )
    # A GPU's hyperbolic tangent and products are as exact as fp16.
    scale, cap = (0.125, 20.0) if kernels.name == "cuda" else (0.3, 5.0)
    options = dict(scale=scale, soft_cap=cap, fmt=fmt)
    attend_as_reference(kernels, ctx, query, lists, **options)


@pytest.mark.parametrize("name", ["auto"] if INTERPRETED else ["auto", "int4", "k8v4"])
def test_rows_of_one_request(kernels, name):
    """Drafts under verification: ends of one context, beside another's."""
    fmt, dtype = resolve_format(name, None, 64), F16
    kernels.skip_unless_served(dtype, fmt)
    ctx = filled([600, 300], 2, 64, dtype, fmt)
    ctx.block_table = ctx.block_table[[0, 0, 0, 1, 1]]
    ctx.seq_lens = torch.tensor([598, 599, 600, 299, 300], dtype=torch.int32)
    ctx.keys = [ctx.keys[0]] * 3 + [ctx.keys[1]] * 2
    if fmt.quantised:  # a context that ends earlier reads the same blocks
        ctx.seq_lens[3] = 300
    query = random_query(ctx, 6, dtype)
    attend_as_reference(kernels, ctx, query, NOTHING, scale=0.125, fmt=fmt)


@pytest.mark.parametrize("name", ["auto"] if INTERPRETED else ["auto", *QUANTISED])
@pytest.mark.parametrize(("shape", "dtype"), INPUTS[:5], ids=str)
def test_gather(kernels, shape, dtype, name):
    """Rows as they are; of codes also the last block, if it is full."""
    fmt = resolve_format(name, None, shape[2])
    kernels.skip_unless_served(dtype, fmt)
    ctx = filled(SHORT, shape[1], shape[2], dtype, fmt)
    starts = torch.tensor([0] + [n + 1 for n in SHORT[:-1]]).cumsum(0)
    size = (int(starts[-1]) + SHORT[-1], shape[1], shape[2])
    got, want = ([torch.full(size, torch.nan).to(dtype) for _ in "kv"] for _ in "12")
    where = (ctx.kv_cache, ctx.block_table, ctx.seq_lens, starts)
    kernels.gather_kv(*where, *got, fmt)
    reference.gather_kv(*where, *want, fmt)
    for g, w in zip(got, want):
        assert torch.equal(g.isnan(), w.isnan())
        if fmt.quantised:
            assert_close(g.nan_to_num(), w.nan_to_num())
        else:
            assert torch.equal(g.nan_to_num(), w.nan_to_num())


@pytest.mark.parametrize("rows", [[-1], list(range(len(LENS)))], ids=["one", "all"])
@pytest.mark.parametrize("with_mass", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_both_steps_in_one_op_equal_the_two(kernels, dtype, with_mass, rows):
    """One row is cut up between threads, several are handled whole."""
    kernels.skip_unless_served(dtype)
    ctx = filled([LENS[row] for row in rows], 3, 64, dtype)
    query, out = random_query(ctx, 9, dtype), torch.full((len(rows), 9, 64), torch.nan)
    given = (kernels, ctx, query, [BUDGETS[row] for row in rows], OPTIONS, with_mass)
    out = out.to(dtype)
    apart, together = select(*given), select(*given, out=out)
    if kernels.name == "cuda" and not with_mass:
        # May be another kernel, with other sums: it has to agree with itself.
        return assert_close(out, attend(kernels, ctx, query, together, scale=0.2))
    assert torch.equal(out, attend(kernels, ctx, query, apart, scale=0.2))
    for name, t in apart.items():
        assert t is None or torch.equal(t, together[name])


@pytest.mark.parametrize("with_mass", [False, True])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=GPU) for n in ("triton", "cuda")]
)
def test_a_graph_replays_a_step(name, with_mass):
    """Storing what fills a block, choosing and attending."""
    kernels = Kernels(name)
    ctx = filled([700, 384], 2, 64, BF16)
    step = ctx.new_tokens([699, 383])
    lists = list_buffers(ctx, 6, 400, with_mass)
    query = random_query(ctx, 6, BF16)
    where = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    *where, budgets = (
        t.to(kernels.device) for t in (*where, torch.tensor([200, 90]).int())
    )
    step = {name: t.to(kernels.device) for name, t in step.items()}
    lists = {n: t if t is None else t.to(kernels.device) for n, t in lists.items()}
    out, cache = torch.empty_like(where[0]), where[1]

    def run():
        kernels.ops.store(kv_cache=cache, **step)
        kernels.ops.sparq_attend(*where, budgets, OPTIONS, **lists, out=out)

    results = [cache, out, *(t for t in lists.values() if t is not None)]
    run()
    eager = [t.clone() for t in results]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for t in results[1:]:
        t.fill_(-7)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(results, eager):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_results_do_not_depend_on_the_batch(kernels):
    if kernels.name == "cuda":
        pytest.skip("thread blocks of a row depend on the batch (docs/performance.md)")
    ctx = filled([3000, 150, 2048, 777][INTERPRETED * 2 :], 3, 64, F32)
    query, lists = random_query(ctx, 9, F32), list_buffers(ctx, 9, 400)

    def run(rows: slice) -> torch.Tensor:
        out = torch.full_like(query[rows], torch.nan)
        where = (query[rows], ctx.kv_cache, ctx.block_table[rows], ctx.seq_lens[rows])
        budgets = torch.full((len(out),), 256, dtype=torch.int32)
        part = {name: t[rows].contiguous() for name, t in lists.items()}
        kernels.sparq_attend(*where, budgets, OPTIONS, **part, out=out)
        return out

    together = run(slice(None))
    assert together.isfinite().all()
    for row in range(len(query)):
        assert torch.equal(run(slice(row, row + 1))[0], together[row])


def test_values_out_of_range_harm_nothing(kernels):
    """On GPUs, where values are not checked."""
    if kernels.name == "cpu":
        pytest.skip("an error on CPUs: test_contracts.py")
    length = 520 if INTERPRETED else 3000
    results = []
    for broken in (False, True):
        ctx = filled([length] * 3, 2, 64, BF16)
        query = random_query(ctx, 6, BF16)
        if broken:
            ctx.block_table[1, 3:5] = torch.tensor([-5, 10**9])
            ctx.seq_lens[2] = 0
        out = torch.full_like(query, torch.nan)
        lists = select(kernels, ctx, query, [200] * 3, OPTIONS, out=out)
        results.append((lists["indices"][0], out))
    (indices, out), (broken_indices, broken_out) = results
    assert torch.equal(indices, broken_indices) and torch.equal(out[0], broken_out[0])
    assert (broken_out[2] == 0).all()


@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels do not write it")
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), INPUTS, ids=str)
def test_the_logarithm_of_the_denominator(kernels, shape, dtype, listed, with_sinks):
    if kernels.name == "triton":
        pytest.skip("Triton's kernels do not write it")
    kernels.skip_unless_served(dtype)
    num_heads, num_kv_heads, head_size = shape
    ctx = filled([1, 127, 300, 1500], num_kv_heads, head_size, dtype)
    query = random_query(ctx, num_heads, dtype)
    counts, given = [1, -1, 40, 700], {"scale": head_size**-0.5}
    lists = random_lists(ctx, num_heads, counts, False) if listed else NOTHING
    given["sinks"] = random_sinks(num_heads) if with_sinks else None
    found, expected = (torch.zeros(4, num_heads) for _ in range(2))
    attend_as_reference(kernels, ctx, query, lists, **given)
    attend(kernels, ctx, query, lists, **given, lse=found)
    attend(reference, ctx, query, lists, **given, lse=expected)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels have no such format")
@pytest.mark.parametrize(("shape", "dtype"), INPUTS, ids=str)
def test_blocks_without_codes(kernels, shape, dtype):
    """Stored, attended to and gathered; what lies behind the rows is left alone."""
    if kernels.name == "triton":
        pytest.skip("Triton's kernels have no such format")
    kernels.skip_unless_served(dtype)
    num_heads, num_kv_heads, head_size = shape
    fmt = replace(BARE, state_bytes=state_bytes(head_size))
    lens = [1, 128, 300]
    ctx = filled(lens, num_kv_heads, head_size, dtype)
    room = BlockLayout(head_size, dtype.itemsize, fmt).content_bytes // dtype.itemsize
    size = (*ctx.kv_cache.shape[:3], room)
    bare = torch.zeros(size, dtype=dtype)
    bare.flatten(2)[..., 2 * 128 * head_size :] = 7
    new = ctx.new_tokens()
    kernels.store(kv_cache=bare, **new, fmt=fmt)
    assert (bare.flatten(2)[..., 2 * 128 * head_size :] == 7).all()
    query = random_query(ctx, num_heads, dtype)
    scale = head_size**-0.5
    expected = attend(reference, ctx, query, NOTHING, scale=scale)
    out = torch.empty_like(query)
    where = (query, bare, ctx.block_table, ctx.seq_lens)
    kernels.attend(*where, **NOTHING, scale=scale, out=out, fmt=fmt)
    assert_close(out, expected)
    with pytest.raises(RuntimeError, match="nothing to choose tokens by"):
        lists = list_buffers(ctx, num_heads, 64, False)
        budgets = torch.full((3,), 60, dtype=torch.int32)
        options = sparq_options(16, scale)
        kernels.sparq_attend(*where, budgets, options, **lists, out=out, fmt=fmt)

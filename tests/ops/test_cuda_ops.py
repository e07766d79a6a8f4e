# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""CUDA kernels against the fp32 reference: ragged, random, NaN-poisoned inputs."""

import pytest
import torch

from vllm_sparse import ops
from vllm_sparse.ops import reference
from vllm_sparse.testing.compare import assert_close
from vllm_sparse.testing.generate import PagedContext, paged_context

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# num_heads, num_kv_heads, head_size: GQA, MHA, MQA, odd sizes, wide groups.
SHAPES = [
    (9, 3, 64),
    (4, 4, 80),
    (6, 1, 96),
    (8, 2, 128),
    (4, 1, 256),
    (16, 2, 64),
    (7, 1, 64),
    (12, 1, 128),
]
SEQ_LENS = [1, 127, 128, 129, 700, 2175, 9000]
# Scores are kept in 8 bits, 3 % off at most, and counted in bins of 1.5 %.
SCORE_TOLERANCE = 0.09
MASS_TOLERANCE = 0.002


@pytest.fixture(scope="module")
def workspace():
    """One for all tests: calls of any shape leave it fit for the next."""
    return torch.zeros(2**28, dtype=torch.uint8, device="cuda")


@pytest.fixture(autouse=True)
def cuda_kernels():
    """Not what a GPU would get by itself."""
    ops.use("cuda", torch.device("cuda", torch.cuda.current_device()))
    yield
    ops.use("auto")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(seq_lens, num_kv_heads, head_size, dtype) -> PagedContext:
    """A batch on the CPU, stored and sealed by the reference."""
    ctx = paged_context(seq_lens, num_kv_heads, head_size, dtype, generator())
    for row in range(len(seq_lens)):
        reference.store_kv(ctx.keys[row], ctx.values[row], ctx.kv_cache, ctx.slots(row))
    reference.seal_blocks(ctx.kv_cache, *ctx.seal_jobs(), head_size)
    return ctx


def raw(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


def to_gpu(t):
    return t.cuda() if isinstance(t, torch.Tensor) else t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_store_and_seal_equal_the_cpu(shape, dtype):
    _, num_kv_heads, head_size = shape
    want = filled(SEQ_LENS, num_kv_heads, head_size, dtype)
    ctx = paged_context(SEQ_LENS, num_kv_heads, head_size, dtype, generator())
    cache = ctx.kv_cache.cuda()
    for row in range(len(SEQ_LENS)):
        slots = ctx.slots(row).cuda()
        ops.store_kv(ctx.keys[row].cuda(), ctx.values[row].cuda(), cache, slots)
    ops.seal_blocks(cache, *map(to_gpu, ctx.seal_jobs()), head_size)
    end = reference._layout(cache, head_size).prefix_mean_offset
    got, expected = raw(cache.cpu()).flatten(2), raw(want.kv_cache).flatten(2)
    assert torch.equal(got[..., :end], expected[..., :end])
    mean = slice(end, end + 2 * head_size)
    assert_close(
        got[..., mean].contiguous().view(torch.float16),
        expected[..., mean].contiguous().view(torch.float16),
    )


def test_store_reads_strided_tokens_and_skips_slots_out_of_range():
    ctx = paged_context([200], 3, 64, torch.bfloat16, generator())
    want = ctx.kv_cache.clone()
    for columns in (15 * 64, 15 * 64 + 1):  # aligned to 16 bytes, and not
        qkv = torch.randn(200, columns, generator=generator(1)).bfloat16()
        key = qkv[:, 9 * 64 : 12 * 64].unflatten(1, (3, 64))
        value = qkv[:, 12 * 64 : 15 * 64].unflatten(1, (3, 64))
        slots = ctx.slots(0)
        slots[5], slots[6] = -1, 10**9
        reference.store_kv(key, value, want, slots.where(slots < 10**9, -1))
        cache, qkv = ctx.kv_cache.cuda(), qkv.cuda()
        key = qkv[:, 9 * 64 : 12 * 64].unflatten(1, (3, 64))
        value = qkv[:, 12 * 64 : 15 * 64].unflatten(1, (3, 64))
        ops.store_kv(key, value, cache, slots.cuda())
        assert torch.equal(raw(cache.cpu()), raw(want))


def test_gather_returns_the_stored_context():
    ctx = filled([300, 128, 5], 3, 64, torch.bfloat16)
    key = torch.full((433, 3, 64), torch.nan, dtype=torch.bfloat16).cuda()
    value = torch.full_like(key, torch.nan)
    start = torch.tensor([0, 300, 428]).cuda()
    table, lens = ctx.block_table.cuda(), ctx.seq_lens.cuda()
    ops.gather_kv(ctx.kv_cache.cuda(), table, lens, start, key, value)
    assert torch.equal(key.cpu(), torch.cat(ctx.keys))
    assert torch.equal(value.cpu(), torch.cat(ctx.values))


def make_query(ctx, num_heads, dtype, seed=7):
    shape = (len(ctx.keys), num_heads, ctx.keys[0].shape[-1])
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def buffers(ctx, num_heads, max_kept, with_mass=True):
    rows, num_kv_heads = len(ctx.keys), ctx.kv_cache.shape[1]
    return dict(
        indices=torch.full((rows, num_kv_heads, max_kept), -7, dtype=torch.int32),
        counts=torch.full((rows, num_kv_heads), -7, dtype=torch.int32),
        kept_mass=torch.full((rows, num_heads), torch.nan) if with_mass else None,
    )


def check_lists(got, want, args, options):
    """Lists may differ only in tokens whose scores 8 bits cannot tell apart."""
    query, cache, table, lens, _ = args
    assert torch.equal(got["counts"], want["counts"])
    num_kv_heads = cache.shape[1]
    group = query.shape[1] // num_kv_heads
    for row, head in (want["counts"] >= 0).nonzero().tolist():
        n = int(want["counts"][row, head])
        kept = got["indices"][row, head, :n].tolist()
        expected = want["indices"][row, head, :n].tolist()
        assert kept == sorted(set(kept))
        assert (got["indices"][row, head, n:] == -7).all()
        only_got, only_want = set(kept) - set(expected), set(expected) - set(kept)
        if not only_got and got.get("kept_mass") is None:
            continue
        probs = reference.sparq_probabilities(
            query[row].float().view(num_kv_heads, group, -1)[head],
            cache,
            table[row],
            int(lens[row]),
            head,
            options["rank"],
            options["scale"],
            options["soft_cap"],
        )
        scores = probs.sum(0)
        if only_got:
            low, high = scores[list(only_got)].min(), scores[list(only_want)].max()
            assert high <= low * (1 + SCORE_TOLERANCE)
            best = scores[expected].sum()
            assert scores[kept].sum() >= best * (1 - MASS_TOLERANCE)
        if got.get("kept_mass") is not None:
            mass = probs[:, kept].sum(-1).clamp(max=1.0)
            heads = slice(head * group, (head + 1) * group)
            assert_close(got["kept_mass"][row, heads], mass, 1e-2)


def check_decode(args, want, options, workspace, rows=None):
    """Both steps in one op, which may be another kernel than the two, with its own
    lists: those are compared with the reference's, the result with its attention.
    """
    query = args[0]
    lists = {
        name: torch.full_like(want[name], -7).cuda() for name in ("indices", "counts")
    }
    out = torch.full_like(query, torch.nan).cuda()
    read = torch.zeros(1, dtype=torch.int64, device="cuda")
    given = dict(out=out, tokens_read=read, workspace=workspace)
    ops.sparq_attend(*map(to_gpu, args), **options, **lists, **given)
    got = {name: t.cpu() for name, t in lists.items()}
    check_lists(got, want, args, options)
    expected, expected_read = torch.empty_like(query), torch.zeros(1, dtype=torch.int64)
    scales = dict(scale=options["scale"], soft_cap=options["soft_cap"])
    reference.attend(
        *args[:4], **got, kept_mass=None, **scales, out=expected,
        tokens_read=expected_read,
    )  # fmt: skip
    assert_close(out.cpu(), expected)
    assert read.item() == expected_read.item()


def check_select(ctx, num_heads, budgets, options, workspace, max_kept=1200):
    """Select on the GPU, with kept_mass, and compare with the reference."""
    query = make_query(ctx, num_heads, ctx.kv_cache.dtype)
    budgets = torch.tensor(budgets, dtype=torch.int32)
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    got, want = (buffers(ctx, num_heads, max_kept) for _ in range(2))
    got = {name: t.cuda() for name, t in got.items()}
    ops.sparq_select(*map(to_gpu, args), **options, **got, workspace=workspace)
    got = {name: t.cpu() for name, t in got.items()}
    reference.sparq_select(*args, **options, **want)
    check_lists(got, want, args, options)
    check_decode(args, want, options, workspace)
    return got


@pytest.mark.parametrize("with_mass", [True, False], ids=["mass", "no-mass"])
@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_select_keeps_what_the_reference_keeps(shape, dtype, soft_cap, with_mass):
    num_heads, num_kv_heads, head_size = shape
    ctx = filled(SEQ_LENS, num_kv_heads, head_size, dtype)
    query = make_query(ctx, num_heads, dtype)
    budgets = torch.tensor([64, 64, 64, -1, 200, 300, 1000], dtype=torch.int32)
    rank = 3 * head_size // 8 if soft_cap else head_size // 4
    options = dict(
        rank=rank,
        local_window=16,
        sink_tokens=4,
        scale=head_size**-0.5,
        soft_cap=soft_cap,
    )
    got = buffers(ctx, num_heads, 1100, with_mass)
    got = {name: to_gpu(t) for name, t in got.items()}
    want = buffers(ctx, num_heads, 1100)
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    ops.sparq_select(*map(to_gpu, args), **options, **got)
    got = {name: t.cpu() for name, t in got.items() if t is not None}
    reference.sparq_select(*args, **options, **want)
    dense = (got["counts"] == -1).all(1).tolist()
    assert dense == [True, True, False, True, False, False, False]
    check_lists(got, want, args, options)
    if with_mass:
        assert (got["kept_mass"][got["counts"][:, 0] == -1] == 1).all()
    else:
        check_decode(args, want, options, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [-1, 0, 1, 130, 131, 1999, 2000, 2001])
def test_select_at_the_edges_of_a_budget(budget, dtype, workspace):
    ctx = filled([2000, 2048, 2049], 2, 64, dtype)
    options = dict(rank=64, local_window=40, sink_tokens=4, scale=0.125, soft_cap=0.0)
    check_select(ctx, 4, [budget] * 3, options, workspace, 2048)


@pytest.mark.parametrize("group", range(1, 13))
def test_select_for_every_group(group, workspace):
    ctx = filled([1000, 255, 256, 257, 5000], 2, 128, torch.bfloat16)
    options = dict(rank=32, local_window=40, sink_tokens=4, scale=0.1, soft_cap=0.0)
    check_select(ctx, 2 * group, [150, 150, 150, 180, 400], options, workspace)


@pytest.mark.parametrize("rank", [1, 16, 31, 48, 100, 128])
def test_select_for_every_rank(rank, workspace):
    ctx = filled([1000, 3333], 2, 128, torch.bfloat16)
    options = dict(rank=rank, local_window=40, sink_tokens=4, scale=0.1, soft_cap=0.0)
    check_select(ctx, 8, [200, 300], options, workspace)


# Clusters shrink from 16 thread blocks to 1 as the batch grows.
@pytest.mark.parametrize("rows", [1, 12, 25, 36, 50, 60, 80, 100, 200, 400])
def test_select_for_every_batch(rows, workspace):
    lens = [(700, 130, 1111, 385, 384, 2049, 383)[i % 7] for i in range(rows)]
    ctx = filled(lens, 1, 64, torch.bfloat16)
    budgets = [(-1, 129, 200)[i % 3] for i in range(rows)]
    options = dict(rank=16, local_window=16, sink_tokens=4, scale=0.2, soft_cap=0.0)
    check_select(ctx, 4, budgets, options, workspace)


# Among many rows, a long one's scores do not fit into shared memory.
@pytest.mark.parametrize(("place", "rows"), [(0, 31), (30, 31), (7, 200)])
def test_select_one_long_row_beside_short_ones(place, rows, workspace):
    lens = [1000 + i for i in range(rows - 1)]
    lens.insert(place, 60000 if rows < 100 else 30000)
    ctx = filled(lens, 1, 128, torch.bfloat16)
    budgets = [512] * rows
    for i in range(0, rows, 2):
        budgets[i] = -1 if lens[i] < 2000 else 512
    options = dict(rank=32, local_window=64, sink_tokens=4, scale=0.1, soft_cap=0.0)
    check_select(ctx, 4, budgets, options, workspace)


def test_sharp_and_biased_keys(workspace):
    """Channels with large means and logits over a wide range."""
    ctx = paged_context([3000], 1, 128, torch.bfloat16, generator())
    bias = torch.randn(128, generator=generator(5)) * 8
    ctx.keys[0][:] = (ctx.keys[0].float() * 4 + bias).bfloat16()
    reference.store_kv(ctx.keys[0], ctx.values[0], ctx.kv_cache, ctx.slots(0))
    reference.seal_blocks(ctx.kv_cache, *ctx.seal_jobs(), 128)
    options = dict(rank=32, local_window=64, sink_tokens=4, scale=0.09, soft_cap=0.0)
    check_select(ctx, 4, [400], options, workspace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_go_to_lower_positions(dtype):
    ctx = paged_context([1024, 5000], 1, 64, dtype, generator())
    for row, keys in enumerate(ctx.keys):
        keys[:] = 1.0  # every token scores the same
        reference.store_kv(keys, ctx.values[row], ctx.kv_cache, ctx.slots(row))
    reference.seal_blocks(ctx.kv_cache, *ctx.seal_jobs(), 64)
    out = {
        name: t.cuda()
        for name, t in buffers(ctx, 1, 128, False).items()
        if t is not None
    }
    budgets = torch.tensor([100, 100], dtype=torch.int32)
    query = make_query(ctx, 1, dtype)
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    options = dict(rank=16, local_window=10, sink_tokens=0, scale=0.125, soft_cap=0.0)
    expected = [[*range(90), *range(n - 10, n)] for n in (1024, 5000)]
    ops.sparq_select(*map(to_gpu, args), **options, **out)
    assert out["indices"][:, 0, :100].tolist() == expected
    out["indices"].zero_()
    result = torch.empty_like(query).cuda()
    ops.sparq_attend(*map(to_gpu, args), **options, **out, out=result)
    assert out["indices"][:, 0, :100].tolist() == expected


@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend_equals_the_reference(shape, dtype, soft_cap, workspace):
    num_heads, num_kv_heads, head_size = shape
    ctx = filled(SEQ_LENS, num_kv_heads, head_size, dtype)
    query = make_query(ctx, num_heads, dtype)
    rows = len(SEQ_LENS)
    indices = torch.full((rows, num_kv_heads, 900), 10**9, dtype=torch.int32)
    counts = torch.full((rows, num_kv_heads), -1, dtype=torch.int32)
    for row, n in ((2, 1), (4, 37), (5, 300), (6, 900)):
        for head in range(num_kv_heads):
            order = torch.randperm(SEQ_LENS[row], generator=generator(head))[:n]
            indices[row, head, :n] = order.sort().values.int()
            counts[row, head] = n
    mass = torch.rand(rows, num_heads, generator=generator(3))
    lists = dict(indices=indices, counts=counts)
    nothing = dict(indices=None, counts=None)
    for chosen in (
        dict(**nothing, kept_mass=None),
        dict(**lists, kept_mass=None),
        dict(**lists, kept_mass=mass),
    ):
        got = torch.full_like(query, torch.nan).cuda()
        want = torch.full_like(query, torch.nan)
        args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
        options = dict(scale=head_size**-0.5, soft_cap=soft_cap)
        read = torch.zeros(1, dtype=torch.int64)
        read_gpu = read.cuda()
        given = {name: to_gpu(t) for name, t in chosen.items()}
        extra = dict(tokens_read=read_gpu, workspace=workspace)
        ops.attend(*map(to_gpu, args), **given, **options, out=got, **extra)
        reference.attend(*args, **chosen, **options, out=want, tokens_read=read)
        assert_close(got.cpu(), want)
        assert read_gpu.item() == read.item() > 0


@pytest.mark.parametrize("group", [*range(1, 13), 16, 20])
def test_attend_for_every_group(group, workspace):
    lens = [1, 15, 16, 17, 3000, 5, 700]
    ctx = filled(lens, 2, 128, torch.bfloat16)
    query = make_query(ctx, 2 * group, torch.bfloat16)
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    want = torch.full_like(query, torch.nan)
    reference.attend(*args, None, None, None, 0.1, 0.0, want)
    for _ in range(3):
        got = torch.full_like(query, torch.nan).cuda()
        ops.attend(*map(to_gpu, args), scale=0.1, out=got, workspace=workspace)
        assert_close(got.cpu(), want)
    assert not workspace[:4096].any()


def test_attend_one_long_row_beside_short_ones(workspace):
    lens = [20000] + [1 + 37 * i for i in range(40)]
    ctx = filled(lens, 1, 64, torch.float16)
    query = make_query(ctx, 4, torch.float16)
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    want = torch.full_like(query, torch.nan)
    reference.attend(*args, None, None, None, 0.1, 0.0, want)
    got = torch.full_like(query, torch.nan).cuda()
    ops.attend(*map(to_gpu, args), scale=0.1, out=got, workspace=workspace)
    assert_close(got.cpu(), want)


@pytest.mark.parametrize("with_workspace", [False, True])
@pytest.mark.parametrize("with_mass", [False, True])
def test_both_steps_in_one_op_also_in_a_graph(with_mass, with_workspace, workspace):
    ctx = filled(SEQ_LENS, 3, 64, torch.bfloat16)
    query = make_query(ctx, 9, torch.bfloat16)
    budgets = torch.tensor([-1, 64, 64, 200, -1, 300, 500], dtype=torch.int32)
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    options = dict(rank=24, local_window=16, sink_tokens=4, scale=0.2, soft_cap=0.0)
    want = buffers(ctx, 9, 640)
    reference.sparq_select(*args, **options, **want)
    on_gpu = [t.cuda() for t in args]
    lists = {k: to_gpu(t) for k, t in buffers(ctx, 9, 640, with_mass).items()}
    out = torch.full_like(on_gpu[0], torch.nan)
    given = dict(out=out, workspace=workspace if with_workspace else None)

    def call():
        ops.sparq_attend(*on_gpu, **options, **lists, **given)

    call()
    eager, eager_indices = out.clone(), lists["indices"].clone()
    check_lists(
        {k: t.cpu() for k, t in lists.items() if t is not None}, want, args, options
    )
    attended = torch.empty_like(out)
    ops.attend(*on_gpu[:4], **lists, scale=0.2, out=attended)
    assert_close(eager, attended)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):
            call()
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, eager)
        assert torch.equal(lists["indices"], eager_indices)


def test_workspace_bytes_are_enough_and_checked(workspace):
    ctx = filled([3000, 400], 2, 64, torch.bfloat16)
    query = make_query(ctx, 8, torch.bfloat16)
    budgets = torch.tensor([200, 200], dtype=torch.int32)
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    args = [t.cuda() for t in args]
    options = dict(rank=16, local_window=16, sink_tokens=4, scale=0.2, soft_cap=0.0)
    lists = {name: to_gpu(t) for name, t in buffers(ctx, 8, 320).items()}
    shape = (2, 4, ctx.block_table.shape[1], 64, args[0].device)
    size = ops.workspace_bytes(2, *shape)
    assert ops.workspace_bytes(1, *shape) <= size
    out = torch.empty_like(args[0])
    exact = torch.zeros(size, dtype=torch.uint8, device="cuda")
    ops.sparq_attend(*args, **options, **lists, out=out, workspace=exact)
    assert not exact[:4096].any()
    with pytest.raises(RuntimeError, match="workspace has"):
        ops.sparq_attend(*args, **options, **lists, out=out, workspace=exact[:-1])


def test_a_context_beyond_shared_memory_and_a_nan_query():
    """Long contexts keep their scores in global memory when there are many rows."""
    ctx = filled([40000] + [2000] * 17, 1, 64, torch.bfloat16)
    query = make_query(ctx, 12, torch.bfloat16)
    query[3] = torch.nan
    budgets = torch.full((18,), 256, dtype=torch.int32)
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    options = dict(rank=16, local_window=32, sink_tokens=4, scale=0.125, soft_cap=0.0)
    got = {name: t.cuda() for name, t in buffers(ctx, 12, 400).items()}
    want = buffers(ctx, 12, 400)
    ops.sparq_select(*map(to_gpu, args), **options, **got)
    got = {name: t.cpu() for name, t in got.items()}
    kept = got["indices"][3, 0, : int(got["counts"][3, 0])]
    assert len(kept) > 0 and (kept >= 0).all() and (kept < 2000).all()
    reference.sparq_select(*args, **options, **want)
    for lists in (got, want):
        lists["counts"][3] = -1
    check_lists(got, want, args, options)
    query[3] = 1
    want = buffers(ctx, 12, 400)
    args = (query, *args[1:])
    reference.sparq_select(*args, **options, **want)
    check_decode(args, want, options, None)


def test_values_out_of_range_harm_nothing():
    ctx = filled([1500, 1500, 1500], 2, 64, torch.float32)
    query = make_query(ctx, 4, torch.float32)
    budgets = torch.full((3,), 200, dtype=torch.int32)
    options = dict(rank=16, local_window=32, sink_tokens=4, scale=0.125, soft_cap=0.0)
    outs = []
    for broken in (False, True):
        table, lens = ctx.block_table.clone(), ctx.seq_lens.clone()
        if broken:
            table[1, 3], table[1, 4], lens[2] = -5, 10**9, 0
        args = (query, ctx.kv_cache, table, lens, budgets)
        lists = {name: t.cuda() for name, t in buffers(ctx, 4, 300).items()}
        outs.append(torch.full_like(query, torch.nan).cuda())
        ops.sparq_attend(*map(to_gpu, args), **options, **lists, out=outs[-1])
    assert torch.equal(outs[0][0], outs[1][0])
    assert (outs[1][2] == 0).all()

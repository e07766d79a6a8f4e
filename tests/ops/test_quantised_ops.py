# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Quantised blocks against the fp32 reference: ragged, random, NaN-poisoned inputs."""

import pytest
import torch

from vllm_sparse import ops
from vllm_sparse.cache.formats import ROWS, KvFormat, resolve_format
from vllm_sparse.cache.layout import BlockLayout
from vllm_sparse.ops import reference
from vllm_sparse.testing.compare import TOLERANCE, assert_close
from vllm_sparse.testing.generate import PagedContext

from .quantised import (
    GPU,
    NAMES,
    SEQ_LENS,
    SHAPES,
    Kernels,
    chunked,
    context,
    filled,
    generator,
    parts,
    store,
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def kernels(request):
    if request.param == "cuda":
        ops.use("cuda", torch.device("cuda", torch.cuda.current_device()))
    yield Kernels(request.param)
    ops.use("auto")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_stored_blocks_equal_the_reference_bit_for_bit(shape, dtype, name, kernels):
    fmt = resolve_format(name, None, shape[2])
    ctx = context(shape, dtype, fmt)
    got = parts(ctx, store(ctx, fmt, [SEQ_LENS], kernels), fmt)
    want = parts(ctx, store(ctx, fmt, [SEQ_LENS], reference), fmt)
    assert torch.equal(got[0], want[0])
    assert_close(got[1], want[1])
    assert torch.equal(got[2], want[2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_depend_on_tokens_alone_not_on_steps(dtype, name, kernels):
    """One prompt, chunks of any size, tokens one by one, drafts that are rejected."""
    shape, lengths = (6, 2, 64), [700, 257, 128, 129]
    fmt = resolve_format(name, None, 64, has_mean=dtype == torch.float32)
    ctx = context(shape, dtype, fmt, lengths)
    want = parts(ctx, store(ctx, fmt, [lengths], kernels), fmt)
    most = BlockLayout(64, dtype.itemsize, fmt).rows_per_block
    drafts = []
    for at in range(0, 700, 7):
        # Up to `most` tokens are tried, 7 of them are kept.
        drafts.append([min(at + most, n) for n in lengths])
        drafts.append([min(at + 7, n) for n in lengths])
    ways = [chunked(lengths, size) for size in (100, 300, 1)] + [[*drafts, lengths]]
    for steps in ways:
        got = parts(ctx, store(ctx, fmt, steps, kernels), fmt)
        assert torch.equal(got[0], want[0])
        if fmt.has_mean:
            assert_close(got[1], want[1])
        assert torch.equal(got[2], want[2])


@pytest.mark.parametrize("name", NAMES)
def test_rejected_drafts_leave_no_trace(name, kernels):
    """Wrong drafts cross a block's end and are replaced by other tokens."""
    fmt = resolve_format(name, None, 64)
    ctx = context((6, 2, 64), torch.bfloat16, fmt, [300])
    wrong = context((6, 2, 64), torch.bfloat16, fmt, [300])
    cache = store(ctx, fmt, [[126]], kernels)
    wrong.keys[0] = wrong.keys[0] + 1
    for source, first, last in ((wrong, 126, 140), (ctx, 127, 135), (ctx, 135, 300)):
        source = ctx if source is ctx else wrong
        if source is wrong:  # one draft was right
            source.keys[0][126] = ctx.keys[0][126]
            source.values[0][126] = ctx.values[0][126]
        kernels.store_quantised(
            source.keys[0][first:last],
            source.values[0][first:last],
            cache,
            ctx.block_table,
            torch.tensor([last]).int(),
            torch.tensor([0, last - first]).int(),
            fmt,
        )
    got, want = (parts(ctx, t, fmt) for t in (cache, store(ctx, fmt, [[300]], kernels)))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[2], want[2])


def test_a_shared_prefix_is_sealed_before_means_are_taken_of_it(kernels):
    fmt = resolve_format("int4", None, 64)
    ctx = context((6, 2, 64), torch.float32, fmt, [384, 384])
    ctx.block_table[1, :2] = ctx.block_table[0, :2]
    ctx.keys[1][:256], ctx.values[1][:256] = ctx.keys[0][:256], ctx.values[0][:256]
    # The second request starts where the first one's prefix ends, in the same step.
    new = [0, 384, 512]
    kernels.store_quantised(
        torch.cat([ctx.keys[0], ctx.keys[1][256:]]),
        torch.cat([ctx.values[0], ctx.values[1][256:]]),
        ctx.kv_cache,
        ctx.block_table,
        ctx.seq_lens,
        torch.tensor(new).int(),
        fmt,
    )
    lay = BlockLayout(64, 4, fmt)
    for row in range(2):
        chunk = ctx.kv_cache[int(ctx.block_table[row, 2]), 1]
        assert_close(
            reference.prefix_mean(chunk, lay), ctx.values[row][:, 1].mean(0), 1e-2
        )


@pytest.mark.parametrize("name", NAMES)
def test_extreme_values_stay_finite(name, kernels):
    fmt = resolve_format(name, None, 64)
    ctx = context((1, 1, 64), torch.float32, fmt, [129])
    ctx.keys[0][:, 0, 0] = 3.25
    ctx.keys[0][:, 0, 1] = torch.linspace(-1e6, 1e6, 129)
    ctx.values[0][5] = 2.5
    ctx.values[0][6, 0, :2] = torch.tensor([-1e6, 1e6])
    cache = store(ctx, fmt, [[129]], kernels)
    want = store(ctx, fmt, [[129]], reference)
    assert torch.equal(parts(ctx, cache, fmt)[0], parts(ctx, want, fmt)[0])
    chunk = cache[int(ctx.block_table[0, 0]), 0]
    key, value = reference.read_block(chunk, BlockLayout(64, 4, fmt))
    assert key.isfinite().all() and value.isfinite().all()
    assert torch.equal(value[5], torch.full((64,), 2.5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_gather_reads_every_full_block_from_its_codes(shape, dtype, name, kernels):
    fmt = resolve_format(name, None, shape[2])
    ctx = filled(shape, dtype, fmt)
    starts = torch.tensor([0] + [n + 1 for n in SEQ_LENS[:-1]]).cumsum(0)
    size = (int(starts[-1]) + SEQ_LENS[-1], shape[1], shape[2])
    got = [torch.full(size, torch.nan, dtype=dtype) for _ in range(2)]
    want = [t.clone() for t in got]
    args = (ctx.kv_cache, ctx.block_table, ctx.seq_lens, starts)
    kernels.gather_kv(*args, *got, fmt)
    reference.gather_kv(*args, *want, fmt)
    for g, w in zip(got, want):
        assert torch.equal(g.isnan(), w.isnan())
        assert_close(g.nan_to_num(), w.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_as_near_as_their_bits_allow(name, kernels):
    fmt = resolve_format(name, None, 64)
    ctx = context((1, 1, 64), torch.float32, fmt, [129])
    chunk = store(ctx, fmt, [[129]], kernels)[int(ctx.block_table[0, 0]), 0]
    key, value = reference.read_block(chunk, BlockLayout(64, 4, fmt))
    exact = [t[0][:128, 0] for t in (ctx.keys, ctx.values)]
    group = 1 if fmt.key_rows else fmt.key_group
    key, exact[0] = (t.unflatten(0, (-1, group)) for t in (key, exact[0]))
    dims = (1, 2) if fmt.key_rows else (1,)
    largest, least = (f(exact[0], dims, True) for f in (torch.amax, torch.amin))
    step = (largest - least) / (255 if fmt.key_rows else 2**fmt.key_bits - 1)
    assert ((key - exact[0]).abs() <= 0.52 * step + 2e-3).all()
    groups = exact[1].unflatten(1, (-1, fmt.value_group))
    step = (groups.amax(-1) - groups.amin(-1)) / (2**fmt.value_bits - 1)
    error = (value - exact[1]).abs().unflatten(1, (-1, fmt.value_group)).amax(-1)
    assert (error <= 0.52 * step + 2e-3).all()


def lists(ctx: PagedContext, num_heads: int, with_mass: bool = True):
    shape = (len(ctx.keys), ctx.kv_cache.shape[1])
    return dict(
        indices=torch.full((*shape, max(SEQ_LENS)), -7, dtype=torch.int32),
        counts=torch.full(shape, -7, dtype=torch.int32),
        kept_mass=torch.full((shape[0], num_heads), torch.nan) if with_mass else None,
    )


def query_of(ctx: PagedContext, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    size = (len(ctx.keys), num_heads, ctx.keys[0].shape[-1])
    return torch.randn(size, generator=generator(7)).to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_dense_attention_over_codes_and_tail(shape, dtype, name, kernels):
    num_heads, _, head_size = shape
    fmt = resolve_format(name, None, head_size)
    ctx = filled(shape, dtype, fmt)
    query = query_of(ctx, num_heads, dtype)
    got, want = torch.full_like(query, torch.nan), torch.full_like(query, torch.nan)
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    read, expected = (
        torch.zeros(kernels.counters).long(),
        torch.zeros(kernels.counters).long(),
    )
    options = dict(scale=head_size**-0.5, soft_cap=0.0)
    kernels.attend(*args, **options, out=got, tokens_read=read, fmt=fmt)
    nothing = dict(indices=None, counts=None, kept_mass=None, fmt=fmt)
    reference.attend(*args, **nothing, **options, out=want, tokens_read=expected)
    assert_close(got, want)
    assert torch.equal(read, expected)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_sparse_attention_over_codes_and_tail(shape, dtype, name, top_p, kernels):
    num_heads, _, head_size = shape
    fmt = resolve_format(name, None, head_size)
    ctx = filled(shape, dtype, fmt)
    query = query_of(ctx, num_heads, dtype)
    budgets = torch.tensor([-1, 60, 60, 40, 150, 150]).int()
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    options = dict(
        rank=head_size // 4,
        local_window=16,
        sink_tokens=4,
        scale=head_size**-0.5,
        soft_cap=0.0,
        top_p=top_p,
        min_tokens=20,
    )
    # Lists of nearly equal scores may differ: attend is compared on the same lists.
    chosen, want = lists(ctx, num_heads), lists(ctx, num_heads)
    kernels.sparq_select(*args, budgets, **options, **chosen, fmt=fmt)
    reference.sparq_select(*args, budgets, **options, **want, fmt=fmt)
    if top_p == 1.0:
        assert torch.equal(chosen["counts"], want["counts"])
    sparse = chosen["counts"] > 0
    assert sparse.any()
    for row, head in sparse.nonzero().tolist():
        kept, best = (
            set(t["indices"][row, head, : int(t["counts"][row, head])].tolist())
            for t in (chosen, want)
        )
        assert len(kept ^ best) <= max(4, len(best) // 8)
    outs = [torch.full_like(query, torch.nan) for _ in range(3)]
    counters = [torch.zeros(kernels.counters).long() for _ in range(3)]
    scale = dict(scale=options["scale"], soft_cap=0.0, fmt=fmt)
    kernels.attend(*args, **chosen, **scale, out=outs[0], tokens_read=counters[0])
    again = lists(ctx, num_heads)
    kernels.sparq_attend(
        *args,
        budgets,
        **options,
        **again,
        out=outs[1],
        tokens_read=counters[1],
        fmt=fmt,
    )
    reference.attend(*args, **chosen, **scale, out=outs[2], tokens_read=counters[2])
    assert_close(outs[0], outs[2])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(counters[0], counters[2])
    assert torch.equal(counters[0], counters[1])


def test_an_attention_cap_and_long_contexts(kernels):
    """More than one split of 256 tokens, lists that begin inside a block."""
    fmt = resolve_format("int4", None, 64)
    ctx = filled((4, 2, 64), torch.float32, fmt, [1500])
    query = query_of(ctx, 4, torch.float32)
    picked = torch.arange(0, 1500, 3).int()
    chosen = dict(
        indices=picked.expand(1, 2, -1).contiguous(),
        counts=torch.full((1, 2), len(picked), dtype=torch.int32),
        kept_mass=None,
    )
    outs = [torch.empty_like(query) for _ in range(2)]
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    for op, out in zip((kernels.attend, reference.attend), outs):
        op(*args, **chosen, scale=0.3, soft_cap=5.0, out=out, fmt=fmt)
    assert_close(*outs)


def random_lists(ctx: PagedContext, num_heads: int):
    """Few tokens of many blocks, many of few, single blocks, everything."""
    chosen = lists(ctx, num_heads, with_mass=False)
    size = int(ctx.seq_lens.max())
    chosen["indices"] = torch.zeros(*chosen["counts"].shape, size, dtype=torch.int32)
    for row, length in enumerate(ctx.seq_lens.tolist()):
        for head in range(ctx.kv_cache.shape[1]):
            share = (0.02, 0.5, -1.0, 0.001)[(row + head) % 4]
            keep = torch.rand(length, generator=generator(row)) < share
            keep[-20:] = True
            if share == 0.5:
                keep[: length // 2] = False
            kept = keep.nonzero()[:, 0].int()
            chosen["indices"][row, head, : len(kept)] = kept
            chosen["counts"][row, head] = -1 if share < 0 else len(kept)
    return chosen


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "lists"])
@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(8, 2, 128), (7, 1, 128), (6, 3, 64), (16, 2, 64)], ids=str
)
@pytest.mark.parametrize("kernels", [pytest.param("cuda", marks=GPU)], indirect=True)
def test_shares_of_long_contexts(shape, dtype, name, soft_cap, listed, kernels):
    """Several thread blocks, and several query heads' worth of them, share a row."""
    num_heads, _, head_size = shape
    fmt = resolve_format(name, None, head_size)
    lengths = [1, 5000, 128, 129, 9000, 700]
    ctx = context(shape, dtype, fmt, lengths)
    ctx.kv_cache = store(ctx, fmt, [lengths], kernels)
    query = query_of(ctx, num_heads, dtype)
    chosen = dict(indices=None, counts=None, kept_mass=None)
    if listed:
        chosen = random_lists(ctx, num_heads)
        chosen["kept_mass"] = torch.rand(len(lengths), num_heads)
    got, want = torch.full_like(query, torch.nan), torch.full_like(query, torch.nan)
    counters = [torch.zeros(1).long() for _ in range(2)]
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    options = dict(scale=head_size**-0.5, soft_cap=soft_cap, fmt=fmt)
    kernels.attend(*args, **chosen, **options, out=got, tokens_read=counters[0])
    reference.attend(*args, **chosen, **options, out=want, tokens_read=counters[1])
    # Row by row, as long rows' numbers are small; each keeps fp16's rounding of scaled
    # queries and probabilities, which whole batches average out.
    for row in range(len(lengths)):
        assert_close(got[row], want[row], 1.5 * TOLERANCE[dtype])
    assert torch.equal(*counters)


@pytest.mark.parametrize("top_p", [1.0, 0.5, 0.95])
@pytest.mark.parametrize(
    ("shape", "rank", "dtype"),
    [
        ((8, 2, 128), 32, torch.bfloat16),
        ((8, 2, 128), 20, torch.float16),
        ((7, 1, 128), 48, torch.float16),
        ((6, 3, 64), 16, torch.bfloat16),
        ((16, 2, 64), 40, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "lengths",
    [
        [9000],
        [1, 128, 129, 700, 4097, 2175, 300, 1291],
        [520 + 61 * i for i in range(40)],
        [20000] + 70 * [385],
    ],
    ids=["one", "few", "many", "one among many"],
)
@pytest.mark.parametrize("kernels", [pytest.param("cuda", marks=GPU)], indirect=True)
def test_one_kernel_decodes_where_k_is_kept_by_token(
    lengths, shape, rank, dtype, top_p, kernels
):
    """Clusters of several sizes, ragged tails, lists that thread blocks share."""
    num_heads, num_kv_heads, head_size = shape
    fmt = resolve_format("k8v4", None, head_size, has_mean=False)
    ctx = context(shape, dtype, fmt, lengths)
    ctx.kv_cache = store(ctx, fmt, [lengths], kernels)
    query = query_of(ctx, num_heads, dtype)
    budgets = torch.tensor([max(n // 3, 150) for n in lengths]).int()
    if len(lengths) > 1:
        budgets[0] = -1 if lengths[0] == 1 else 15000
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    options = dict(
        rank=rank,
        local_window=16,
        sink_tokens=4,
        scale=head_size**-0.5,
        soft_cap=0.0,
        top_p=top_p,
        min_tokens=20,
    )
    size = (len(lengths), num_kv_heads)

    def buffers():
        return dict(
            indices=torch.full((*size, 16000), -7, dtype=torch.int32),
            counts=torch.full(size, -7, dtype=torch.int32),
            kept_mass=None,
        )

    chain, got = buffers(), buffers()
    kernels.sparq_select(*args, budgets, **options, **chain, fmt=fmt)
    out, want = torch.full_like(query, torch.nan), torch.full_like(query, torch.nan)
    counters = [torch.zeros(1).long() for _ in range(2)]
    given = dict(out=out, tokens_read=counters[0], fmt=fmt)
    kernels.sparq_attend(*args, budgets, **options, **got, **given)
    difference = (chain["counts"] - got["counts"]).abs()
    assert (difference <= (0 if top_p == 1 else 2 + got["counts"] // 100)).all()
    for row in range(len(lengths)):
        for head in range(num_kv_heads):
            count = int(got["counts"][row, head])
            kept, best = (
                set(t["indices"][row, head, : max(count, 0)].tolist())
                for t in (got, chain)
            )
            assert len(kept) == max(count, 0)
            assert len(kept - best) <= max(2, count // 50)
    scale = dict(scale=options["scale"], soft_cap=0.0, fmt=fmt)
    reference.attend(*args, **got, **scale, out=want, tokens_read=counters[1])
    for row in range(len(lengths)):
        assert_close(out[row], want[row], 1.5 * TOLERANCE[dtype])
    assert torch.equal(*counters)


def test_contracts():
    fmt = resolve_format("int4", None, 64)
    ctx = filled((4, 2, 64), torch.float32, fmt, [300])
    query = query_of(ctx, 4, torch.float32)
    out = torch.empty_like(query)

    def attend(**changes):
        args = dict(kv_cache=ctx.kv_cache, block_table=ctx.block_table, fmt=fmt)
        args |= changes
        ops.attend(
            query,
            seq_lens=ctx.seq_lens,
            scale=1.0,
            out=out,
            **args,
        )

    attend()
    with pytest.raises(RuntimeError, match="bytes per token and head"):
        attend(fmt=ROWS)
    with pytest.raises(RuntimeError, match="bytes per token and head"):
        attend(fmt=resolve_format("int8", None, 64))
    with pytest.raises(RuntimeError, match="not a format for head size 64"):
        attend(fmt=KvFormat("int4", 4, 4, 48))
    with pytest.raises(RuntimeError, match="hold the mean of V"):
        bare = resolve_format("int4", None, 64, has_mean=False)
        cache = context((4, 2, 64), torch.float32, bare, [300]).kv_cache
        mass = torch.ones(1, 4)
        attend(kv_cache=cache, fmt=bare, kept_mass=mass)
    with pytest.raises(RuntimeError, match="does not fit a block_table"):
        attend(block_table=ctx.block_table[:, :5].contiguous())
    rest = (ctx.seq_lens, torch.tensor([0, 300]).int())
    tokens = (ctx.keys[0], ctx.values[0], ctx.kv_cache)
    with pytest.raises(RuntimeError, match="needs a quantised format"):
        ops.store_quantised(*tokens, ctx.block_table, *rest, ROWS)
    with pytest.raises(RuntimeError, match="beyond its tokens"):
        short = ctx.block_table[:, :5].contiguous()
        ops.store_quantised(*tokens, short, *rest, fmt)
    with pytest.raises(RuntimeError, match="is not one of the"):
        broken = ctx.block_table.clone()
        broken[0, 4] = 10**6
        ops.store_quantised(*tokens, broken, *rest, fmt)
    with pytest.raises(RuntimeError, match="must hold at least 300 tokens"):
        less = (ctx.keys[0][:299], ctx.values[0][:299], ctx.kv_cache)
        ops.store_quantised(*less, ctx.block_table, *rest, fmt)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Kernels against the fp32 reference: ragged, random, NaN-poisoned inputs."""

import pytest
import torch

from vllm_sparse import ops
from vllm_sparse.cache.layout import BLOCK_SIZE
from vllm_sparse.ops import reference
from vllm_sparse.testing import op_checks, op_inputs, top_p_checks
from vllm_sparse.testing.compare import assert_close
from vllm_sparse.testing.generate import PagedContext, paged_context

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
]
SEQ_LENS = [1, 127, 128, 129, 700, 2175]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(seq_lens, num_kv_heads, head_size, dtype, seed=0) -> PagedContext:
    """A stored and sealed batch."""
    ctx = paged_context(seq_lens, num_kv_heads, head_size, dtype, generator(seed))
    for row in range(len(seq_lens)):
        ops.store_kv(ctx.keys[row], ctx.values[row], ctx.kv_cache, ctx.slots(row))
    ops.seal_blocks(ctx.kv_cache, *ctx.seal_jobs(), head_size)
    return ctx


def bytes_of(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_store_and_seal_equal_the_reference_bit_for_bit(shape, dtype):
    _, num_kv_heads, head_size = shape
    ctx = filled(SEQ_LENS, num_kv_heads, head_size, dtype)
    want = paged_context(SEQ_LENS, num_kv_heads, head_size, dtype, generator())
    for row in range(len(SEQ_LENS)):
        reference.store_kv(
            want.keys[row], want.values[row], want.kv_cache, want.slots(row)
        )
    reference.seal_blocks(want.kv_cache, *want.seal_jobs(), head_size)
    lay = reference._layout(want.kv_cache, head_size)
    got = bytes_of(ctx.kv_cache).flatten(2)
    expected = bytes_of(want.kv_cache).flatten(2)
    end = lay.prefix_mean_offset  # sums of V may round differently beyond
    assert torch.equal(got[..., :end], expected[..., :end])
    size = 2 * head_size
    mean = got[..., end : end + size].contiguous().view(torch.float16)
    want_mean = expected[..., end : end + size].contiguous().view(torch.float16)
    assert_close(mean, want_mean)


@pytest.mark.parametrize("drafts", [0, 3, 126])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_decode_store_and_seal(dtype, drafts):
    op_checks.check_rows(torch.device("cpu"), (9, 3, 64), dtype, drafts)


def test_store_reads_strided_tokens_and_skips_negative_slots():
    ctx = paged_context([200], 3, 64, torch.bfloat16, generator())
    qkv = torch.randn(200, 15 * 64, generator=generator(1)).bfloat16()
    key = qkv[:, 9 * 64 : 12 * 64].view(200, 3, 64)
    value = qkv[:, 12 * 64 :].view(200, 3, 64)
    slots = ctx.slots(0)
    slots[5] = -1
    ops.store_kv(key, value, ctx.kv_cache, slots)
    rows = reference.kv_rows(ctx.kv_cache, 64)
    for token in (0, 4, 6, 199):
        block, offset = divmod(int(slots[token]), BLOCK_SIZE)
        assert torch.equal(rows[block, :, offset, :64], key[token])
        assert torch.equal(rows[block, :, offset, 64:], value[token])
    block, offset = divmod(int(ctx.slots(0)[5]), BLOCK_SIZE)
    assert rows[block, :, offset].isnan().all()


def test_a_shared_prefix_sealed_in_the_same_call_is_read_after_it_is_written():
    ctx = paged_context([384, 384], 2, 64, torch.float32, generator())
    ctx.block_table[1, :2] = ctx.block_table[0, :2]
    ctx.keys[1][:256], ctx.values[1][:256] = ctx.keys[0][:256], ctx.values[0][:256]
    for row in range(2):
        ops.store_kv(ctx.keys[row], ctx.values[row], ctx.kv_cache, ctx.slots(row))
    ops.seal_blocks(ctx.kv_cache, *ctx.seal_jobs(), 64)
    lay = reference._layout(ctx.kv_cache, 64)
    for row in range(2):
        last = ctx.kv_cache[int(ctx.block_table[row, 2]), 1]
        assert_close(
            reference.prefix_mean(last, lay), ctx.values[row][:, 1].mean(0), 1e-2
        )


def test_sealing_constant_and_extreme_channels_stays_finite():
    ctx = paged_context([128], 1, 64, torch.float32, generator())
    ctx.keys[0][:, 0, 0] = 3.25
    ctx.keys[0][:, 0, 1] = torch.linspace(-1e6, 1e6, 128)
    ops.store_kv(ctx.keys[0], ctx.values[0], ctx.kv_cache, ctx.slots(0))
    ops.seal_blocks(ctx.kv_cache, *ctx.seal_jobs(), 64)
    chunk = ctx.kv_cache[int(ctx.block_table[0, 0]), 0]
    k = reference.dequantise_k(chunk, reference._layout(ctx.kv_cache, 64))
    assert k.isfinite().all()
    assert torch.equal(k[:, 0], torch.full((128,), 3.25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_returns_the_stored_context(dtype):
    ctx = filled([300, 128, 5], 3, 64, dtype)
    total = 300 + 128 + 5
    key = torch.full((total, 3, 64), torch.nan, dtype=dtype)
    value = torch.full_like(key, torch.nan)
    start = torch.tensor([0, 300, 428])
    ops.gather_kv(ctx.kv_cache, ctx.block_table, ctx.seq_lens, start, key, value)
    assert torch.equal(key, torch.cat(ctx.keys))
    assert torch.equal(value, torch.cat(ctx.values))


def make_query(ctx: PagedContext, num_heads: int, dtype, seed=7) -> torch.Tensor:
    head_size = ctx.keys[0].shape[-1]
    shape = (len(ctx.keys), num_heads, head_size)
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def selection_buffers(ctx, num_heads, max_kept):
    rows, num_kv_heads = len(ctx.keys), ctx.kv_cache.shape[1]
    return dict(
        indices=torch.full((rows, num_kv_heads, max_kept), -7, dtype=torch.int32),
        counts=torch.full((rows, num_kv_heads), -7, dtype=torch.int32),
        kept_mass=torch.full((rows, num_heads), torch.nan),
    )


@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_select_keeps_what_the_reference_keeps(shape, dtype, soft_cap):
    num_heads, num_kv_heads, head_size = shape
    ctx = filled(SEQ_LENS, num_kv_heads, head_size, dtype)
    query = make_query(ctx, num_heads, dtype)
    budgets = torch.tensor([64, 64, 64, -1, 200, 300], dtype=torch.int32)
    options = op_inputs.sparq_options(
        rank=head_size // 4,
        local_window=16,
        sink_tokens=4,
        scale=head_size**-0.5,
        soft_cap=soft_cap,
    )
    got = selection_buffers(ctx, num_heads, 448)
    want = selection_buffers(ctx, num_heads, 448)
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    ops.sparq_select(*args, **options, **got)
    reference.sparq_select(*args, **options, **want)
    assert torch.equal(got["counts"], want["counts"])
    dense = (got["counts"] == -1).all(1).tolist()
    assert dense == [True, True, False, True, False, False]
    assert_close(got["kept_mass"], want["kept_mass"], 1e-4)
    for row in (2, 4, 5):
        for head in range(num_kv_heads):
            n = int(got["counts"][row, head])
            kept = got["indices"][row, head, :n].tolist()
            assert kept == sorted(set(kept))
            assert (got["indices"][row, head, n:] == -7).all()
            # fp32 sums in another order may swap tokens of equal rank at the edge.
            missed = set(kept) ^ set(want["indices"][row, head, :n].tolist())
            assert len(missed) <= 2, missed


TOP_P_CONTEXTS = [(100, 64), (300, 299), (700, 699), (2175, 600), (2176, 2175)]


@pytest.mark.parametrize(("dtype", "top_p"), zip(DTYPES, [0.3, 0.9, 0.99]), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass(shape, dtype, top_p):
    soft_cap = 20.0 if top_p == 0.9 else 0.0
    args = (shape, dtype, TOP_P_CONTEXTS, shape[2] // 4, soft_cap, top_p)
    top_p_checks.check_top_p(torch.device("cpu"), *args, tolerance=1e-4)


def test_kept_tokens_are_counted():
    op_checks.check_kept_histogram(torch.device("cpu"), [(700, 150), (2175, 2174)])


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 8.0])
def test_top_p_of_flat_and_sharp_heads_has_floors_and_ceilings(sharpness):
    args = ((9, 3, 64), torch.bfloat16, [(9000, 8999), (6001, 1500), (5000, 4999)])
    top_p_checks.check_top_p(
        torch.device("cpu"),
        *args,
        rank=24,
        soft_cap=0.0,
        top_p=0.95,
        tolerance=1e-4,
        min_tokens=200,
        sharpness=sharpness,
    )


@pytest.mark.parametrize("lens", [[9000], [6001, 5000, 140, 4300]], ids=["few", "many"])
def test_select_of_long_contexts(lens):
    """Long enough that a sample is looked at first; one row is cut between threads."""
    ctx = filled(lens, 3, 64, torch.bfloat16)
    query = make_query(ctx, 9, torch.bfloat16)
    budgets = torch.full((len(lens),), 600, dtype=torch.int32)
    options = op_inputs.sparq_options(rank=24, local_window=32, scale=0.3)
    got, want = (selection_buffers(ctx, 9, 640) for _ in range(2))
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    ops.sparq_select(*args, **options, **got)
    reference.sparq_select(*args, **options, **want)
    assert torch.equal(got["counts"], want["counts"])
    for row, head in zip(*torch.nonzero(want["counts"] > 0, as_tuple=True)):
        n = int(want["counts"][row, head])
        kept, expected = (
            set(x["indices"][row, head, :n].tolist()) for x in (got, want)
        )
        assert len(kept) == n and len(kept ^ expected) <= 2


@pytest.mark.parametrize("length", [1024, 6016])  # long enough to be sampled first
def test_select_breaks_ties_towards_lower_positions(length):
    ctx = paged_context([length], 1, 64, torch.float32, generator())
    ctx.keys[0][:] = 1.0  # every token scores the same
    ops.store_kv(ctx.keys[0], ctx.values[0], ctx.kv_cache, ctx.slots(0))
    ops.seal_blocks(ctx.kv_cache, *ctx.seal_jobs(), 64)
    out = selection_buffers(ctx, 1, 128)
    ops.sparq_select(
        make_query(ctx, 1, torch.float32),
        ctx.kv_cache,
        ctx.block_table,
        ctx.seq_lens,
        torch.tensor([100], dtype=torch.int32),
        rank=16,
        local_window=10,
        sink_tokens=0,
        scale=0.125,
        soft_cap=0.0,
        **out,
    )
    kept = out["indices"][0, 0, :100].tolist()
    assert kept == [*range(90), *range(length - 10, length)]


@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend_equals_the_reference(shape, dtype, soft_cap):
    num_heads, num_kv_heads, head_size = shape
    ctx = filled(SEQ_LENS, num_kv_heads, head_size, dtype)
    query = make_query(ctx, num_heads, dtype)
    indices = torch.full((6, num_kv_heads, 300), 10**9, dtype=torch.int32)
    counts = torch.full((6, num_kv_heads), -1, dtype=torch.int32)
    for row, n in ((2, 1), (4, 37), (5, 300)):
        for head in range(num_kv_heads):
            order = torch.randperm(SEQ_LENS[row], generator=generator(head))[:n]
            indices[row, head, :n] = order.sort().values.int()
            counts[row, head] = n
    mass = torch.rand(6, num_heads, generator=generator(3))
    lists = dict(indices=indices, counts=counts)
    nothing = dict(indices=None, counts=None)
    for chosen in (
        dict(**nothing, kept_mass=None),
        dict(**lists, kept_mass=None),
        dict(**lists, kept_mass=mass),
    ):
        got = torch.full_like(query, torch.nan)
        want = torch.full_like(query, torch.nan)
        args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
        options = dict(chosen, scale=head_size**-0.5, soft_cap=soft_cap)
        read = torch.zeros(2, 1, dtype=torch.int64)
        ops.attend(*args, **options, out=got, tokens_read=read[0])
        reference.attend(*args, **options, out=want, tokens_read=read[1])
        assert_close(got, want)
        assert read[0] == read[1] > 0


@pytest.mark.parametrize("rows", [[5], [0, 1, 2, 3, 4, 5]], ids=["few", "many"])
@pytest.mark.parametrize("with_mass", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_steps_in_one_op_equal_the_two(dtype, with_mass, rows):
    """One row is cut up between threads, six rows are handled whole."""
    ctx = filled(SEQ_LENS, 3, 64, dtype)
    query = make_query(ctx, 9, dtype)[rows]
    args = (query, ctx.kv_cache, ctx.block_table[rows], ctx.seq_lens[rows])
    budgets = torch.tensor([-1, 64, 64, 200, -1, 300], dtype=torch.int32)[rows]
    options = op_inputs.sparq_options(rank=20, scale=0.2)
    results = []
    for fused in (False, True):
        lists = dict(
            indices=torch.full((len(rows), 3, 320), -7, dtype=torch.int32),
            counts=torch.zeros(len(rows), 3, dtype=torch.int32),
            kept_mass=torch.zeros(len(rows), 9) if with_mass else None,
        )
        out, read = torch.full_like(query, torch.nan), torch.zeros(1).long()
        if fused:
            last = dict(out=out, tokens_read=read)
            ops.sparq_attend(*args, budgets, **options, **lists, **last)
        else:
            ops.sparq_select(*args, budgets, **options, **lists)
            ops.attend(*args, **lists, scale=0.2, out=out, tokens_read=read)
        results.append([*lists.values(), out, read])
    for apart, together in zip(*results, strict=True):
        assert (apart is None and together is None) or torch.equal(apart, together)


def test_results_do_not_depend_on_the_batch():
    lens = [3000, 150, 2048, 777]
    ctx = filled(lens, 3, 64, torch.float32)
    query = make_query(ctx, 9, torch.float32)
    budgets = torch.full((4,), 256, dtype=torch.int32)
    options = op_inputs.sparq_options(rank=16, local_window=32, scale=0.125)

    def run(rows):
        part = PagedContext(
            ctx.kv_cache,
            ctx.block_table[rows],
            ctx.seq_lens[rows],
            [ctx.keys[r] for r in rows],
            [],
        )
        chosen = selection_buffers(part, 9, 300)
        args = (query[rows], ctx.kv_cache, part.block_table, part.seq_lens)
        ops.sparq_select(*args, budgets[rows], **options, **chosen)
        out = torch.empty(len(rows), 9, 64)
        ops.attend(*args, **chosen, scale=0.125, out=out)
        return out

    together = run([0, 1, 2, 3])
    for row in range(4):
        assert torch.equal(run([row])[0], together[row])


def test_a_nan_query_keeps_valid_positions_and_harms_no_other_row():
    ctx = filled([1500, 1500], 2, 64, torch.float32)
    query = make_query(ctx, 4, torch.float32)
    budgets = torch.full((2,), 200, dtype=torch.int32)
    options = op_inputs.sparq_options(rank=16, local_window=32, scale=0.125)
    args = (ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    want = selection_buffers(ctx, 4, 400)
    ops.sparq_select(query, *args, **options, **want)
    query[0] = torch.nan
    got = selection_buffers(ctx, 4, 400)
    ops.sparq_select(query, *args, **options, **got)
    assert torch.equal(got["indices"][1], want["indices"][1])
    for head in range(2):
        kept = got["indices"][0, head, : int(got["counts"][0, head])]
        assert len(kept) > 0 and (kept >= 0).all() and (kept < 1500).all()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What depends on how the CUDA kernels split their work: groups, ranks, batch sizes,
long rows, workspaces, graphs. What all kernels must do: the other files here.
"""

from dataclasses import replace

import pytest
import torch

from vllm_sparse.cache.formats import resolve_format
from vllm_sparse.ops import reference

from .compare import TOLERANCE, assert_close
from .generate import paged_context
from .inputs import (
    BF16,
    F16,
    F32,
    GPU,
    Kernels,
    assert_same_lists,
    attend,
    filled,
    generator,
    random_query,
    select,
    sparq_options,
)
from .top_p_checks import check_top_p

pytestmark = GPU

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
NOTHING = dict(indices=None, counts=None, kept_mass=None)


@pytest.fixture
def kernels() -> Kernels:
    """Not what a GPU would get by itself."""
    return Kernels("cuda")


def test_fp32_is_refused(kernels):
    ctx = filled([300], 2, 64, F32)
    query = random_query(ctx, 4, F32)
    with pytest.raises(RuntimeError, match="kv_cache must be float16 or bfloat16"):
        attend(kernels, ctx, query, NOTHING, scale=1.0)
    with pytest.raises(RuntimeError, match="kv_cache must be float16 or bfloat16"):
        kernels.store(kv_cache=ctx.kv_cache, **ctx.new_tokens())


def check_select(kernels, ctx, num_heads, budgets, options, workspace, with_mass=True):
    """Selection alone, then both steps in one op, which may be another kernel with its
    own lists: lists as good as the reference's, token by token and by the mass that
    they lose, and its attention to them."""
    query = random_query(ctx, num_heads, ctx.kv_cache.dtype)
    given = (ctx, query, budgets, options)
    want = select(reference, *given)
    as_good = dict(tolerance=kernels.tolerance, lost=0.002)
    got = select(kernels, *given, with_mass, workspace=workspace)
    assert_same_lists(got, want, ctx, query, options, **as_good)
    out = torch.full_like(query, torch.nan)
    lists = select(kernels, *given, False, out=out, workspace=workspace)
    assert_same_lists(lists, want, ctx, query, options, **as_good)
    scales = dict(scale=options.scale, soft_cap=options.soft_cap)
    assert_close(out, attend(reference, ctx, query, lists, **scales))
    return got


@pytest.mark.parametrize("with_mass", [True, False], ids=["mass", "no-mass"])
@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_select_for_every_shape(kernels, shape, dtype, soft_cap, with_mass):
    num_heads, num_kv_heads, size = shape
    ctx = filled(SEQ_LENS, num_kv_heads, size, dtype)
    rank = 3 * size // 8 if soft_cap else size // 4
    options = sparq_options(rank, size**-0.5, soft_cap=soft_cap)
    given = (ctx, num_heads, [64, 64, 64, -1, 200, 300, 1000], options, None)
    dense = (check_select(kernels, *given, with_mass)["counts"] == -1).all(1)
    assert dense.tolist() == [True, True, False, True, False, False, False]


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("budget", [-1, 0, 1, 130, 131, 1999, 2000, 2001])
def test_select_at_the_edges_of_a_budget(kernels, budget, dtype, workspace):
    ctx = filled([2000, 2048, 2049], 2, 64, dtype)
    options = sparq_options(64, 0.125, local_window=40)
    check_select(kernels, ctx, 4, [budget] * 3, options, workspace)


@pytest.mark.parametrize("group", range(1, 13))
def test_select_for_every_group(kernels, group, workspace):
    ctx = filled([1000, 255, 256, 257, 5000], 2, 128, BF16)
    options = sparq_options(32, 0.1, local_window=40)
    budgets = [150, 150, 150, 180, 400]
    check_select(kernels, ctx, 2 * group, budgets, options, workspace)


@pytest.mark.parametrize("rank", [1, 16, 31, 48, 100, 128])
def test_select_for_every_rank(kernels, rank, workspace):
    ctx = filled([1000, 3333], 2, 128, BF16)
    options = sparq_options(rank, 0.1, local_window=40)
    check_select(kernels, ctx, 8, [200, 300], options, workspace)


# Clusters shrink from 8 thread blocks to 2 as the batch grows, or to 1.
@pytest.mark.parametrize("rows", [1, 12, 25, 36, 50, 60, 80, 100, 200, 400])
def test_select_for_every_batch(kernels, rows, workspace):
    lens = [(700, 130, 1111, 385, 384, 2049, 383)[i % 7] for i in range(rows)]
    budgets = [(-1, 129, 200)[i % 3] for i in range(rows)]
    ctx, options = filled(lens, 1, 64, BF16), sparq_options(16, 0.2)
    check_select(kernels, ctx, 4, budgets, options, workspace)


# Alone a very long row gets a cluster of 16; among many its scores, and with 80,000
# tokens its keys, too, do not fit into the shared memory of two thread blocks.
@pytest.mark.parametrize(
    ("place", "rows", "length"),
    [(0, 1, 70000), (0, 31, 60000), (30, 31, 60000), (7, 200, 30000), (3, 70, 80000)],
)
def test_select_one_long_row_beside_short_ones(kernels, place, rows, length, workspace):
    lens = [1000 + i for i in range(rows - 1)]
    lens.insert(place, length)
    budgets = [512] * rows
    for i in range(0, rows, 2):
        budgets[i] = -1 if lens[i] < 2000 else 512
    options = sparq_options(32, 0.1, local_window=64)
    ctx = filled(lens, 1, 128, BF16, by=kernels)
    check_select(kernels, ctx, 4, budgets, options, workspace)


# Thread blocks of a pair part where rows are alike and fill more than half of a wave,
# which is two items for each multiprocessor.
@pytest.mark.parametrize("kv_format", ["auto", "k8v4"])
@pytest.mark.parametrize(
    ("lens", "budgets", "again"),
    [
        ([30000, 29990, 30020], [512, 512, 512], [0, 1, 2]),  # beyond shared memory
        ([700, 690, 695], [-1, -1, -1], [0, 1, 2]),
        ([3000, 1, 3010], [200, -1, 200], [0, 1, 2]),  # as in a graph for more rows
        ([50000, 1500, 700], [512, 300, -1], [1, 2]),
    ],
    ids=["sparse", "dense", "some empty", "one long row"],
)
def test_select_for_every_wave(kernels, lens, budgets, again, kv_format, workspace):
    """Rows that are the same get the same; one of each is compared."""
    fmt = resolve_format(kv_format, None, 128, has_mean=False)
    ctx = filled(lens, 2, 128, BF16, fmt, by=kernels)
    query, options = random_query(ctx, 8, BF16), sparq_options(32, 0.1)
    want = select(reference, ctx, query, budgets, options, False, fmt=fmt)
    num_sms = torch.cuda.get_device_properties(kernels.device).multi_processor_count
    for waves, more in [(1, -2), (1, 0), (1, 2), (2, 0), (2, 2), (4, 0), (8, 2)]:
        rows = (waves * num_sms + more) // 2
        of = [0, 1, 2, *(again[i % len(again)] for i in range(rows - 3))]
        many = replace(
            ctx,
            block_table=ctx.block_table[of],
            seq_lens=ctx.seq_lens[of],
            keys=[ctx.keys[i] for i in of],
        )
        out = torch.full_like(query[of], torch.nan)
        given = (many, query[of], [budgets[i] for i in of], options, False)
        got = select(kernels, *given, out=out, workspace=workspace, fmt=fmt)
        for t in (got["indices"], got["counts"], out):
            assert torch.equal(t, t[of]), rows
        lists = {name: t if t is None else t[:3] for name, t in got.items()}
        as_good = dict(tolerance=kernels.tolerance, lost=0.002, fmt=fmt)
        assert_same_lists(lists, want, ctx, query, options, **as_good)
        attended = attend(reference, ctx, query, lists, scale=options.scale, fmt=fmt)
        # Few rows, which do not average out how fp16 rounds scaled queries over codes.
        assert_close(out[:3], attended, (1.5 if fmt.quantised else 1) * TOLERANCE[BF16])


# The same clusters, of one kernel and of the chain.
@pytest.mark.parametrize(
    ("rows", "length"), [(1, 2000), (9, 1300), (20, 900), (70, 600), (200, 400)]
)
@pytest.mark.parametrize("soft_cap", [0.0, 30.0], ids=["one kernel", "chain"])
def test_top_p_for_every_batch(kernels, rows, length, soft_cap, workspace):
    contexts = [(length - 37 * (i % 7), length - 40) for i in range(rows)]
    contexts[-1] = (length, -1) if rows > 1 else contexts[-1]
    given = ((4, 1, 64), BF16, contexts, sparq_options(24, 0.125, soft_cap=soft_cap))
    check_top_p(kernels, *given, 0.8, workspace=workspace)


# Flat heads have long lists, which thread blocks of other rows share.
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
@pytest.mark.parametrize(
    ("rows", "length"), [(1, 70000), (3, 30000), (70, 9000), (300, 6000)]
)
def test_top_p_of_long_contexts(kernels, rows, length, sharpness, workspace):
    contexts = [(length, length - 1)] + [(700, 699)] * (rows - 1)
    contexts[rows // 2] = (length // 2, length // 2 - 1)
    given = ((4, 1, 128), BF16, contexts, sparq_options(32, sharpness * 128**-0.5))
    check_top_p(kernels, *given, 0.95, workspace=workspace)


def test_sharp_and_biased_keys(kernels, workspace):
    """Channels with large means and logits over a wide range."""
    ctx = paged_context([3000], 1, 128, BF16, generator())
    bias = torch.randn(128, generator=generator(5)) * 8
    ctx.keys[0][:] = (ctx.keys[0].float() * 4 + bias).bfloat16()
    reference.store(kv_cache=ctx.kv_cache, **ctx.new_tokens())
    options = sparq_options(32, 0.09, local_window=64)
    check_select(kernels, ctx, 4, [400], options, workspace)


def check_whole(kernels, shape, dtype, lens, workspace):
    """Without lists; the workspace's counters are zero again after a call."""
    num_heads, num_kv_heads, head_size = shape
    ctx = filled(lens, num_kv_heads, head_size, dtype)
    given = (ctx, random_query(ctx, num_heads, dtype), NOTHING)
    want = attend(reference, *given, scale=head_size**-0.5)
    got = attend(kernels, *given, scale=head_size**-0.5, workspace=workspace)
    assert_close(got, want)
    assert not workspace[:4096].any()


@pytest.mark.parametrize("group", [*range(1, 13), 16, 20])
def test_attend_for_every_group(kernels, group, workspace):
    lens = [1, 15, 16, 17, 3000, 5, 700]
    for _ in range(3):
        check_whole(kernels, (2 * group, 2, 128), BF16, lens, workspace)


def test_attend_one_long_row_beside_short_ones(kernels, workspace):
    lens = [20000] + [1 + 37 * i for i in range(40)]
    check_whole(kernels, (4, 1, 64), F16, lens, workspace)


def test_workspace_bytes_are_enough_and_checked(kernels):
    ctx = filled([3000, 400], 2, 64, BF16)
    query, options = random_query(ctx, 8, BF16), sparq_options(16, 0.2)
    device, bytes_of = kernels.device, kernels.ops.workspace_bytes
    rows = (1, 2, 100, 128, 129, 300, 4096, 5000)
    for adapts in (False, True):  # and never less for more
        sizes = [bytes_of(n, 32, 1, 32, 128, device, adapts) for n in rows]
        assert sizes == sorted(sizes)
    shape = (2, 4, ctx.block_table.shape[1], 64, device)
    assert bytes_of(1, *shape) <= bytes_of(2, *shape)
    exact = torch.zeros(bytes_of(2, *shape), dtype=torch.uint8, device=device)
    given = (kernels, ctx, query, [200, 200], options)
    select(*given, out=torch.empty_like(query), workspace=exact)
    assert not exact[:4096].any()
    with pytest.raises(RuntimeError, match="workspace has"):
        select(*given, out=torch.empty_like(query), workspace=exact[:-1])


def test_a_context_beyond_shared_memory_and_a_nan_query(kernels):
    """Long contexts keep their scores in global memory when there are many rows."""
    ctx = filled([40000] + [2000] * 17, 1, 64, BF16)
    query = random_query(ctx, 12, BF16)
    query[3] = torch.nan
    options = sparq_options(16, 0.125, local_window=32)
    given = (ctx, query, [256] * 18, options)
    got, want = select(kernels, *given), select(reference, *given)
    kept = got["indices"][3, 0, : int(got["counts"][3, 0])]
    assert len(kept) > 0 and (kept >= 0).all() and (kept < 2000).all()
    for lists in (got, want):
        lists["counts"][3] = -1  # what a NaN query keeps is not compared
        lists["kept_mass"][3] = 1
    as_good = dict(tolerance=kernels.tolerance, lost=0.002)
    assert_same_lists(got, want, ctx, query, options, **as_good)
    check_select(kernels, ctx, 12, [256] * 18, options, None)

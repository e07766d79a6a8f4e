# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Selection alone (``sparq_attend`` without ``out``), against the reference."""

import pytest
import torch

from vllm_sparse.cache.formats import resolve_format
from vllm_sparse.cache.layout import BLOCK_SIZE
from vllm_sparse.ops import reference
from vllm_sparse.ops.kept import KEPT_BINS, add_counts

from .generate import paged_context
from .inputs import (
    BF16,
    CONTEXTS,
    F16,
    INPUTS,
    INTERPRETED,
    LONG,
    QUANTISED,
    assert_same_lists,
    filled,
    generator,
    random_query,
    select,
    sparq_options,
)
from .top_p_checks import check_top_p

LENS, BUDGETS = [n for n, _ in CONTEXTS], [budget for _, budget in CONTEXTS]


def check_select(kernels, shape, dtype, lens, budgets, options, with_mass=True):
    """The lists are the reference's, but for scores that are nearly equal."""
    num_heads, num_kv_heads, head_size = shape
    ctx = filled(lens, num_kv_heads, head_size, dtype, heads_apart=True)
    given = (ctx, random_query(ctx, num_heads, dtype), budgets, options)
    got, want = select(kernels, *given, with_mass), select(reference, *given)
    assert_same_lists(got, want, *given[:2], options, kernels.tolerance)
    return want["counts"]


@pytest.mark.parametrize(("with_mass", "soft_cap"), [(True, 20.0), (False, 0.0)])
@pytest.mark.parametrize(("shape", "dtype"), INPUTS, ids=str)
def test_what_is_kept(kernels, shape, dtype, with_mass, soft_cap):
    kernels.skip_unless_served(dtype)
    size = shape[2]
    rank = 3 * size // 8 if soft_cap else size // 4 + 1
    options = sparq_options(rank, size**-0.5, soft_cap=soft_cap)
    given = (shape, dtype, LENS, BUDGETS, options, with_mass)
    assert (check_select(kernels, *given) >= 0).any()


@pytest.mark.parametrize("lens", [[LONG[0]], [6001, 5000, 140, 4300]], ids=len)
def test_long_contexts(kernels, lens):
    """Long enough that the CPU looks at a sample first; one row it cuts between
    threads."""
    if INTERPRETED and len(lens) > 1:
        pytest.skip("slow")
    budgets, options = [min(LONG[1], 600)] * len(lens), sparq_options(24, 0.3)
    check_select(kernels, (9, 3, 64), BF16, lens, budgets, options)


def test_the_edges_of_a_budget(kernels):
    """Every budget with a context that ends a block, and on both sides of that end."""
    if INTERPRETED:
        budgets, end = [0, 130, 511, 512], 4 * BLOCK_SIZE
    else:
        budgets, end = [-1, 0, 1, 130, 131, 1983, 1984, 1985], 15 * BLOCK_SIZE
    lens = [length for length in (end - 1, end, end + 1) for _ in budgets]
    options = sparq_options(64, 0.125, local_window=40)
    check_select(kernels, (2, 1, 64), F16, lens, budgets * 3, options)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_ties_go_to_lower_positions(kernels, dtype):
    # No unsealed tail, one longer than the local window, a shorter one.
    lens = [1280, 1300, 4360] + [6016] * (not INTERPRETED)
    ctx = paged_context(lens, 1, 64, dtype, generator())
    for keys in ctx.keys:
        keys[:] = 1.0
    reference.store(kv_cache=ctx.kv_cache, **ctx.new_tokens())
    query = random_query(ctx, 1, dtype)
    options = sparq_options(16, 0.125, local_window=10, sink_tokens=0)
    given = (kernels, ctx, query, [100] * len(lens), options)
    alone = [select(*given, with_mass) for with_mass in (True, False)]
    for got in (*alone, select(*given, False, out=torch.empty_like(query))):
        for row, length in enumerate(lens):
            tail = max(10, length % BLOCK_SIZE)
            expected = [*range(100 - tail), *range(length - tail, length)]
            assert got["indices"][row, 0, :100].tolist() == expected


@pytest.mark.parametrize(
    ("top_p", "soft_cap"),
    [(0.95, 20.0), (0.5, 0.0), (0.95, 0.0)][: 1 if INTERPRETED else 3],
)
@pytest.mark.parametrize(("shape", "dtype"), INPUTS[: 1 if INTERPRETED else None])
def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass(
    kernels, shape, dtype, top_p, soft_cap
):
    kernels.skip_unless_served(dtype)
    contexts = [(n, -1 if most < 0 else n - 1) for n, most in CONTEXTS]
    options = sparq_options(shape[2] // 4, shape[2] ** -0.5, soft_cap=soft_cap)
    check_top_p(kernels, shape, dtype, contexts, options, top_p)


@pytest.mark.parametrize("sharpness", [0.0, 8.0, 1.0][: 2 if INTERPRETED else 3])
def test_top_p_of_flat_and_sharp_heads_has_floors_and_ceilings(kernels, sharpness):
    contexts = [(LONG[0], LONG[0] - 1), (LONG[0] - 300, LONG[0] // 6)]
    options = sparq_options(24, sharpness * 64**-0.5, min_tokens=200)
    check_top_p(kernels, *INPUTS[0], contexts, options, 0.95)


def test_kept_tokens_are_counted(kernels):
    """The op adds what its lists hold to what is there; -1 is everything."""
    ctx = filled([*LENS[-2:], 200], 2, 64, BF16)
    query, options = random_query(ctx, 6, BF16), sparq_options(24, 0.2, top_p=0.9)
    for out in (None, torch.empty_like(query)):
        histogram = torch.ones(2, KEPT_BINS, dtype=torch.int64)
        given = dict(kept_histogram=histogram, out=out)
        budgets = [*BUDGETS[-2:], -1]
        counts = select(kernels, ctx, query, budgets, options, False, **given)["counts"]
        expected = torch.ones(2, KEPT_BINS, dtype=torch.int64)
        add_counts(counts, expected)
        assert torch.equal(histogram, expected)
        assert (counts[-1] == -1).all() and (counts[:-1] > 0).any()


@pytest.mark.parametrize("length", [520] if INTERPRETED else [520, 3000])
def test_a_nan_query_keeps_valid_positions_and_harms_no_other_row(kernels, length):
    ctx = filled([length, length], 2, 64, BF16)
    query, options = random_query(ctx, 4, BF16), sparq_options(16, 0.125)
    given = (kernels, ctx, query, [200, 200], options)
    want = select(*given)
    query[0] = torch.nan
    got = select(*given)
    assert torch.equal(got["indices"][1], want["indices"][1])
    for head in range(2):
        kept = got["indices"][0, head, : int(got["counts"][0, head])]
        assert len(kept) == 200 or (kernels.name == "cpu" and len(kept) > 0)
        assert kept[0] >= 0 and kept[-1] < length
        assert (kept.diff() > 0).all()


@pytest.mark.skipif(INTERPRETED, reason="quantised formats have no Triton kernels")
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize(("shape", "dtype"), INPUTS, ids=str)
def test_what_is_kept_of_codes(kernels, shape, dtype, name, top_p):
    num_heads, num_kv_heads, head_size = shape
    fmt = resolve_format(name, None, head_size)
    kernels.skip_unless_served(dtype, fmt)
    ctx = filled([1, 127, 128, 129, 256, 400], num_kv_heads, head_size, dtype, fmt)
    options = sparq_options(head_size // 4, head_size**-0.5, top_p=top_p, min_tokens=20)
    budgets = [-1, 60, 60, 40, 150, 150]
    given = (ctx, random_query(ctx, num_heads, dtype), budgets, options)
    got, want = (select(by, *given, fmt=fmt) for by in (kernels, reference))
    assert (got["counts"] > 0).any()
    if top_p == 1.0:
        tolerance = dict(tolerance=kernels.tolerance, fmt=fmt)
        return assert_same_lists(got, want, *given[:2], options, **tolerance)
    for row, head in (got["counts"] > 0).nonzero().tolist():
        kept, best = (
            set(t["indices"][row, head, : int(t["counts"][row, head])].tolist())
            for t in (got, want)
        )
        assert len(kept ^ best) <= max(4, len(best) // 8)

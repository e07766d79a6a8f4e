# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How the CUDA kernels split work over quantised blocks."""

import pytest
import torch

from vllm_sparse.cache.formats import resolve_format
from vllm_sparse.ops import reference

from .compare import TOLERANCE, assert_close
from .inputs import (
    BF16,
    F16,
    GPU,
    QUANTISED,
    Kernels,
    attend,
    filled,
    generator,
    list_buffers,
    random_query,
    select,
    sparq_options,
)

pytestmark = GPU


@pytest.fixture
def kernels() -> Kernels:
    return Kernels("cuda")


def random_lists(ctx, num_heads):
    """Few tokens of many blocks, many of few, single blocks, everything."""
    lens = ctx.seq_lens.tolist()
    lists = list_buffers(ctx, num_heads, max(lens))
    lists["indices"].zero_()
    for row, length in enumerate(lens):
        for head in range(ctx.kv_cache.shape[1]):
            share = (0.02, 0.5, -1.0, 0.001)[(row + head) % 4]
            keep = torch.rand(length, generator=generator(row)) < share
            keep[-20:] = True
            if share == 0.5:
                keep[: length // 2] = False
            kept = keep.nonzero()[:, 0].int()
            lists["indices"][row, head, : len(kept)] = kept
            lists["counts"][row, head] = -1 if share < 0 else len(kept)
    lists["kept_mass"] = torch.rand(len(lens), num_heads, generator=generator(3))
    return lists


def assert_rows_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Row by row, as long rows' numbers are small; each keeps fp16's rounding of scaled
    queries and probabilities, which whole batches average out."""
    for mine, expected in zip(got, want):
        assert_close(mine, expected, 1.5 * TOLERANCE[got.dtype])


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "lists"])
@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(
    "shape", [(8, 2, 128), (7, 1, 128), (6, 3, 64), (16, 2, 64)], ids=str
)
def test_shares_of_long_contexts(shape, dtype, name, soft_cap, listed, kernels):
    """Several thread blocks, and several query heads' worth of them, share a row."""
    num_heads, num_kv_heads, head_size = shape
    fmt, lens = resolve_format(name, None, head_size), [1, 5000, 128, 129, 9000, 700]
    ctx = filled(lens, num_kv_heads, head_size, dtype, fmt, by=kernels)
    query = random_query(ctx, num_heads, dtype)
    lists = random_lists(ctx, num_heads) if listed else {}
    options = dict(scale=head_size**-0.5, soft_cap=soft_cap, fmt=fmt)
    given = (ctx, query, lists)
    assert_rows_close(*(attend(by, *given, **options) for by in (kernels, reference)))


@pytest.mark.parametrize("top_p", [1.0, 0.5, 0.95])
@pytest.mark.parametrize(
    ("shape", "rank", "dtype"),
    [
        ((8, 2, 128), 32, BF16),
        ((8, 2, 128), 20, F16),
        ((7, 1, 128), 48, F16),
        ((6, 3, 64), 16, BF16),
        ((16, 2, 64), 40, F16),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "lens",
    [
        [9000],
        [1, 128, 129, 700, 4097, 2175, 300, 1291],
        [520 + 61 * i for i in range(40)],
        [20000] + 70 * [385],
    ],
    ids=["one", "few", "many", "one among many"],
)
def test_one_kernel_decodes_where_k_is_kept_by_token(
    lens, shape, rank, dtype, top_p, kernels
):
    """Clusters of several sizes, ragged tails, lists that thread blocks share."""
    num_heads, num_kv_heads, head_size = shape
    fmt = resolve_format("k8v4", None, head_size, has_mean=False)
    ctx = filled(lens, num_kv_heads, head_size, dtype, fmt, by=kernels)
    query = random_query(ctx, num_heads, dtype)
    budgets = [max(n // 3, 150) for n in lens]
    if len(lens) > 1:
        budgets[0] = -1 if lens[0] == 1 else 15000
    options = sparq_options(rank, head_size**-0.5, top_p=top_p, min_tokens=20)
    given = (kernels, ctx, query, budgets, options, False, 16000)
    out = torch.full_like(query, torch.nan)
    chain, got = select(*given, fmt=fmt), select(*given, out=out, fmt=fmt)
    difference = (chain["counts"] - got["counts"]).abs()
    assert (difference <= (0 if top_p == 1 else 2 + got["counts"] // 100)).all()
    for row, head in (got["counts"] >= 0).nonzero().tolist():
        count = int(got["counts"][row, head])
        kept, best = (
            set(t["indices"][row, head, :count].tolist()) for t in (got, chain)
        )
        assert len(kept) == count and len(kept - best) <= max(2, count // 50)
    scale = dict(scale=options.scale, fmt=fmt)
    assert_rows_close(out, attend(reference, ctx, query, got, **scale))

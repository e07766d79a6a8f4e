# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What every implementation of adaptive budgets must do, on any device."""

from dataclasses import replace
from typing import Any

import torch

from vllm_sparse.ops import SparqOptions, reference

from .compare import assert_close
from .generate import PagedContext
from .inputs import Kernels, Shape, attend, filled, probabilities, random_query, select


def check_top_p(
    kernels: Kernels,
    shape: Shape,
    dtype: torch.dtype,
    contexts: list[tuple[int, int]],
    options: SparqOptions,
    top_p: float,
    **given: Any,
) -> None:
    """Lists are as short as the mass allows, and hold the best tokens, in both forms of
    the op; what is attended to is what they hold, twice the same.

    Args:
        contexts: (length, most tokens to keep) pairs.
        given: to the op.
    """
    num_heads, num_kv_heads, head_size = shape
    lens, budgets = [n for n, _ in contexts], [most for _, most in contexts]
    ctx = filled(lens, num_kv_heads, head_size, dtype)
    query = random_query(ctx, num_heads, dtype)
    options = replace(options, top_p=top_p)
    where = (ctx, query, budgets, options, False, max(lens))
    want = select(reference, *where)["counts"] == -1
    outs = [None, torch.empty_like(query), torch.empty_like(query)]
    for out in outs:
        got = select(kernels, *where, out=out, **given)
        assert torch.equal(got["counts"] == -1, want)
        assert_lists_hold_the_mass(got, *where[:4], kernels.tolerance)
        if out is not None:
            scales = dict(scale=options.scale, soft_cap=options.soft_cap)
            assert_close(out, attend(reference, ctx, query, got, **scales))
    assert torch.equal(*outs[1:])  # whoever attends to a part


def assert_lists_hold_the_mass(
    got: dict[str, torch.Tensor],
    ctx: PagedContext,
    query: torch.Tensor,
    budgets: list[int],
    options: SparqOptions,
    tolerance: float,
) -> None:
    """As short as the mass allows, and of the best tokens.

    Args:
        tolerance: of a token's score; sums of scores are compared with a third of it.
    """
    adapted = 0
    for row, head in (got["counts"] >= 0).nonzero().tolist():
        length, n = int(ctx.seq_lens[row]), int(got["counts"][row, head])
        kept = got["indices"][row, head, :n].tolist()
        assert kept == sorted(set(kept)) and kept[-1] == length - 1
        assert (got["indices"][row, head, n:] == -7).all()
        scores = probabilities(ctx, query, row, head, options).sum(0)
        ranges = (options.local_window, options.sink_tokens)
        sinks, recent = reference.forced_ranges(length, *ranges)
        free = scores[sinks:recent]
        forced = len(scores) - len(free)
        most = max(budgets[row], forced)
        # As the reference would with a room that is a little smaller or larger. A bin
        # of scores is up to an eighth wide, and the lightest of it may be left in.
        room = 1 - options.top_p
        fewest = reference.top_p_count(free, 1 - room * (1 + tolerance / 3 + 1e-5))
        enough = reference.top_p_count(free, 1 - room * (0.875 - tolerance / 3))
        low, high = (
            min(max(count + forced, options.min_tokens), most)
            for count in (fewest, enough)
        )
        assert low <= n <= high, (row, head, low, n, high)
        adapted += forced < n < most
        best = set((free.argsort(descending=True)[: n - forced] + sinks).tolist())
        swapped = sorted(best ^ {t for t in kept if sinks <= t < recent})
        if swapped:
            low, high = scores[swapped].aminmax()
            assert high <= low * (1 + tolerance), (row, head, low, high)
    assert adapted > 0

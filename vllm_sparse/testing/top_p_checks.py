# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What every implementation of adaptive budgets must do, on any device."""

from collections.abc import Iterator

import torch

from .. import ops
from ..ops import reference
from .compare import assert_close
from .generate import PagedContext
from .op_inputs import (
    Shape,
    filled,
    list_buffers,
    moved,
    probabilities,
    random_query,
    select_both,
    sparq_options,
)


def check_top_p(
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
    contexts: list[tuple[int, int]],
    rank: int,
    soft_cap: float,
    top_p: float,
    tolerance: float,
    min_tokens: int = 0,
    sharpness: float = 1.0,
    workspace: torch.Tensor | None = None,
) -> None:
    """Lists are as short as the mass allows, and hold the best tokens.

    Args:
        contexts: (length, most tokens to keep) pairs.
        tolerance: of a token's score; sums of scores are compared with a third of it.
        sharpness: factor of the softmax scale.
    """
    num_heads, num_kv_heads, head_size = shape
    ctx = filled([n for n, _ in contexts], num_kv_heads, head_size, dtype)
    query = random_query(ctx, num_heads, dtype)
    budgets = torch.tensor([budget for _, budget in contexts], dtype=torch.int32)
    options = sparq_options(
        rank=rank,
        scale=sharpness * head_size**-0.5,
        soft_cap=soft_cap,
        top_p=top_p,
        min_tokens=min_tokens,
    )
    max_kept = max(n for n, _ in contexts)
    given = (ctx, query, budgets, options, device, max_kept)
    chosen, want = select_both(*given, with_mass=False)
    for got in (chosen, *attend_adaptively(*given, workspace)):
        assert torch.equal(got["counts"] == -1, want["counts"] == -1)
        assert_lists_hold_the_mass(got, ctx, query, budgets, options, tolerance)


def attend_adaptively(
    ctx: PagedContext,
    query: torch.Tensor,
    budgets: torch.Tensor,
    options: dict,
    device: torch.device,
    max_kept: int,
    workspace: torch.Tensor | None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Lists of ``sparq_attend``, once its results are known to be theirs; twice."""
    lists = list_buffers(ctx, query.shape[1], max_kept, with_mass=False)
    lists = {name: moved(t, device) for name, t in lists.items()}
    context = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    inputs = [t.to(device) for t in (*context, budgets)]
    options = dict(options, workspace=workspace)
    scales = dict(scale=options["scale"], soft_cap=options["soft_cap"])
    results = []
    for _ in range(2):
        out = torch.full_like(query, torch.nan).to(device)
        read = torch.zeros(2, dtype=torch.int64)
        counted = read[:1].to(device)
        ops.sparq_attend(*inputs, **options, **lists, out=out, tokens_read=counted)
        got = {name: t.cpu() for name, t in lists.items() if t is not None}
        want = torch.empty_like(query)
        reference.attend(
            *context, **got, kept_mass=None, **scales, out=want, tokens_read=read[1:]
        )
        assert_close(out.cpu(), want)
        assert counted.item() == read[1].item() > 0
        results.append(out)
        yield got
    assert torch.equal(*results)  # whoever attends to a part


def assert_lists_hold_the_mass(
    got: dict[str, torch.Tensor],
    ctx: PagedContext,
    query: torch.Tensor,
    budgets: torch.Tensor,
    options: dict,
    tolerance: float,
) -> None:
    """As short as the mass allows, and of the best tokens."""
    top_p, min_tokens = options["top_p"], options["min_tokens"]
    adapted = 0
    for row, head in (got["counts"] >= 0).nonzero().tolist():
        length, n = int(ctx.seq_lens[row]), int(got["counts"][row, head])
        kept = got["indices"][row, head, :n].tolist()
        assert kept == sorted(set(kept)) and kept[-1] == length - 1
        assert (got["indices"][row, head, n:] == -7).all()
        scores = probabilities(ctx, query, row, head, options).sum(0)
        sinks, recent = reference.forced_ranges(length, 16, 4)
        free = scores[sinks:recent]
        forced = len(scores) - len(free)
        most = max(int(budgets[row]), forced)
        # As the reference would with a room that is a little smaller or larger. A bin
        # of scores is up to an eighth wide, and the lightest of it may be left in.
        room = 1 - top_p
        fewest = reference.top_p_count(free, 1 - room * (1 + tolerance / 3 + 1e-5))
        enough = reference.top_p_count(free, 1 - room * (0.875 - tolerance / 3))
        low, high = (
            min(max(count + forced, min_tokens), most) for count in (fewest, enough)
        )
        assert low <= n <= high, (row, head, low, n, high)
        adapted += forced < n < most
        best = set((free.argsort(descending=True)[: n - forced] + sinks).tolist())
        swapped = sorted(best ^ {t for t in kept if sinks <= t < recent})
        if swapped:
            low, high = scores[swapped].aminmax()
            assert high <= low * (1 + tolerance), (row, head, low, high)
    assert adapted > 0

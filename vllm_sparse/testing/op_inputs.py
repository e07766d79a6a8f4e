# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the op checks share: contexts, caches on a device, lists, comparison."""

from typing import Any

import torch

from .. import ops
from ..ops import reference
from .compare import assert_close
from .generate import PagedContext, paged_context

# num_heads, num_kv_heads, head_size
Shape = tuple[int, int, int]
# Scores nearer to each other may change places: the CUDA ops keep them in 8 bits, 3 %
# off at most, and count them in bins of 1.5 %.
SCORE_TOLERANCE = {"cuda": 0.09, "triton": 1e-4}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(
    seq_lens: list[int], num_kv_heads: int, head_size: int, dtype: torch.dtype
) -> PagedContext:
    """A batch on the CPU, stored and sealed by the reference."""
    ctx = paged_context(seq_lens, num_kv_heads, head_size, dtype, generator())
    return store_and_seal(ctx)


def store_and_seal(ctx: PagedContext) -> PagedContext:
    """By the reference, in place."""
    for row in range(len(ctx.keys)):
        reference.store_kv(ctx.keys[row], ctx.values[row], ctx.kv_cache, ctx.slots(row))
    reference.seal_blocks(ctx.kv_cache, *ctx.seal_jobs(), ctx.keys[0].shape[-1])
    return ctx


def moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def moved_cache(
    kv_cache: torch.Tensor, device: torch.device, heads_apart: bool = True
) -> torch.Tensor:
    """The cache on ``device``; ``heads_apart``: blocks are nearer to each other than
    heads, else it is contiguous.
    """
    if not heads_apart:
        return kv_cache.to(device)
    apart = kv_cache.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    apart = apart.to(device)
    return apart.transpose(0, 1)


def raw(t: torch.Tensor) -> torch.Tensor:
    """[num_blocks, num_kv_heads, bytes] on the CPU."""
    return t.cpu().contiguous().view(torch.uint8).flatten(2)


def random_query(ctx: PagedContext, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (len(ctx.keys), num_heads, ctx.keys[0].shape[-1])
    return torch.randn(shape, generator=generator(7)).to(dtype)


def sparq_options(**changes: Any) -> dict[str, Any]:
    """Options of ``sparq_select``; ``changes`` give the rank and the scale at least."""
    options = dict(local_window=16, sink_tokens=4, soft_cap=0.0)
    return options | dict(top_p=1.0, min_tokens=0) | changes


def list_buffers(
    ctx: PagedContext, num_heads: int, max_kept: int, with_mass: bool = True
) -> dict[str, torch.Tensor | None]:
    """Outputs of a selection, filled with what no selection writes."""
    rows, num_kv_heads = len(ctx.keys), ctx.kv_cache.shape[1]
    return dict(
        indices=torch.full((rows, num_kv_heads, max_kept), -7, dtype=torch.int32),
        counts=torch.full((rows, num_kv_heads), -7, dtype=torch.int32),
        kept_mass=torch.full((rows, num_heads), torch.nan) if with_mass else None,
    )


def select_both(
    ctx: PagedContext,
    query: torch.Tensor,
    budgets: torch.Tensor,
    options: dict[str, Any],
    device: torch.device,
    max_kept: int,
    with_mass: bool = True,
    heads_apart: bool = True,
    workspace: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Lists of the ops on ``device`` and of the reference, both on the CPU."""
    options = sparq_options(**options)
    num_heads = query.shape[1]
    want = list_buffers(ctx, num_heads, max_kept)
    got = list_buffers(ctx, num_heads, max_kept, with_mass)
    got = {name: moved(t, device) for name, t in got.items()}
    rest = (ctx.block_table, ctx.seq_lens, budgets)
    ops.sparq_select(
        query.to(device),
        moved_cache(ctx.kv_cache, device, heads_apart),
        *(t.to(device) for t in rest),
        **options,
        **got,
        workspace=workspace,
    )
    reference.sparq_select(query, ctx.kv_cache, *rest, **options, **want)
    return {name: t.cpu() for name, t in got.items() if t is not None}, want


def probabilities(
    ctx: PagedContext,
    query: torch.Tensor,
    row: int,
    head: int,
    options: dict[str, Any],
) -> torch.Tensor:
    """The reference's estimates: [group, length]."""
    num_kv_heads = ctx.kv_cache.shape[1]
    return reference.sparq_probabilities(
        query[row].float().unflatten(0, (num_kv_heads, -1))[head],
        ctx.kv_cache,
        ctx.block_table[row],
        int(ctx.seq_lens[row]),
        head,
        options["rank"],
        options["scale"],
        options["soft_cap"],
        options.get("top_p", 1.0),
    )


def assert_same_lists(
    got: dict[str, torch.Tensor],
    want: dict[str, torch.Tensor],
    ctx: PagedContext,
    query: torch.Tensor,
    options: dict[str, Any],
    tolerance: float,
    lost: float | None = None,
) -> None:
    """Lists may differ in tokens whose scores differ by less than ``tolerance``.

    Args:
        lost: share of the best tokens' scores that they may cost, however many they
            are; None: they must be few.
    """
    assert torch.equal(got["counts"], want["counts"])
    num_kv_heads = ctx.kv_cache.shape[1]
    group = query.shape[1] // num_kv_heads
    for row, head in (want["counts"] >= 0).nonzero().tolist():
        n = int(want["counts"][row, head])
        kept = got["indices"][row, head, :n].tolist()
        best = want["indices"][row, head, :n].tolist()
        swapped = sorted(set(kept) ^ set(best))
        assert kept == sorted(set(kept))
        assert (got["indices"][row, head, n:] == -7).all()
        assert lost is not None or len(swapped) <= max(4, n // 16), (row, head, swapped)
        if not swapped and "kept_mass" not in got:
            continue
        probs = probabilities(ctx, query, row, head, options)
        if swapped:
            scores = probs.sum(0)
            low, high = scores[swapped].aminmax()
            assert high <= low * (1 + tolerance), (row, head)
            if lost is not None:
                assert scores[kept].sum() >= scores[best].sum() * (1 - lost)
        if "kept_mass" in got:
            mass = probs[:, kept].sum(-1).clamp(max=1.0)
            heads = slice(head * group, (head + 1) * group)
            # As coarse as the scores it is summed from.
            close = 1e-2 if tolerance > 1e-2 else 1e-3
            assert_close(got["kept_mass"][row, heads], mass, close)

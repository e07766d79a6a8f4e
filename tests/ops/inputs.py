# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Kernels under test, and what tests of ops share: contexts, lists, comparison."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_sparse import ops
from vllm_sparse.cache.formats import FORMATS, ROWS, KvFormat
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout
from vllm_sparse.ops import SparqOptions, reference

from .compare import assert_close
from .generate import PagedContext, paged_context

# Triton decides when it is imported: its interpreter has a process of its own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
QUANTISED = [name for name, fmt in FORMATS.items() if fmt.quantised]

# num_heads, num_kv_heads, head_size
Shape = tuple[int, int, int]
# GQA, MHA, MQA, odd sizes, wide groups.
INPUTS = [
    ((9, 3, 64), BF16),
    ((4, 4, 80), F32),
    ((4, 4, 80), F16),
    ((6, 1, 96), F16),
    ((8, 2, 128), BF16),
    ((4, 1, 256), BF16),
    ((16, 2, 64), F32),
    ((34, 2, 64), F16),
    ((7, 1, 64), F32),
    ((12, 1, 128), BF16),
]
# (length, tokens to keep or -1): shorter than a block, at its ends, several spans.
CONTEXTS = [(1, 64), (127, 64), (128, 64), (129, -1), (700, 200), (2175, 300)]
LONG = (9000, 1000)
if INTERPRETED:
    INPUTS = [((4, 2, 64), BF16), ((3, 3, 80), F16), ((17, 1, 96), F32)]
    CONTEXTS = [(1, 64), (128, 64), (300, -1), (700, 150)]
    LONG = (4500, 150)
# Scores nearer to each other may change places: the CUDA ops keep them in 8 bits, 3 %
# off at most, and count them in bins of 1.5 %.
SCORE_TOLERANCE = {"cpu": 1e-4, "triton": 1e-4, "cuda": 0.09}


class Kernels:
    """The ops of some kernels on their device, called with tensors on the CPU."""

    def __init__(self, name: str) -> None:
        self.name = name
        on_cpu = name == "cpu" or INTERPRETED
        self.device = torch.device("cpu" if on_cpu else "cuda:0")
        self.ops = ops.bound(name, self.device)
        self.tolerance = SCORE_TOLERANCE[name]

    def __getattr__(self, name: str):
        op = getattr(self.ops, name)
        if self.device.type == "cpu":
            return op
        return lambda *args, **options: self._call(op, args, options)

    def _call(self, op, args, options) -> None:
        tensors = [t for t in (*args, *options.values()) if torch.is_tensor(t)]
        there = {id(t): t.to(self.device) for t in tensors}
        named = {name: there.get(id(t), t) for name, t in options.items()}
        op(*(there.get(id(t), t) for t in args), **named)
        for t in tensors:
            t.copy_(there[id(t)])

    def skip_unless_served(self, dtype: torch.dtype, fmt: KvFormat = ROWS) -> None:
        if self.name == "cuda" and dtype == F32:
            pytest.skip("the CUDA kernels serve fp16 and bf16")
        if self.name == "triton" and fmt.quantised:
            pytest.skip("quantised formats have no Triton kernels")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(
    seq_lens: list[int],
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    fmt: KvFormat = ROWS,
    heads_apart: bool = False,
    by: Any = reference,
) -> PagedContext:
    """A stored and sealed batch on the CPU; in quantised formats the last 5 tokens of
    each row came alone."""
    ctx = paged_context(
        seq_lens,
        num_kv_heads,
        head_size,
        dtype,
        generator(),
        fmt=fmt,
        heads_apart=heads_apart,
    )
    prompt = [max(n - 5, 0) for n in seq_lens] if fmt.quantised else seq_lens
    by.store(kv_cache=ctx.kv_cache, **ctx.new_tokens(last=prompt), fmt=fmt)
    if fmt.quantised:
        by.store(kv_cache=ctx.kv_cache, **ctx.new_tokens(prompt), fmt=fmt)
    return ctx


def raw(t: torch.Tensor) -> torch.Tensor:
    """[num_blocks, num_kv_heads, bytes]"""
    return t.contiguous().view(torch.uint8).flatten(2)


def random_query(ctx: PagedContext, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (len(ctx.keys), num_heads, ctx.keys[0].shape[-1])
    return torch.randn(shape, generator=generator(7)).to(dtype)


def sparq_options(rank: int, scale: float, **changes: Any) -> SparqOptions:
    return replace(SparqOptions(rank, 16, 4, scale), **changes)


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


def select(
    by: Any,
    ctx: PagedContext,
    query: torch.Tensor,
    budgets: list[int],
    options: SparqOptions,
    with_mass: bool = True,
    max_kept: int | None = None,
    **given: Any,
) -> dict[str, torch.Tensor | None]:
    """Lists of ``sparq_attend``, alone or with what ``given`` names."""
    if max_kept is None:
        max_kept = max(budgets) + BLOCK_SIZE
    lists = list_buffers(ctx, query.shape[1], max_kept, with_mass)
    where = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    kept = torch.tensor(budgets, dtype=torch.int32)
    by.sparq_attend(*where, kept, options, **lists, **given)
    return lists


def attend(by: Any, ctx: PagedContext, query: torch.Tensor, lists: dict, **options):
    """What ``attend`` makes of lists: [rows, num_heads, head_size]."""
    out = torch.full_like(query, torch.nan)
    where = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    by.attend(*where, **lists, **options, out=out)
    return out


def attend_as_reference(kernels: Kernels, *given: Any, **options: Any) -> torch.Tensor:
    """What ``attend`` makes of lists, compared with the reference's."""
    got = attend(kernels, *given, **options)
    assert_close(got, attend(reference, *given, **options))
    return got


def probabilities(
    ctx: PagedContext,
    query: torch.Tensor,
    row: int,
    head: int,
    options: SparqOptions,
    fmt: KvFormat = ROWS,
) -> torch.Tensor:
    """The reference's estimates: [group, length]."""
    q = query[row].float().unflatten(0, (ctx.kv_cache.shape[1], -1))[head]
    where = (ctx.kv_cache, ctx.block_table[row], int(ctx.seq_lens[row]), head)
    return reference.sparq_probabilities(q, *where, options, fmt)


def assert_same_lists(
    got: dict[str, torch.Tensor | None],
    want: dict[str, torch.Tensor | None],
    ctx: PagedContext,
    query: torch.Tensor,
    options: SparqOptions,
    tolerance: float,
    lost: float | None = None,
    fmt: KvFormat = ROWS,
) -> None:
    """Lists may differ in tokens whose scores differ by less than ``tolerance``.

    Args:
        lost: share of the best tokens' scores that they may cost, however many they
            are; None: they must be few.
    """
    assert torch.equal(got["counts"], want["counts"])
    num_kv_heads, mass = ctx.kv_cache.shape[1], got["kept_mass"]
    for row, head in (want["counts"] >= 0).nonzero().tolist():
        n = int(want["counts"][row, head])
        kept = got["indices"][row, head, :n].tolist()
        best = want["indices"][row, head, :n].tolist()
        swapped = sorted(set(kept) ^ set(best))
        assert kept == sorted(set(kept))
        assert (got["indices"][row, head, n:] == -7).all()
        assert lost is not None or len(swapped) <= max(4, n // 16), (row, head, swapped)
        if not swapped and mass is None:
            continue
        probs = probabilities(ctx, query, row, head, options, fmt)
        if swapped:
            scores = probs.sum(0)
            low, high = scores[swapped].aminmax()
            assert high <= low * (1 + tolerance), (row, head)
            if lost is not None:
                assert scores[kept].sum() >= scores[best].sum() * (1 - lost)
        if mass is not None:
            wanted = probs[:, kept].sum(-1).clamp(max=1.0)
            of_head = mass[row].unflatten(0, (num_kv_heads, -1))[head]
            # As coarse as the scores it is summed from.
            assert_close(of_head, wanted, 1e-2 if tolerance > 1e-2 else 1e-3)
    if mass is not None:
        assert (mass[got["counts"][:, 0] == -1] == 1).all()


def stored_parts(ctx: PagedContext, cache: torch.Tensor, lens: list[int], fmt):
    """Of contexts in a quantised cache: codes and params of sealed blocks, their means,
    and rows of tails."""
    head_size = ctx.keys[0].shape[-1]
    lay = BlockLayout(head_size, cache.element_size(), fmt)
    end, codes, means, rows = lay.prefix_mean_offset, [], [], []
    for blocks, length in zip(ctx.block_table, lens):
        sealed = max(fmt.sealed_blocks(length), 0)
        chunks = raw(cache[blocks[:sealed].long()])
        codes.append(chunks[..., :end])
        mean = chunks[..., end:][..., : 2 * head_size * fmt.has_mean]
        means.append(mean.contiguous().view(torch.float16))
        tail = torch.arange(sealed * BLOCK_SIZE, length)
        rows.append(reference.context_rows(cache, blocks, tail, lay))
    return torch.cat(codes), torch.cat(means), torch.cat(rows)

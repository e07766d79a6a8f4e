# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Quantised caches, stored step by step, and the ops on either device."""

import pytest
import torch

from vllm_sparse import ops
from vllm_sparse.cache.formats import FORMATS, KvFormat
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout
from vllm_sparse.ops import reference
from vllm_sparse.testing.generate import PagedContext, paged_context

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = [name for name, fmt in FORMATS.items() if fmt.quantised]
# num_heads, num_kv_heads, head_size, dtype
SHAPES = [
    ((9, 3, 64), torch.bfloat16),
    ((9, 3, 64), torch.float16),
    ((4, 4, 80), torch.float32),
    ((8, 2, 128), torch.bfloat16),
    ((4, 1, 256), torch.float32),
    ((7, 1, 64), torch.float32),
]
SEQ_LENS = [1, 127, 128, 129, 256, 400]


class Kernels:
    """The ops on a device, called with tensors on the CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        # On a GPU, tokens alone are counted.
        self.counters = 3 if device == "cpu" else 1

    def __getattr__(self, name: str):
        op = getattr(ops, name)
        return op if self.device == "cpu" else lambda *a, **k: self._call(op, a, k)

    def _call(self, op, args, options) -> None:
        tensors = [t for t in (*args, *options.values()) if torch.is_tensor(t)]
        moved = {id(t): t.to(self.device) for t in tensors}
        op(
            *(moved.get(id(t), t) for t in args),
            **{name: moved.get(id(t), t) for name, t in options.items()},
        )
        for t in tensors:
            t.copy_(moved[id(t)])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def context(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    fmt: KvFormat,
    seq_lens: list[int] = SEQ_LENS,
) -> PagedContext:
    _, num_kv_heads, head_size = shape
    return paged_context(seq_lens, num_kv_heads, head_size, dtype, generator(), fmt=fmt)


def store(ctx: PagedContext, fmt: KvFormat, steps: list[list[int]], by) -> torch.Tensor:
    """Store contexts step by step; returns the cache.

    Args:
        steps: the lengths that the rows have after each step; a row whose length goes
            down had drafts rejected.
    """
    cache = ctx.kv_cache.clone()
    done = [0] * len(ctx.keys)
    for lengths in steps:
        keys, values, starts = [], [], [0]
        for row, length in enumerate(lengths):
            first = min(done[row], length)
            keys.append(ctx.keys[row][first:length])
            values.append(ctx.values[row][first:length])
            starts.append(starts[-1] + length - first)
        done = list(lengths)
        args = (torch.cat(keys), torch.cat(values), cache, ctx.block_table)
        rest = (torch.tensor(lengths).int(), torch.tensor(starts).int())
        by.store_quantised(*args, *rest, fmt)
    return cache


def filled(shape, dtype, fmt, seq_lens=SEQ_LENS) -> PagedContext:
    """Prefilled up to the last 5 tokens of each row, which are decoded."""
    ctx = context(shape, dtype, fmt, seq_lens)
    prompt = [max(length - 5, 0) for length in seq_lens]
    steps = [prompt] + [
        [min(p + i, length) for p, length in zip(prompt, seq_lens)] for i in range(1, 6)
    ]
    ctx.kv_cache = store(ctx, fmt, steps, by=reference)
    return ctx


def parts(ctx: PagedContext, cache: torch.Tensor, fmt: KvFormat):
    """Codes and params of sealed blocks, their means, and rows of tails."""
    head_size = ctx.keys[0].shape[-1]
    lay = BlockLayout(head_size, cache.element_size(), fmt)
    codes, means, rows = [], [], []
    for row, length in enumerate(ctx.seq_lens.tolist()):
        sealed = fmt.sealed_blocks(length)
        for head in range(cache.shape[1]):
            for i in range(sealed):
                chunk = cache[int(ctx.block_table[row, i]), head].reshape(-1)
                chunk = chunk.view(torch.uint8)
                codes.append(chunk[: lay.prefix_mean_offset])
                mean = chunk[lay.prefix_mean_offset :][: 2 * head_size * fmt.has_mean]
                means.append(mean.view(torch.float16))
            tail = reference.tail_rows(cache, ctx.block_table[row], sealed, head, lay)
            rows += tail[: length - sealed * BLOCK_SIZE]
    return torch.cat(codes), torch.cat(means), torch.stack(rows)


def chunked(lengths: list[int], size: int) -> list[list[int]]:
    steps = range(size, max(lengths) + size, size)
    return [[min(at, length) for length in lengths] for at in steps]

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""SparQ selection (arXiv 2312.04985, section 3) as a chain of small kernels.

prepare: channels and scaled queries -> score: logits -> normaliser and pool: ranking ->
top_p: budgets -> refine, twice: the cut -> count and list: positions -> mass.
"""

import torch
import triton

from ...cache.layout import BlockLayout
from ...ops.kept import add_counts
from .attend import attend
from .checks import check, check_lists, check_rows, check_sinks, expect, rows_only
from .common import BLOCK_SIZE, cache_args, row_chunks, sidecar_args
from .pool import normaliser_kernel, pool_kernel
from .prepare import prepare_kernel
from .score import BLOCKS, CHANNELS, score_kernel
from .threshold import HISTOGRAM, SPAN, count_kernel, refine_kernel
from .top_p import top_p_kernel
from .write_lists import list_kernel, mass_kernel


def sparq_attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    budgets: torch.Tensor,
    sizes: list[int],
    numbers: list[float],
    indices: torch.Tensor,
    counts: torch.Tensor,
    kept_mass: torch.Tensor | None,
    out: torch.Tensor | None,
    kept_histogram: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    kv_format: int = 0,
    sinks: torch.Tensor | None = None,
) -> None:
    """See :meth:`vllm_sparse.ops.Ops.sparq_attend`; ``workspace`` is not used."""
    rows_only(kv_format)
    lay = check_rows(query, kv_cache, block_table, seq_lens)
    num_rows, _, head_size = query.shape
    check(budgets, "budgets", kv_cache, torch.int32, (num_rows,))
    lists = (indices, counts, kept_mass)
    check_lists(query, kv_cache, *lists)
    check_sinks(sinks, query, kept_mass)
    rank, local_window, sink_tokens, min_tokens = sizes
    scale, soft_cap, top_p = numbers
    expect(
        1 <= rank <= head_size, f"rank must lie between 1 and head_size = {head_size}"
    )
    expect(local_window >= 1, "local_window must be at least 1")
    expect(sink_tokens >= 0, "sink_tokens must not be negative")
    expect(0 < top_p <= 1, "top_p must lie in (0, 1]")
    expect(min_tokens >= 0, "min_tokens must not be negative")
    if num_rows == 0 or block_table.shape[1] == 0:
        return
    context = (query, kv_cache, block_table, seq_lens)
    _select(*context, budgets, sizes, numbers, *lists, lay)
    if out is not None:
        attend(*context, *lists, scale, soft_cap, out, sinks=sinks)
    if kept_histogram is not None:
        add_counts(counts, kept_histogram)


def _select(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    budgets: torch.Tensor,
    sizes: list[int],
    numbers: list[float],
    indices: torch.Tensor,
    counts: torch.Tensor,
    kept_mass: torch.Tensor | None,
    lay: BlockLayout,
) -> None:
    """The chain of kernels."""
    rank, local_window, sink_tokens, min_tokens = sizes
    scale, soft_cap, top_p = numbers
    num_rows, num_heads, head_size = query.shape
    num_kv_heads, max_blocks = kv_cache.shape[1], block_table.shape[1]
    group = num_heads // num_kv_heads
    capacity = max_blocks * BLOCK_SIZE.value
    spans = triton.cdiv(capacity, SPAN.value)
    padded = triton.next_power_of_2(spans)

    # Tensors of their own: Triton compiles anew where a pointer is aligned otherwise,
    # which must not happen while a CUDA graph is captured.
    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    # Logits of the query heads and the ranking; the rest is small.
    bytes_per_row = (num_heads + num_kv_heads) * capacity * 4
    for rows in row_chunks(num_rows, bytes_per_row):
        lens = seq_lens[rows]
        items = lens.shape[0] * num_kv_heads
        budget = scratch(items, dtype=torch.int32)
        budget.view(-1, num_kv_heads).copy_(budgets[rows, None])
        table, chosen, count = block_table[rows], indices[rows], counts[rows]
        mass = count if kept_mass is None else kept_mass[rows]
        options = dict(
            num_kv_heads=num_kv_heads,
            max_blocks=max_blocks,
            local_window=local_window,
            sink_tokens=sink_tokens,
        )
        channels = scratch(items, head_size, dtype=torch.int32)
        scaled = scratch(items, group, head_size)
        histogram = scratch(items, HISTOGRAM.value, dtype=torch.int32)
        cache = cache_args(kv_cache, lay)
        prepare_kernel[(items,)](
            query[rows],
            lens,
            budget,
            channels,
            scaled,
            histogram,
            count,
            mass,
            query.stride(0),
            group=group,
            rank=rank,
            scale=scale,
            **options,
            HEAD_SIZE=head_size,
            WIDTH=cache["WIDTH"],
            WITH_MASS=kept_mass is not None,
            TEMPERED=top_p >= 1,
            num_warps=8 if head_size > 128 else 4,
        )
        logits = scratch(items, group, capacity)
        score_kernel[items, triton.cdiv(max_blocks, BLOCKS.value)](
            table,
            lens,
            budget,
            channels,
            scaled,
            logits,
            table.stride(0),
            group=group,
            soft_cap=soft_cap,
            **options,
            **cache,
            **sidecar_args(lay),
            STEPS=triton.cdiv(rank, CHANNELS.value),
        )
        # Wide spans: each program walks through the histogram.
        wide = dict(**options, num_warps=8)
        top, total = (scratch(items, group, spans) for _ in range(2))
        normaliser_kernel[items, spans](
            lens, budget, logits, top, total, group=group, **wide
        )
        norm = scratch(items, group)
        keys = scratch(items, capacity, dtype=torch.int32)
        pool_kernel[items, spans](
            lens,
            budget,
            logits,
            top,
            total,
            norm,
            keys,
            histogram,
            group=group,
            **wide,
            SPANS=padded,
        )
        if top_p < 1:
            top_p_kernel[(items,)](
                lens,
                budget,
                histogram,
                **options,
                min_tokens=min_tokens,
                room=1 - top_p,
            )
        ranking = (lens, budget, keys, histogram)
        for level in (1, 2):
            refine_kernel[items, spans](*ranking, **wide, LEVEL=level)
        counted = scratch(items, spans, 2, dtype=torch.int32)
        cut = scratch(items, 2, dtype=torch.int32)
        count_kernel[items, spans](*ranking, counted, cut, **wide)
        span_mass = scratch(items, group, spans)
        list_kernel[items, spans](
            lens,
            budget,
            keys,
            counted,
            cut,
            logits,
            norm,
            chosen,
            count,
            span_mass,
            group=group,
            **wide,
            max_kept=indices.shape[2],
            SPANS=padded,
            WITH_MASS=kept_mass is not None,
        )
        if kept_mass is not None:
            mass_kernel[(items,)](
                lens,
                budget,
                span_mass,
                mass,
                group=group,
                **options,
                spans=spans,
                SPANS=padded,
            )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Writing the kept positions in ascending order, and the mass they hold."""

import triton.language as tl

from .common import BLOCK_SIZE, kernel
from .plan import plan_row
from .threshold import SPAN, candidate_keys


@kernel
def list_kernel(
    seq_lens_ptr,  # [num_rows] int32
    budgets_ptr,  # [items] int32
    keys_ptr,  # [items, max_blocks * BLOCK_SIZE] int32
    counted_ptr,  # [items, spans, 2] int32
    cut_ptr,  # [items, 2] int32
    logits_ptr,  # [items, group, max_blocks * BLOCK_SIZE] fp32
    norm_ptr,  # [items, group] fp32
    indices_ptr,  # [items, max_kept] int32, written
    counts_ptr,  # [items] int32, written
    mass_ptr,  # [items, group, spans] fp32, written: mass kept of these tokens
    num_kv_heads,
    group,
    max_blocks,
    local_window,
    sink_tokens,
    max_kept,
    SPANS: tl.constexpr,  # spans, rounded up to a power of 2
    WITH_MASS: tl.constexpr,
):
    """One program per item and SPAN tokens."""
    item, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = item // num_kv_heads
    length, dense, sinks, recent, wanted = plan_row(
        seq_lens_ptr, budgets_ptr, row, item, max_blocks, local_window, sink_tokens
    )
    if dense | (span * SPAN >= length):
        return
    spans = tl.num_programs(1)
    earlier = tl.arange(0, SPANS)
    at = counted_ptr + (item * spans + earlier) * 2
    above_before = tl.sum(tl.load(at, mask=earlier < span, other=0), 0)
    equal_before = tl.sum(tl.load(at + 1, mask=earlier < span, other=0), 0)
    cut = tl.load(cut_ptr + 2 * item)
    need = tl.load(cut_ptr + 2 * item + 1)

    t = span * SPAN + tl.arange(0, SPAN)
    keys = candidate_keys(keys_ptr, item, t, sinks, recent, max_blocks)
    above, equal = (keys > cut).to(tl.int32), (keys == cut).to(tl.int32)
    above_place = above_before + tl.cumsum(above, 0) - above
    equal_place = equal_before + tl.cumsum(equal, 0) - equal
    # Ties go to the lower position.
    chosen = (above > 0) | ((equal > 0) & (equal_place < need))
    forced = (t < sinks) | ((t >= recent) & (t < length))
    place = tl.where(t < sinks, t, sinks + wanted + t - recent)
    best = sinks + above_place + tl.minimum(equal_place, need)
    place = tl.where(chosen, best, place)
    kept = chosen | forced
    to = indices_ptr + item * max_kept + place
    tl.store(to, t, mask=kept & (place < max_kept))
    if span == 0:
        tl.store(
            counts_ptr + item, tl.minimum(sinks + wanted + length - recent, max_kept)
        )
    if WITH_MASS:
        for g in range(group):
            head = item * group + g
            from_ptr = logits_ptr + head * (max_blocks * BLOCK_SIZE) + t
            logits = tl.load(from_ptr, mask=kept, other=float("-inf"))
            mass = tl.sum(tl.exp(logits - tl.load(norm_ptr + head)), 0)
            tl.store(mass_ptr + head * spans + span, mass)


@kernel
def mass_kernel(
    seq_lens_ptr,  # [num_rows] int32
    budgets_ptr,  # [items] int32
    mass_ptr,  # [items, group, spans] fp32
    kept_mass_ptr,  # [items, group] fp32, written
    num_kv_heads,
    group,
    max_blocks,
    local_window,
    sink_tokens,
    spans,
    SPANS: tl.constexpr,
):
    """One program per item adds up the spans, in an order that is always the same."""
    item = tl.program_id(0).to(tl.int64)
    length, dense, _, _, _ = plan_row(
        seq_lens_ptr,
        budgets_ptr,
        item // num_kv_heads,
        item,
        max_blocks,
        local_window,
        sink_tokens,
    )
    if dense:
        return
    span = tl.arange(0, SPANS)
    for g in range(group):
        head = item * group + g
        mass = tl.load(
            mass_ptr + head * spans + span, mask=span * SPAN < length, other=0.0
        )
        tl.store(kept_mass_ptr + head, tl.minimum(tl.sum(mass, 0), 1.0))

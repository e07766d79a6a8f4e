# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The cut of a ranking by radix selection: histograms of ever lower bits.

Keys are 31-bit integers, taken in digits of 11, 10 and 10 bits. Each level counts,
among the keys that share the digits found so far, how often each value of the next
digit occurs; the digit in which the wanted number is reached is the next one found.
"""

import triton
import triton.language as tl

from .common import BLOCK_SIZE, kernel
from .plan import plan_row

SPAN = tl.constexpr(4096)  # tokens of a program
HISTOGRAM = tl.constexpr(2048 + 1024 + 1024)  # counters of an item: all levels


@triton.jit
def add_histogram(histogram_ptr, keys, counted, LEVEL: tl.constexpr):
    """Counts the digit of one level in ``keys``."""
    BINS: tl.constexpr = 2048 if LEVEL == 0 else 1024
    FIRST: tl.constexpr = 0 if LEVEL == 0 else 1024 + 1024 * LEVEL
    digit = (keys >> (20 - 10 * LEVEL)) & (BINS - 1)
    # Not tl.histogram: with this many bins it takes ten times as many instructions.
    one = tl.full(digit.shape, 1, tl.int32)
    tl.atomic_add(histogram_ptr + FIRST + digit, one, mask=counted, sem="relaxed")


@triton.jit
def find_digit(histogram_ptr, wanted, LEVEL: tl.constexpr):
    """The digit in which the ``wanted``-th largest key is reached, and how many of the
    keys with that digit are wanted."""
    BINS: tl.constexpr = 2048 if LEVEL == 0 else 1024
    FIRST: tl.constexpr = 0 if LEVEL == 0 else 1024 + 1024 * LEVEL
    i = tl.arange(0, BINS)
    # From the largest digit down.
    counts = tl.load(histogram_ptr + FIRST + BINS - 1 - i)
    seen = tl.cumsum(counts, 0)
    above = seen < wanted
    digit = BINS - 1 - tl.sum(above.to(tl.int32), 0)
    return digit, wanted - tl.max(tl.where(above, seen, 0), 0)


@triton.jit
def find_prefix(histogram_ptr, wanted, LEVELS: tl.constexpr):
    """The same of the first LEVELS digits together."""
    prefix, wanted = find_digit(histogram_ptr, wanted, 0)
    for level in tl.static_range(1, LEVELS):
        digit, wanted = find_digit(histogram_ptr, wanted, level)
        prefix = prefix * 1024 + digit
    return prefix, wanted


@triton.jit
def candidate_keys(keys_ptr, item, t, sinks, recent, max_blocks):
    """Keys of candidates, -1 for other tokens."""
    candidate = (t >= sinks) & (t < recent)
    at = keys_ptr + item * (max_blocks * BLOCK_SIZE) + t
    return tl.load(at, mask=candidate, other=-1)


@kernel
def refine_kernel(
    seq_lens_ptr,  # [num_rows] int32
    budgets_ptr,  # [items] int32
    keys_ptr,  # [items, max_blocks * BLOCK_SIZE] int32
    histogram_ptr,  # [items, HISTOGRAM] int32, level LEVEL added to
    num_kv_heads,
    max_blocks,
    local_window,
    sink_tokens,
    LEVEL: tl.constexpr,
):
    """One program per item and SPAN tokens."""
    item, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = item // num_kv_heads
    _, dense, sinks, recent, wanted = plan_row(
        seq_lens_ptr, budgets_ptr, row, item, max_blocks, local_window, sink_tokens
    )
    if dense | (span * SPAN >= recent):
        return
    histogram = histogram_ptr + item * HISTOGRAM
    prefix, _ = find_prefix(histogram, wanted, LEVEL)
    t = span * SPAN + tl.arange(0, SPAN)
    keys = candidate_keys(keys_ptr, item, t, sinks, recent, max_blocks)
    SHIFT: tl.constexpr = 30 - 10 * LEVEL
    add_histogram(histogram, keys, (keys >> SHIFT) == prefix, LEVEL)


@kernel
def count_kernel(
    seq_lens_ptr,  # [num_rows] int32
    budgets_ptr,  # [items] int32
    keys_ptr,  # [items, max_blocks * BLOCK_SIZE] int32
    histogram_ptr,  # [items, HISTOGRAM] int32
    counted_ptr,  # [items, spans, 2] int32, written: keys above the cut and equal to it
    cut_ptr,  # [items, 2] int32, written: the cut, and how many equal keys to keep
    num_kv_heads,
    max_blocks,
    local_window,
    sink_tokens,
):
    """One program per item and SPAN tokens."""
    item, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = item // num_kv_heads
    length, dense, sinks, recent, wanted = plan_row(
        seq_lens_ptr, budgets_ptr, row, item, max_blocks, local_window, sink_tokens
    )
    if dense | (span * SPAN >= length):
        return
    cut, need = find_prefix(histogram_ptr + item * HISTOGRAM, wanted, 3)
    t = span * SPAN + tl.arange(0, SPAN)
    keys = candidate_keys(keys_ptr, item, t, sinks, recent, max_blocks)
    to = counted_ptr + (item * tl.num_programs(1) + span) * 2
    tl.store(to, tl.sum((keys > cut).to(tl.int32), 0))
    tl.store(to + 1, tl.sum((keys == cut).to(tl.int32), 0))
    if span == 0:
        tl.store(cut_ptr + 2 * item, cut)
        tl.store(cut_ptr + 2 * item + 1, need)

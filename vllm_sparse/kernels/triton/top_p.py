# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Budgets that adapt: as few tokens as leave little of the probability mass outside."""

import triton.language as tl

from .common import kernel
from .plan import plan_row
from .threshold import HISTOGRAM


@kernel
def top_p_kernel(
    seq_lens_ptr,  # [num_rows] int32
    budgets_ptr,  # [items] int32, the most to keep; lowered
    histogram_ptr,  # [items, HISTOGRAM] int32, its first level counted
    num_kv_heads,
    max_blocks,
    local_window,
    sink_tokens,
    min_tokens,
    room,  # mass that may be left out
):
    """One program per item.

    A token counts with the upper end of its bin, so that no more than ``room`` is left
    out; bins are eight to an octave.
    """
    item = tl.program_id(0).to(tl.int64)
    row = item // num_kv_heads
    length, dense, sinks, recent, wanted = plan_row(
        seq_lens_ptr, budgets_ptr, row, item, max_blocks, local_window, sink_tokens
    )
    if dense:
        return
    i = tl.arange(0, 2048)  # the lightest first
    counts = tl.load(histogram_ptr + item * HISTOGRAM + i)
    value = ((i + 1) << 20).to(tl.float32, bitcast=True)
    value = tl.where(i < 2039, value, 3.0e38)  # of infinity and beyond
    mass = tl.cumsum(counts.to(tl.float32) * value, 0)
    whole = mass <= room
    left_out = tl.sum(tl.where(whole, counts, 0), 0)
    # Of the first bin that may not go as a whole, a part may.
    cut = tl.sum(whole.to(tl.int32), 0)
    before = tl.max(tl.where(whole, mass, 0.0), 0)
    at_cut = i == cut
    share = (room - before) / tl.sum(tl.where(at_cut, value, 0.0), 0)
    in_bin = tl.sum(tl.where(at_cut, counts, 0), 0)
    left_out += tl.minimum(share, in_bin.to(tl.float32)).to(tl.int32)
    forced = sinks + length - recent
    enough = tl.maximum(recent - sinks - left_out, min_tokens - forced)
    tl.store(budgets_ptr + item, forced + tl.minimum(wanted, tl.maximum(enough, 0)))

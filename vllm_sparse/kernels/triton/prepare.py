# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""SparQ's channels: where the group's queries are largest."""

import triton.language as tl

from .common import kernel
from .plan import plan_row
from .threshold import HISTOGRAM


@kernel
def prepare_kernel(
    query_ptr,  # [num_rows, num_kv_heads * group, HEAD_SIZE]
    seq_lens_ptr,  # [num_rows] int32
    budgets_ptr,  # [items] int32
    channels_ptr,  # [items, HEAD_SIZE] int32, written: best first
    scaled_ptr,  # [items, group, HEAD_SIZE] fp32, written: query in that order, scaled
    histogram_ptr,  # [items, HISTOGRAM] int32, written: zeros
    counts_ptr,  # [items] int32, written for dense rows: -1
    kept_mass_ptr,  # [items, group] fp32, written for dense rows: 1
    query_stride,
    num_kv_heads,
    group,
    max_blocks,
    rank,
    local_window,
    sink_tokens,
    scale,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WITH_MASS: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    """One program per item, that is (row, KV head). Beyond ``rank``, queries are 0."""
    item = tl.program_id(0).to(tl.int64)
    row, head = item // num_kv_heads, item % num_kv_heads
    _, dense, _, _, _ = plan_row(
        seq_lens_ptr, budgets_ptr, row, item, max_blocks, local_window, sink_tokens
    )
    if dense:
        tl.store(counts_ptr + item, -1)
        if WITH_MASS:
            for g in range(group):
                tl.store(kept_mass_ptr + item * group + g, 1.0)
        return

    bins = histogram_ptr + item * HISTOGRAM + tl.arange(0, HISTOGRAM)
    tl.store(bins, tl.zeros([HISTOGRAM], tl.int32))
    d = tl.arange(0, WIDTH)
    valid = d < HEAD_SIZE
    queries = query_ptr + row * query_stride + head * group * HEAD_SIZE + d
    magnitude = tl.zeros([WIDTH], tl.float32)
    for g in range(group):
        q = tl.load(queries + g * HEAD_SIZE, mask=valid, other=0.0)
        magnitude += tl.abs(q.to(tl.float32))
    magnitude = tl.where(magnitude >= 0, magnitude, 0.0)  # NaN compares with nothing
    magnitude = tl.where(valid, magnitude, -1.0)
    mine, other = magnitude[:, None], magnitude[None, :]
    before = (other > mine) | ((other == mine) & (d[None, :] < d[:, None]))
    place = tl.sum(before.to(tl.int32), 1)
    tl.store(channels_ptr + item * HEAD_SIZE + place, d, mask=valid)
    read = valid & (place < rank)
    for g in range(group):
        q = tl.load(queries + g * HEAD_SIZE, mask=valid, other=0.0).to(tl.float32)
        all_sum = tl.sum(tl.abs(q), 0)
        read_sum = tl.sum(tl.where(read, tl.abs(q), 0.0), 0)
        factor = tl.where(read_sum > 0, scale, 0.0)
        if TEMPERED:  # the paper's temperature, where mass does not decide
            factor *= tl.sqrt(all_sum / tl.where(read_sum > 0, read_sum, 1.0))
        to = scaled_ptr + (item * group + g) * HEAD_SIZE + place
        tl.store(to, tl.where(read, q * factor, 0.0), mask=valid)

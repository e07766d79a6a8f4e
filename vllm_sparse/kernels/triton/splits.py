# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How attention divides a row's tokens among programs."""

import triton
import triton.language as tl

from .common import context_length

# Parts of a list. A constant: sums must not depend on the batch.
SPLITS = tl.constexpr(32)


@triton.jit
def tokens_of(
    seq_lens_ptr,
    counts_ptr,
    item,
    row,
    max_blocks,
    max_kept,
    LISTED: tl.constexpr,
):
    """(length of the context, tokens to attend, whether they are listed)."""
    length = context_length(seq_lens_ptr, row, max_blocks)
    count = length
    listed = False
    if LISTED:
        entries = tl.load(counts_ptr + item)
        listed = entries >= 0
        count = tl.where(listed, tl.minimum(entries, max_kept), length)
    return length, count, listed


@triton.jit
def share_of(count, TILE: tl.constexpr):
    """Tokens of one split, whole tiles."""
    return (count + SPLITS * TILE - 1) // (SPLITS * TILE) * TILE

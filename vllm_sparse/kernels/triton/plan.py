# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which tokens of a row are always kept, and how many of the others."""

import triton
import triton.language as tl

from .common import BLOCK_SIZE, context_length


@triton.jit
def plan_row(
    seq_lens_ptr, budgets_ptr, row, item, max_blocks, local_window, sink_tokens
):
    """(length, dense, sinks, recent, wanted) of an item, that is (row, KV head).

    Tokens before ``sinks`` and from ``recent`` are kept, and the best ``wanted`` in
    between; a dense row keeps everything.
    """
    length = context_length(seq_lens_ptr, row, max_blocks)
    budget = tl.load(budgets_ptr + item)
    sealed = length // BLOCK_SIZE * BLOCK_SIZE
    recent = tl.maximum(tl.minimum(length - local_window, sealed), 0)
    dense = (budget < 0) | (budget >= length) | (recent <= sink_tokens)
    sinks = tl.minimum(recent, sink_tokens)
    wanted = tl.maximum(budget - sinks - (length - recent), 0)
    return length, dense, sinks, recent, wanted

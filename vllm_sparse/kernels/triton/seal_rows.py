# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sealing what decode rows have filled: one job per row, most of them empty."""

import torch

from .checks import check, check_cache, expect
from .common import BLOCK_SIZE
from .seal_blocks import seal_blocks


def seal_rows(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    head_size: int,
) -> None:
    """See :func:`vllm_sparse.ops.seal_rows`."""
    check_cache(kv_cache, head_size)
    expect(seq_lens.dim() == 1, "seq_lens must have 1 dimensions")
    rows = seq_lens.shape[0]
    check(seq_lens, "seq_lens", kv_cache, torch.int32, (rows,))
    check(query_start_loc, "query_start_loc", kv_cache, torch.int32, (rows + 1,))
    expect(block_table.dim() == 2, "block_table must have 2 dimensions")
    check(block_table, "block_table", kv_cache, torch.int32, (rows, None))
    full = seq_lens // BLOCK_SIZE
    computed = seq_lens - query_start_loc.diff()
    index = (full - 1).clamp(0, block_table.shape[1] - 1)
    places = torch.stack([index, (index - 1).clamp(min=0)], dim=1)
    block, prev = block_table.gather(1, places.long()).T
    filled = (full > 0) & (computed < full * BLOCK_SIZE) & (block > 0)
    seal_blocks(
        kv_cache,
        torch.where(filled, block, -1),
        torch.where(index > 0, prev, -1),
        index,
        head_size,
    )

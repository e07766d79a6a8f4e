# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How many tokens a row keeps, by the length of its context."""

import torch

from ..cache.formats import ROWS, KvFormat
from ..cache.layout import BLOCK_SIZE
from ..config import SparseConfig


def budgets(
    seq_lens: torch.Tensor, config: SparseConfig, fmt: KvFormat = ROWS
) -> torch.Tensor:
    """Tokens to keep of contexts, sinks, window and tail included: int32.

    -1: the row is dense, as one of no tokens (padding) is. With ``top_p`` it is the
    most to keep.

    Args:
        seq_lens: int64.
        config: resolved.
    """
    lens = seq_lens
    most = config.top_k if config.top_p is None else config.max_tokens
    if isinstance(most, float):
        floor = config.local_window + config.sink_tokens
        if config.top_p is not None:
            floor = max(floor, config.min_tokens)
        kept = (most * lens.double()).ceil().long().clamp(min=floor)
    else:
        kept = torch.full_like(lens, most)
    if config.top_p is not None:
        # A row that may keep everything is not one that has to.
        adapts = config.min_tokens < lens
        kept = torch.where(adapts, kept.minimum(lens - 1), kept)
    sealed = fmt.sealed_blocks(lens) * BLOCK_SIZE
    forced = config.sink_tokens + (lens - sealed).clamp(min=config.local_window)
    kept = kept.maximum(forced)
    dense = kept >= lens
    dense |= (lens - config.local_window).minimum(sealed) <= config.sink_tokens
    dense |= lens < config.dense_below
    dense |= lens <= 0
    return kept.masked_fill(dense, -1).int()


def budget(seq_len: int, config: SparseConfig, fmt: KvFormat = ROWS) -> int:
    """:func:`budgets` of one context."""
    return int(budgets(torch.tensor(seq_len), config, fmt))

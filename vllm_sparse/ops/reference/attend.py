# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Exact attention, and the mean-value term."""

import torch

from ...cache.formats import ROWS
from ...cache.layout import BLOCK_SIZE, BlockLayout
from .codes import prefix_mean
from .context import context


def attend(
    query,
    kv_cache,
    block_table,
    seq_lens,
    *,
    indices=None,
    counts=None,
    kept_mass=None,
    scale,
    soft_cap=0.0,
    out,
    workspace=None,
    fmt=ROWS,
    sinks=None,
    lse=None,
) -> None:
    """Exact softmax attention over the listed tokens (SparQ's steps 2 and 3).

    ``counts`` of -1, or no lists at all, mean the whole context. With ``kept_mass``
    (alpha), the result is ``alpha * y + (1 - alpha) * mean(V)``, the mean taken over
    the whole context from the last sealed block's prefix mean and the tail's rows.
    ``sinks`` are a logit of every query head that joins the softmax and has no value.
    ``lse`` gets the logarithm of the softmax's denominator, sinks included.
    """
    num_kv_heads, head_size = kv_cache.shape[1], query.shape[-1]
    group = query.shape[1] // num_kv_heads
    lay = BlockLayout(head_size, kv_cache.element_size(), fmt)
    for row, length in enumerate(seq_lens.tolist()):
        for head in range(num_kv_heads):
            k, v = context(kv_cache, block_table[row], length, head, head_size, fmt)
            kept = torch.arange(length)
            if counts is not None and counts[row, head] >= 0:
                kept = indices[row, head, : int(counts[row, head])].long()
            heads = slice(head * group, (head + 1) * group)
            logits = query[row, heads].float() @ k[kept].T * scale
            if soft_cap > 0:
                logits = soft_cap * (logits / soft_cap).tanh()
            if sinks is not None:
                logits = torch.cat([logits, sinks[heads, None].float()], 1)
            if lse is not None:
                lse[row, heads] = logits.logsumexp(-1)
            y = logits.softmax(-1)[:, : len(kept)] @ v[kept]
            if kept_mass is not None:
                sealed = fmt.sealed_blocks(length)
                total = v[sealed * BLOCK_SIZE :].sum(0)
                if sealed:
                    chunk = kv_cache[int(block_table[row, sealed - 1]), head]
                    total = total + prefix_mean(chunk, lay) * (sealed * BLOCK_SIZE)
                alpha = kept_mass[row, heads].unsqueeze(-1)
                y = alpha * y + (1 - alpha) * total / length
            out[row, heads] = y.to(out.dtype)

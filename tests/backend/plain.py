# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Attention in plain PyTorch, fp32."""

import torch

from vllm_sparse.cache.layout import BLOCK_SIZE


def plain_attention(query, key, value, rows, block_table, shape, out) -> None:
    """What FlashAttention computes, from the views that it is given."""
    starts = rows.query_start_loc.tolist()
    for row, length in enumerate(rows.seq_lens.tolist()):
        tokens = slice(starts[row], starts[row + 1])
        blocks = block_table[row, : -(-length // BLOCK_SIZE)].long()
        k, v = (t[blocks].flatten(0, 1)[:length] for t in (key, value))
        assert length <= rows.max_seq_len
        assert tokens.stop - tokens.start <= rows.max_query_len
        out[tokens] = causal_attention(
            query[tokens], k, v, shape.scale, shape.soft_cap, shape.sinks
        ).to(out.dtype)


def softmax_with(sinks, logits) -> torch.Tensor:
    """[heads, tokens, context] weights; sinks: [heads] logits without values."""
    if sinks is None:
        return logits.softmax(-1)
    sinks = sinks.float()[:, None, None].expand(*logits.shape[:2], 1)
    return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]


def causal_attention(query, key, value, scale, soft_cap, sinks=None) -> torch.Tensor:
    """The last tokens of one context: [tokens, heads, size] fp32."""
    group = query.shape[1] // key.shape[1]
    key, value = (
        t.float().transpose(0, 1).repeat_interleave(group, 0) for t in (key, value)
    )
    logits = query.float().transpose(0, 1) @ key.mT * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    future = torch.ones(logits.shape[1:], dtype=torch.bool)
    future = future.triu(key.shape[1] - len(query) + 1)
    weights = softmax_with(sinks, logits.masked_fill(future, -torch.inf))
    return (weights @ value).transpose(0, 1)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Choosing tokens: SparQ (arXiv 2312.04985, section 3.1), Twilight's budgets."""

import torch

from ...cache.formats import ROWS, KvFormat
from ...cache.layout import BLOCK_SIZE, BlockLayout
from ..kept import add_counts
from ..options import SparqOptions
from .attend import attend
from .codes import dequantise_k
from .context import context


def sparq_probabilities(
    query, kv_cache, blocks, length, head, options: SparqOptions, fmt=ROWS
) -> torch.Tensor:
    """SparQ's step 1 for one row and KV head.

    The ``rank`` channels with the largest sum of |q| over the group are read: from the
    codes in sealed blocks, exactly in the tail. The temperature makes
    ``scale * sqrt(|q|_1 / |q[r]|_1)`` of the usual ``scale``; it is left out where mass
    decides (``top_p`` below 1), as the sum over some channels is what one expects of
    the sum over all.

    Args:
        query: [group, head_size] fp32 query heads of the KV head.
        blocks: [>= blocks of the context] int block ids.

    Returns:
        [group, length] softmax probabilities over the whole context.
    """
    head_size = query.shape[-1]
    lay = BlockLayout(head_size, kv_cache.element_size(), fmt)
    magnitude = query.abs().sum(0)
    channels = magnitude.argsort(descending=True, stable=True)[: options.rank]
    k, _ = context(kv_cache, blocks, length, head, head_size, fmt)
    for i in range(fmt.sealed_blocks(length)):
        chunk = kv_cache[int(blocks[i]), head]
        k[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] = dequantise_k(chunk, lay)
    read = query[:, channels].abs().sum(-1, keepdim=True)
    whole = query.abs().sum(-1, keepdim=True)
    tempered = options.top_p >= 1
    temperature = (whole / read).sqrt() if tempered else torch.ones_like(read)
    factor = torch.where(read > 0, options.scale * temperature, 0.0)
    logits = (query[:, channels] * factor) @ k[:, channels].T
    if options.soft_cap > 0:
        logits = options.soft_cap * (logits / options.soft_cap).tanh()
    return logits.softmax(-1)


def forced_ranges(
    length: int, local_window: int, sink_tokens: int, fmt: KvFormat = ROWS
) -> tuple[int, int]:
    """(sinks, recent): tokens before ``sinks`` and from ``recent`` are always kept."""
    sealed = fmt.sealed_blocks(length) * BLOCK_SIZE
    recent = max(0, min(length - local_window, sealed))
    return min(sink_tokens, recent), recent


def top_k_positions(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Positions of the k largest scores, ascending; ties go to the lower position.

    Args:
        scores: [..., tokens].
    """
    best = scores.argsort(dim=-1, descending=True, stable=True)
    return best[..., :k].sort(-1).values


def top_p_count(scores: torch.Tensor, top_p: float) -> int:
    """The fewest tokens that leave at most ``1 - top_p`` outside.

    Args:
        scores: [tokens] estimated probabilities summed over the query heads; tokens
            that are kept in any case are not among them.
    """
    outside = scores.sort().values.cumsum(0) <= 1 - top_p
    return len(scores) - int(outside.sum())


def sparq_attend(
    query,
    kv_cache,
    block_table,
    seq_lens,
    budgets,
    options: SparqOptions,
    *,
    indices,
    counts,
    kept_mass=None,
    out=None,
    kept_histogram=None,
    workspace=None,
    fmt=ROWS,
    sinks=None,
) -> None:
    """Choose the tokens of each row and KV head, then attend to them.

    Probabilities are pooled over the group after the softmax, then the best tokens join
    the sinks, the window and the unsealed tail until ``budgets`` is reached, or with
    ``top_p`` below 1 until enough mass is kept (Twilight, arXiv 2502.02770, section 3).
    """
    num_kv_heads, sink_tokens = kv_cache.shape[1], options.sink_tokens
    for row, length in enumerate(seq_lens.tolist()):
        first, recent = forced_ranges(length, options.local_window, sink_tokens, fmt)
        budget = int(budgets[row])
        if budget < 0 or budget >= length or recent <= sink_tokens:
            counts[row] = -1
            if kept_mass is not None:
                kept_mass[row] = 1.0
            continue
        forced = first + length - recent
        most = max(0, budget - forced)
        grouped = query[row].float().unflatten(0, (num_kv_heads, -1))
        for head, q in enumerate(grouped):
            where = (kv_cache, block_table[row], length, head)
            probs = sparq_probabilities(q, *where, options, fmt)
            scores = probs.sum(0)[first:recent]
            wanted = most
            if options.top_p < 1:
                enough = top_p_count(scores, options.top_p)
                wanted = min(max(enough, options.min_tokens - forced), most)
            best = top_k_positions(scores, wanted) + first
            kept = torch.cat([torch.arange(first), best, torch.arange(recent, length)])
            indices[row, head, : len(kept)] = kept.to(indices.dtype)
            counts[row, head] = len(kept)
            if kept_mass is not None:
                mass = probs[:, kept].sum(-1).clamp(max=1.0)
                kept_mass[row].unflatten(0, (num_kv_heads, -1))[head] = mass
    if out is not None:
        attend(
            query,
            kv_cache,
            block_table,
            seq_lens,
            indices=indices,
            counts=counts,
            kept_mass=kept_mass,
            scale=options.scale,
            soft_cap=options.soft_cap,
            out=out,
            fmt=fmt,
            sinks=sinks,
        )
    if kept_histogram is not None:
        add_counts(counts, kept_histogram)

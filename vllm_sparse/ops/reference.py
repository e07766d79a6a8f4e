# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What every op means: plain fp32 PyTorch, one function per op, same signatures but for
the format, a :class:`KvFormat` here and a number in the compiled ops.

Kernels are tested against these functions. They loop over rows and heads and are meant
to be read, not to be fast.
"""

import math

import torch

from ..cache.formats import ROWS, KvFormat
from ..cache.layout import BLOCK_SIZE, BlockLayout
from .codes import dequantise_k, pack_codes, prefix_mean, quantise_k, sidecar
from .kept import add_counts
from .quantised import read_block, tail_rows
from .quantised import store_quantised as store_quantised


def _layout(
    kv_cache: torch.Tensor, head_size: int, fmt: KvFormat = ROWS
) -> BlockLayout:
    return BlockLayout(head_size, kv_cache.element_size(), fmt)


def kv_rows(kv_cache: torch.Tensor, head_size: int) -> torch.Tensor:
    """View of K|V rows: [num_blocks, num_kv_heads, BLOCK_SIZE, 2 * head_size]."""
    blocks, heads, tokens, _ = kv_cache.shape
    stride = (kv_cache.stride(0), kv_cache.stride(1), 2 * head_size, 1)
    return kv_cache.as_strided((blocks, heads, tokens, 2 * head_size), stride)


def store_kv(key, value, kv_cache, slot_mapping) -> None:
    """Write K and V rows at their slots; negative slots are skipped."""
    rows = kv_rows(kv_cache, key.shape[-1])
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, BLOCK_SIZE)
            rows[block, :, offset] = torch.cat([key[token], value[token]], dim=-1)


def seal_blocks(kv_cache, block_ids, prev_block_ids, block_index, head_size) -> None:
    """Write codes, parameters and the prefix mean of V of full blocks."""
    lay = _layout(kv_cache, head_size)
    rows = kv_rows(kv_cache, head_size)
    jobs = zip(block_ids.tolist(), prev_block_ids.tolist(), block_index.tolist())
    for block, prev, index in jobs:
        for head in range(kv_cache.shape[1]):
            k, v = rows[block, head].split(head_size, dim=-1)
            codes, scale, minimum = quantise_k(k)
            mean = v.float().mean(0)
            if prev >= 0:
                before = prefix_mean(kv_cache[prev, head], lay)
                mean = before + (mean - before) / (index + 1)
            chunk = kv_cache[block, head]
            params = torch.stack([scale, minimum], dim=-1)
            for offset, data in (
                (lay.codes_offset, pack_codes(codes)),
                (lay.params_offset, params),
                (lay.prefix_mean_offset, mean.clamp(-65504, 65504).half()),
            ):
                data = data.contiguous().reshape(-1).view(torch.uint8)
                sidecar(chunk, offset, data.numel()).copy_(data)


def seal_rows(kv_cache, block_table, seq_lens, query_start_loc, head_size) -> None:
    """Seal the last block that ends among a request's new tokens; never block 0."""
    new = query_start_loc.diff()
    jobs = []
    for blocks, length, count in zip(
        block_table.tolist(), seq_lens.tolist(), new.tolist()
    ):
        full = length // BLOCK_SIZE
        if full and length - count < full * BLOCK_SIZE and blocks[full - 1] > 0:
            prev = blocks[full - 2] if full > 1 else -1
            jobs.append((full - 1, blocks[full - 1], prev))
    if jobs:
        index, block, prev = torch.tensor(sorted(jobs)).T
        seal_blocks(kv_cache, block, prev, index, head_size)


def store_rows(key, value, kv_cache, slot_mapping, block_table, seq_lens) -> None:
    """One new token per row: store it, and seal the block that it fills.

    A row without a slot stores nothing and fills nothing.
    """
    store_kv(key, value, kv_cache, slot_mapping)
    starts = torch.cat((torch.zeros(1), (slot_mapping >= 0).cumsum(0))).int()
    seal_rows(kv_cache, block_table, seq_lens, starts, key.shape[-1])


def gather_kv(kv_cache, block_table, seq_lens, out_start, key, value, fmt=ROWS) -> None:
    """Copy contexts out of their blocks: key and value [tokens, num_kv_heads, D].

    Of quantised formats every full block is read from its codes, also the last one.
    """
    head_size = key.shape[-1]
    if fmt.quantised:
        for row, (length, start) in enumerate(
            zip(seq_lens.tolist(), out_start.tolist())
        ):
            sealed = length // BLOCK_SIZE
            for head in range(kv_cache.shape[1]):
                context = (kv_cache, block_table[row], length, head, head_size, fmt)
                k, v = _context(*context, sealed)
                key[start : start + length, head] = k.to(key.dtype)
                value[start : start + length, head] = v.to(value.dtype)
        return
    rows = kv_rows(kv_cache, head_size)
    for blocks, length, start in zip(
        block_table.tolist(), seq_lens.tolist(), out_start.tolist()
    ):
        position = torch.arange(length)
        block = torch.tensor(blocks)[position // BLOCK_SIZE]
        context = rows[block, :, position % BLOCK_SIZE]
        key[start : start + length] = context[..., :head_size]
        value[start : start + length] = context[..., head_size:]


def context(kv_cache, blocks, length, head, head_size, fmt=ROWS):
    """K and V of one row and KV head as attention reads them: [length, head_size] fp32
    each."""
    sealed = fmt.sealed_blocks(length)
    return _context(kv_cache, blocks, length, head, head_size, fmt, sealed)


def _context(kv_cache, blocks, length, head, head_size, fmt, sealed):
    if fmt.quantised:
        lay = _layout(kv_cache, head_size, fmt)
        parts = [read_block(kv_cache[int(blocks[i]), head], lay) for i in range(sealed)]
        if rest := length - sealed * BLOCK_SIZE:
            rows = torch.stack(tail_rows(kv_cache, blocks, sealed, head, lay)[:rest])
            parts.append(rows.float().split(head_size, dim=-1))
        return tuple(torch.cat(part) for part in zip(*parts))
    rows = kv_rows(kv_cache, head_size)
    count = math.ceil(length / BLOCK_SIZE)
    flat = rows[blocks[:count].long(), head].reshape(-1, 2 * head_size)[:length].float()
    return flat[:, :head_size], flat[:, head_size:]


def sparq_probabilities(
    query, kv_cache, blocks, length, head, rank, scale, soft_cap, top_p=1.0, fmt=ROWS
) -> torch.Tensor:
    """SparQ's step 1 for one row and KV head (arXiv 2312.04985, section 3.1).

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
    lay = _layout(kv_cache, head_size, fmt)
    magnitude = query.abs().sum(0)
    channels = magnitude.argsort(descending=True, stable=True)[:rank]
    sealed = fmt.sealed_blocks(length)
    k, _ = context(kv_cache, blocks, length, head, head_size, fmt)
    k = k.clone()
    for i in range(sealed):
        k[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] = dequantise_k(
            kv_cache[int(blocks[i]), head], lay
        )
    read = query[:, channels].abs().sum(-1, keepdim=True)
    whole = query.abs().sum(-1, keepdim=True)
    temperature = (whole / read).sqrt() if top_p >= 1 else torch.ones_like(read)
    factor = torch.where(read > 0, scale * temperature, 0.0)
    logits = (query[:, channels] * factor) @ k[:, channels].T
    if soft_cap > 0:
        logits = soft_cap * (logits / soft_cap).tanh()
    return logits.softmax(-1)


def forced_ranges(
    length: int, local_window: int, sink_tokens: int, fmt: KvFormat = ROWS
) -> tuple[int, int]:
    """(sinks, recent): tokens before ``sinks`` and from ``recent`` are always kept."""
    sealed = fmt.sealed_blocks(length) * BLOCK_SIZE
    recent = max(0, min(length - local_window, sealed))
    return min(sink_tokens, recent), recent


def top_k_positions(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Positions of the k largest scores, ascending; ties go to the lower position."""
    return scores.argsort(descending=True, stable=True)[:k].sort().values


def top_p_count(scores: torch.Tensor, top_p: float) -> int:
    """The fewest tokens that leave at most ``1 - top_p`` outside.

    Args:
        scores: [tokens] estimated probabilities summed over the query heads; tokens
            that are kept in any case are not among them.
    """
    outside = scores.sort().values.cumsum(0) <= 1 - top_p
    return len(scores) - int(outside.sum())


def sparq_select(
    query,
    kv_cache,
    block_table,
    seq_lens,
    budgets,
    rank,
    local_window,
    sink_tokens,
    scale,
    soft_cap,
    top_p,
    min_tokens,
    indices,
    counts,
    kept_mass,
    workspace=None,
    fmt=ROWS,
) -> None:
    """Choose the tokens that each row and KV head attends to.

    Probabilities are pooled over the group after the softmax, then the best tokens join
    the sinks, the window and the unsealed tail until ``budgets`` is reached, or with
    ``top_p`` below 1 until enough mass is kept (Twilight, arXiv 2502.02770, section 3).
    """
    num_kv_heads, head_size = kv_cache.shape[1], query.shape[-1]
    group = query.shape[1] // num_kv_heads
    for row, length in enumerate(seq_lens.tolist()):
        sinks, recent = forced_ranges(length, local_window, sink_tokens, fmt)
        budget = int(budgets[row])
        if budget < 0 or budget >= length or recent <= sink_tokens:
            counts[row] = -1
            if kept_mass is not None:
                kept_mass[row] = 1.0
            continue
        forced = sinks + length - recent
        most = max(0, budget - forced)
        for head in range(num_kv_heads):
            q = query[row].float().view(num_kv_heads, group, head_size)[head]
            estimate = (kv_cache, block_table[row], length, head, rank, scale, soft_cap)
            probs = sparq_probabilities(q, *estimate, top_p=top_p, fmt=fmt)
            scores = probs.sum(0)[sinks:recent]
            wanted = most
            if top_p < 1:
                enough = max(top_p_count(scores, top_p), min_tokens - forced)
                wanted = min(enough, most)
            best = top_k_positions(scores, wanted) + sinks
            kept = torch.cat([torch.arange(sinks), best, torch.arange(recent, length)])
            indices[row, head, : len(kept)] = kept.to(indices.dtype)
            counts[row, head] = len(kept)
            if kept_mass is not None:
                mass = probs[:, kept].sum(-1).clamp(max=1.0)
                kept_mass[row, head * group : (head + 1) * group] = mass


def add_read(
    counter: torch.Tensor, kept: torch.Tensor, length: int, fmt: KvFormat
) -> None:
    """Count one KV head's tokens; with three counters and a quantised format, also
    those of them in sealed blocks, and these blocks."""
    counter[0] += len(kept)
    if len(counter) == 3 and fmt.quantised:
        old = kept[kept < fmt.sealed_blocks(length) * BLOCK_SIZE]
        counter[1] += len(old)
        counter[2] += len((old // BLOCK_SIZE).unique())


def attend(
    query,
    kv_cache,
    block_table,
    seq_lens,
    indices,
    counts,
    kept_mass,
    scale,
    soft_cap,
    out,
    tokens_read=None,
    workspace=None,
    fmt=ROWS,
) -> None:
    """Exact softmax attention over the listed tokens (SparQ's steps 2 and 3).

    ``counts`` of -1, or no lists at all, mean the whole context. With ``kept_mass``
    (alpha), the result is ``alpha * y + (1 - alpha) * mean(V)``, the mean taken over
    the whole context from the last sealed block's prefix mean and the tail's rows.
    """
    num_kv_heads, head_size = kv_cache.shape[1], query.shape[-1]
    group = query.shape[1] // num_kv_heads
    lay = _layout(kv_cache, head_size, fmt)
    for row, length in enumerate(seq_lens.tolist()):
        for head in range(num_kv_heads):
            k, v = context(kv_cache, block_table[row], length, head, head_size, fmt)
            kept = torch.arange(length)
            if counts is not None and counts[row, head] >= 0:
                kept = indices[row, head, : int(counts[row, head])].long()
            if tokens_read is not None:
                add_read(tokens_read, kept, length, fmt)
            heads = slice(head * group, (head + 1) * group)
            logits = query[row, heads].float() @ k[kept].T * scale
            if soft_cap > 0:
                logits = soft_cap * (logits / soft_cap).tanh()
            y = logits.softmax(-1) @ v[kept]
            if kept_mass is not None:
                sealed = fmt.sealed_blocks(length)
                total = v[sealed * BLOCK_SIZE :].sum(0)
                if sealed:
                    chunk = kv_cache[int(block_table[row, sealed - 1]), head]
                    total = total + prefix_mean(chunk, lay) * (sealed * BLOCK_SIZE)
                alpha = kept_mass[row, heads].unsqueeze(-1)
                y = alpha * y + (1 - alpha) * total / length
            out[row, heads] = y.to(out.dtype)


def sparq_attend(
    query,
    kv_cache,
    block_table,
    seq_lens,
    budgets,
    rank,
    local_window,
    sink_tokens,
    scale,
    soft_cap,
    top_p,
    min_tokens,
    indices,
    counts,
    kept_mass,
    out,
    tokens_read=None,
    kept_histogram=None,
    workspace=None,
    fmt=ROWS,
) -> None:
    """Both steps of SparQ, and a count of the lists' lengths."""
    context = (query, kv_cache, block_table, seq_lens)
    lists = (indices, counts, kept_mass)
    options = (rank, local_window, sink_tokens, scale, soft_cap, top_p, min_tokens)
    sparq_select(*context, budgets, *options, *lists, fmt=fmt)
    attend(*context, *lists, scale, soft_cap, out, tokens_read, fmt=fmt)
    if kept_histogram is not None:
        add_counts(counts, kept_histogram)

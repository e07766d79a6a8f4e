# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Storing new tokens and sealing the blocks that they fill."""

import torch

from ...cache.formats import ROWS
from ...cache.layout import BLOCK_SIZE, BlockLayout
from .codes import prefix_mean, write_block, write_prefix_mean
from .context import context_rows, kv_rows


def filled_blocks(slot_mapping, seq_lens, query_start_loc) -> list[tuple[int, int]]:
    """(place in the context, row) of the blocks whose last token has a slot among the
    new ones, in the order of places."""
    filled = []
    starts = query_start_loc.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        # What a token's place in the context is beyond its place among the new ones.
        ahead = length - starts[row + 1]
        first = starts[row] + ahead
        for index in range(first // BLOCK_SIZE, length // BLOCK_SIZE):
            if has_slot(slot_mapping[(index + 1) * BLOCK_SIZE - 1 - ahead]):
                filled.append((index, row))
    return sorted(filled)


def has_slot(slot):
    """Block 0 is vLLM's null block, which is never written."""
    return slot >= BLOCK_SIZE


def store(
    key,
    value,
    kv_cache,
    slot_mapping,
    block_table,
    seq_lens,
    query_start_loc,
    fmt=ROWS,
) -> None:
    """Store new tokens that have a slot; seal blocks whose last token is among them.

    Plain rows lie at their slots. In quantised formats the newest block's tokens are
    kept as rows, and so are all of a request with few new ones, as drafts may be
    rejected and their block sealed again.
    """
    lay = BlockLayout(key.shape[-1], kv_cache.element_size(), fmt)
    new = torch.cat([key, value], dim=-1)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    # Reading comes before writing: rows of one block lie in the chunks of the next.
    blocks = []
    for index, row in filled_blocks(slot_mapping, seq_lens, query_start_loc):
        position = torch.arange(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
        token = position - lens[row] + starts[row + 1]
        stored = (token >= starts[row]) & has_slot(slot_mapping[token.clamp(min=0)])
        tokens = new.new_empty(BLOCK_SIZE, *new.shape[1:])
        tokens[stored] = new[token[stored]]
        before = position[~stored]
        tokens[~stored] = context_rows(kv_cache, block_table[row], before, lay)
        block, previous = block_table[row, index], block_table[row, max(index - 1, 0)]
        if not fmt.quantised:
            block = slot_mapping[token[-1]] // BLOCK_SIZE
        blocks.append((index, int(block), int(previous), tokens))
    for block in blocks:
        _seal(kv_cache, lay, *block)

    rows = kv_rows(kv_cache, lay.head_size, fmt)
    for row, length in enumerate(lens):
        count = starts[row + 1] - starts[row]
        for token in range(starts[row], starts[row + 1]):
            slot = int(slot_mapping[token])
            if not has_slot(slot):
                continue
            index, offset = divmod(length - starts[row + 1] + token, BLOCK_SIZE)
            # A prompt's tokens of earlier blocks are sealed for good, drafts are not.
            sealed = index < (length - 1) // BLOCK_SIZE and count > lay.rows_per_block
            if not fmt.quantised:
                block, at = divmod(slot, BLOCK_SIZE)
                rows[block, :, at] = new[token]
            elif not sealed:
                place, at = lay.tail_place(index, offset)
                rows[int(block_table[row, place]), :, at] = new[token]


def _seal(kv_cache, lay, index, block, previous, tokens) -> None:
    """Codes of a block's [BLOCK_SIZE, num_kv_heads, 2 * head_size], and the mean of V
    from the start of the context on."""
    for head in range(kv_cache.shape[1]):
        key, value = tokens[:, head].split(lay.head_size, dim=-1)
        chunk = kv_cache[block, head]
        write_block(chunk, lay, key, value)
        if not lay.fmt.has_mean:
            continue
        mean = value.float().mean(0)
        if index:
            before = prefix_mean(kv_cache[previous, head], lay)
            mean = before + (mean - before) / (index + 1)
        write_prefix_mean(chunk, lay, mean)

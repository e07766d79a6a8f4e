# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Where a context's K and V lie, and reading them."""

import torch

from ...cache.formats import ROWS, KvFormat
from ...cache.layout import BLOCK_SIZE, BlockLayout
from .codes import read_block


def kv_rows(
    kv_cache: torch.Tensor, head_size: int, fmt: KvFormat = ROWS
) -> torch.Tensor:
    """View of the K|V rows of all chunks: [num_blocks, num_kv_heads, rows of a chunk,
    2 * head_size]."""
    lay = BlockLayout(head_size, kv_cache.element_size(), fmt)
    rows = min(lay.rows_per_block, BLOCK_SIZE)
    shape = (*kv_cache.shape[:2], rows, 2 * head_size)
    return kv_cache.as_strided(shape, (*kv_cache.stride()[:2], 2 * head_size, 1))


def context_rows(
    kv_cache: torch.Tensor, blocks: torch.Tensor, position: torch.Tensor, lay
) -> torch.Tensor:
    """K|V rows of tokens that are kept as such: [tokens, num_kv_heads, 2 * head_size].

    Args:
        blocks: block ids of the context, lookahead blocks included.
        position: [tokens] places in the context.
    """
    place, at = lay.tail_place(position // BLOCK_SIZE, position % BLOCK_SIZE)
    return kv_rows(kv_cache, lay.head_size, lay.fmt)[blocks[place].long(), :, at]


def context(kv_cache, blocks, length, head, head_size, fmt=ROWS):
    """K and V of one row and KV head as attention reads them: [length, head_size] fp32
    each."""
    sealed = fmt.sealed_blocks(length) if fmt.quantised else 0
    return _read(kv_cache, blocks, length, head, head_size, fmt, sealed)


def _read(kv_cache, blocks, length, head, head_size, fmt, sealed):
    """K and V, those of the first ``sealed`` blocks from their codes."""
    lay = BlockLayout(head_size, kv_cache.element_size(), fmt)
    parts = [read_block(kv_cache[int(blocks[i]), head], lay) for i in range(sealed)]
    position = torch.arange(sealed * BLOCK_SIZE, length, device=blocks.device)
    rows = context_rows(kv_cache[:, head, None], blocks, position, lay)[:, 0]
    parts.append(rows.float().split(head_size, dim=-1))
    return tuple(torch.cat(part) for part in zip(*parts))


def gather_kv(kv_cache, block_table, seq_lens, out_start, key, value, fmt=ROWS) -> None:
    """Copy contexts out of their blocks: key and value [tokens, num_kv_heads, D].

    Of quantised formats every full block is read from its codes, also the last one.
    """
    rows = zip(block_table, seq_lens.tolist(), out_start.tolist())
    for blocks, length, start in rows:
        sealed = length // BLOCK_SIZE if fmt.quantised else 0
        for head in range(kv_cache.shape[1]):
            where = (kv_cache, blocks, length, head, key.shape[-1], fmt)
            k, v = _read(*where, sealed)
            key[start : start + length, head] = k.to(key.dtype)
            value[start : start + length, head] = v.to(value.dtype)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the quantised formats mean: plain fp32 PyTorch, part of :mod:`.reference`.

KIVI's asymmetric quantiser (arXiv 2402.02750, section 3.1): K per channel over a block
(and per token, where the format keeps it so too), V per token in groups of channels.
Layout: :mod:`vllm_sparse.cache.layout`.
"""

import torch

from ..cache.layout import BLOCK_SIZE, BlockLayout
from .codes import (
    dequantise_k,
    key_params,
    pack_codes,
    prefix_mean,
    sidecar,
    unpack_codes,
)

LIMIT = torch.finfo(torch.float16).max


def quantise(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Along the last dimension.

    Args:
        x: [..., n].

    Returns:
        codes [..., n] uint8, and scale and minimum [..., 2] fp16, rounded before the
        codes are taken.
    """
    x = x.float()
    low, high = x.amin(-1), x.amax(-1)
    minimum = low.clamp(-LIMIT, LIMIT).half()
    scale = ((high - low) / (2**bits - 1)).clamp(max=LIMIT).half()
    divisor = torch.where(scale > 0, scale.float(), 1.0)
    codes = (x - minimum.float()[..., None]) / divisor[..., None]
    codes = codes.round().clamp(0, 2**bits - 1).to(torch.uint8)
    return codes, torch.stack([scale, minimum], dim=-1)


def quantise_key_8(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit K in two planes: the params are those of its upper 4 bits.

    Args:
        k: [head_size, BLOCK_SIZE].

    Returns:
        codes [head_size, BLOCK_SIZE] uint8 and params [head_size, 2] fp16: a code of
        upper bits h and lower bits l is ``minimum + scale * (h + (l - 7.5) / 16)``.
    """
    k = k.float()
    low, high = k.amin(-1), k.amax(-1)
    step = (high - low) / 255
    scale = (step * 16).clamp(max=LIMIT).half()
    # Exact products, so that no compiler's fusing can change the sum.
    minimum = (low + (step * 8 - step * 0.5)).clamp(-LIMIT, LIMIT).half()
    divisor = torch.where(scale > 0, scale.float() / 16, 1.0)
    codes = (k - minimum.float()[:, None]) / divisor[:, None] + 7.5
    codes = codes.round().clamp(0, 255).to(torch.uint8)
    return codes, torch.stack([scale, minimum], dim=-1)


def pack_value(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[tokens, head_size] codes to [tokens, head_size * bits / 8] bytes."""
    if bits == 8:
        return codes
    chunks = codes.unflatten(-1, (-1, 2, 8))
    return (chunks[..., 0, :] | chunks[..., 1, :] << 4).flatten(-2)


def unpack_value(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of pack_value."""
    if bits == 8:
        return packed
    chunks = packed.unflatten(-1, (-1, 8))
    return torch.stack([chunks & 15, chunks >> 4], dim=-2).flatten(-3)


def write_block(
    chunk: torch.Tensor, lay: BlockLayout, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Codes and params of K and V into a (block, head) chunk.

    Args:
        chunk: [BLOCK_SIZE, C], contiguous.
        key, value: [BLOCK_SIZE, head_size].
    """
    fmt = lay.fmt
    if fmt.key_bits == 8:
        codes, params = quantise_key_8(key.T)
        parts = [
            (lay.codes_offset, pack_codes(codes.T >> 4)),
            (lay.low_codes_offset, pack_codes(codes.T & 15)),
        ]
    else:
        groups = key.T.unflatten(-1, (-1, fmt.key_group))
        codes, params = quantise(groups, fmt.key_bits)
        parts = [(lay.codes_offset, pack_codes(codes.flatten(1).T))]
    if fmt.key_rows:
        row_codes, row_params = quantise(key, 8)
        parts += [
            (lay.key_rows_offset, row_codes),
            (lay.key_row_params_offset, row_params),
        ]
    groups = value.unflatten(-1, (-1, fmt.value_group))
    value_codes, value_params = quantise(groups, fmt.value_bits)
    parts += [
        (lay.params_offset, params),
        (lay.value_codes_offset, pack_value(value_codes.flatten(1), fmt.value_bits)),
        (lay.value_params_offset, value_params),
    ]
    for offset, data in parts:
        data = data.contiguous().reshape(-1).view(torch.uint8)
        sidecar(chunk, offset, data.numel()).copy_(data)


def read_block(
    chunk: torch.Tensor, lay: BlockLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a sealed chunk: two of [BLOCK_SIZE, head_size] fp32."""
    key = dequantise_k(chunk, lay)
    size = lay.head_size
    if lay.fmt.key_rows:
        key = read_key_rows(chunk, lay)
    elif lay.fmt.key_bits == 8:
        plane = size * lay.channel_code_bytes
        low = unpack_codes(sidecar(chunk, lay.low_codes_offset, plane))
        key = key + (low.float() - 7.5) * (key_params(chunk, lay)[0] / 16)
    packed = sidecar(
        chunk, lay.value_codes_offset, BLOCK_SIZE * lay.value_code_bytes
    ).view(BLOCK_SIZE, -1)
    codes = unpack_value(packed, lay.fmt.value_bits)
    params = sidecar(
        chunk, lay.value_params_offset, BLOCK_SIZE * lay.value_param_bytes
    ).view(torch.float16)
    scale, minimum = params.float().view(BLOCK_SIZE, -1, 1, 2).unbind(-1)
    value = codes.float().unflatten(-1, (-1, lay.fmt.value_group)) * scale + minimum
    return key, value.flatten(1)


def read_key_rows(chunk: torch.Tensor, lay: BlockLayout) -> torch.Tensor:
    """K by token of a sealed chunk: [BLOCK_SIZE, head_size] fp32."""
    codes = sidecar(chunk, lay.key_rows_offset, BLOCK_SIZE * lay.head_size)
    params = sidecar(chunk, lay.key_row_params_offset, BLOCK_SIZE * 4)
    scale, minimum = params.view(torch.float16).float().view(BLOCK_SIZE, 2).unbind(-1)
    codes = codes.view(BLOCK_SIZE, -1).float()
    return codes * scale[:, None] + minimum[:, None]


def tail_rows(
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    block_index: int,
    head: int,
    lay: BlockLayout,
) -> list[torch.Tensor]:
    """Views of the K|V rows of a block that is not sealed: each [2 * head_size].

    Args:
        blocks: block ids of the context, lookahead blocks included.
        block_index: the block's place in the context.
    """
    rows = []
    for offset in range(BLOCK_SIZE):
        place, row = lay.tail_place(block_index, offset)
        chunk = kv_cache[int(blocks[place]), head].reshape(-1)
        first = row * 2 * lay.head_size
        rows.append(chunk[first : first + 2 * lay.head_size])
    return rows


def store_quantised(
    key, value, kv_cache, block_table, seq_lens, query_start_loc, fmt
) -> None:
    """Seal the blocks that new tokens fill, and keep the newest tokens as rows."""
    head_size = key.shape[-1]
    lay = BlockLayout(head_size, kv_cache.element_size(), fmt)
    starts = query_start_loc.tolist()
    sealed: list[tuple[int, int, int, torch.Tensor]] = []
    # Reading comes before writing: rows of one block lie in the chunks of the next.
    for row, length in enumerate(seq_lens.tolist()):
        count = starts[row + 1] - starts[row]
        computed, blocks = length - count, block_table[row].tolist()
        for index in range(computed // BLOCK_SIZE, length // BLOCK_SIZE):
            first = index * BLOCK_SIZE
            old = max(0, computed - first)
            new = slice(starts[row] + first + old - computed, None)
            tokens = torch.cat([key[new], value[new]], dim=-1)[: BLOCK_SIZE - old]
            if old:
                before = torch.stack(
                    [
                        torch.stack(tail_rows(kv_cache, blocks, index, head, lay)[:old])
                        for head in range(kv_cache.shape[1])
                    ],
                    dim=1,
                )
                tokens = torch.cat([before, tokens])
            previous = blocks[index - 1] if index else -1
            if blocks[index] > 0:
                sealed.append((index, blocks[index], previous, tokens))
    _seal(kv_cache, lay, sorted(sealed, key=lambda job: job[:2]))
    for row, length in enumerate(seq_lens.tolist()):
        count = starts[row + 1] - starts[row]
        last = (length - 1) // BLOCK_SIZE
        for token in range(count):
            position = length - count + token
            # A prompt's tokens of earlier blocks are sealed for good, drafts are not.
            if position // BLOCK_SIZE < last and count > lay.rows_per_block:
                continue
            place, at = lay.tail_place(*divmod(position, BLOCK_SIZE))
            chunk = kv_cache[int(block_table[row, place])]
            flat = chunk.view(len(chunk), -1)
            new = torch.cat([key[starts[row] + token], value[starts[row] + token]], -1)
            flat[:, at * 2 * head_size : (at + 1) * 2 * head_size] = new


def _seal(kv_cache, lay, jobs) -> None:
    size = lay.head_size
    for index, block, previous, tokens in jobs:
        for head in range(kv_cache.shape[1]):
            key, value = tokens[:, head].split(size, dim=-1)
            chunk = kv_cache[block, head]
            write_block(chunk, lay, key, value)
            if not lay.fmt.has_mean:
                continue
            mean = value.float().mean(0)
            if previous >= 0:
                before = prefix_mean(kv_cache[previous, head], lay)
                mean = before + (mean - before) / (index + 1)
            data = mean.clamp(-LIMIT, LIMIT).half().view(torch.uint8)
            sidecar(chunk, lay.prefix_mean_offset, 2 * size).copy_(data)

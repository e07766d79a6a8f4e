# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Quantisers, and what a sealed block holds beside rows or instead of them.

KIVI's asymmetric quantiser (arXiv 2402.02750, section 3.1): K per channel over a block
(and per token, where the format keeps it so too), V per token in groups of channels.
Bytes: :mod:`vllm_sparse.cache.layout`. A chunk is one (block, KV head), contiguous.
"""

import torch

from ...cache.layout import BLOCK_SIZE, CODE_BITS, LANES, BlockLayout

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


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """[head_size, BLOCK_SIZE] 4-bit codes to [head_size, BLOCK_SIZE / 2] bytes."""
    nibbles = codes.reshape(-1, BLOCK_SIZE // LANES, LANES).transpose(1, 2)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of pack_codes, tokens first: [BLOCK_SIZE, head_size]."""
    pairs = packed.reshape(-1, LANES, BLOCK_SIZE // LANES // 2)
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)
    return nibbles.transpose(1, 2).reshape(-1, BLOCK_SIZE).T


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


def sidecar(chunk: torch.Tensor, offset: int, size: int) -> torch.Tensor:
    """``size`` bytes at byte ``offset`` of a chunk."""
    return chunk.reshape(-1).view(torch.uint8)[offset : offset + size]


def write_block(
    chunk: torch.Tensor, lay: BlockLayout, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Codes and params of a sealed chunk; V's only where it has no rows.

    Args:
        key, value: [BLOCK_SIZE, head_size].
    """
    fmt = lay.fmt
    if fmt.key_bits == 8:
        codes, params = quantise_key_8(key.T)
        parts = [
            (lay.codes_offset, pack_codes(codes >> 4)),
            (lay.low_codes_offset, pack_codes(codes & 15)),
        ]
    else:
        codes, params = quantise(key.T.unflatten(-1, (-1, fmt.key_group)), CODE_BITS)
        parts = [(lay.codes_offset, pack_codes(codes))]
    parts += [(lay.params_offset, params)]
    if fmt.key_rows:
        codes, params = quantise(key, 8)
        parts += [(lay.key_rows_offset, codes), (lay.key_row_params_offset, params)]
    if fmt.quantised:
        groups = value.unflatten(-1, (-1, fmt.value_group))
        codes, params = quantise(groups, fmt.value_bits)
        parts += [
            (lay.value_codes_offset, pack_value(codes.flatten(1), fmt.value_bits)),
            (lay.value_params_offset, params),
        ]
    for offset, data in parts:
        data = data.contiguous().reshape(-1).view(torch.uint8)
        sidecar(chunk, offset, data.numel()).copy_(data)


def read_block(
    chunk: torch.Tensor, lay: BlockLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a sealed quantised chunk: two of [BLOCK_SIZE, head_size] fp32."""
    key = dequantise_k(chunk, lay)
    if lay.fmt.key_rows:
        key = read_key_rows(chunk, lay)
    elif lay.fmt.key_bits == 8:
        plane = lay.head_size * lay.channel_code_bytes
        low = unpack_codes(sidecar(chunk, lay.low_codes_offset, plane))
        key = key + (low.float() - 7.5) * (key_params(chunk, lay)[0] / 16)
    size = BLOCK_SIZE * lay.value_code_bytes
    packed = sidecar(chunk, lay.value_codes_offset, size).view(BLOCK_SIZE, -1)
    codes = unpack_value(packed, lay.fmt.value_bits)
    size = BLOCK_SIZE * lay.value_param_bytes
    params = sidecar(chunk, lay.value_params_offset, size).view(torch.float16)
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


def dequantise_k(chunk: torch.Tensor, lay: BlockLayout) -> torch.Tensor:
    """K of a sealed chunk from its upper 4 bits: [BLOCK_SIZE, head_size] fp32."""
    size = lay.head_size * lay.channel_code_bytes
    codes = unpack_codes(sidecar(chunk, lay.codes_offset, size))
    scale, minimum = key_params(chunk, lay)
    return codes.float() * scale + minimum


def key_params(
    chunk: torch.Tensor, lay: BlockLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of every K: two of [BLOCK_SIZE, head_size] fp32."""
    size = lay.head_size * lay.channel_param_bytes
    params = sidecar(chunk, lay.params_offset, size).view(torch.float16).float()
    params = params.view(lay.head_size, lay.key_groups, 2)
    params = params.repeat_interleave(BLOCK_SIZE // lay.key_groups, dim=1)
    scale, minimum = params.transpose(0, 1).unbind(-1)
    return scale, minimum


def prefix_mean(chunk: torch.Tensor, lay: BlockLayout) -> torch.Tensor:
    """Mean of V from the context's start to this block's end: [head_size] fp32."""
    data = sidecar(chunk, lay.prefix_mean_offset, 2 * lay.head_size)
    return data.view(torch.float16).float()


def write_prefix_mean(chunk: torch.Tensor, lay: BlockLayout, mean) -> None:
    data = mean.clamp(-LIMIT, LIMIT).half().view(torch.uint8)
    sidecar(chunk, lay.prefix_mean_offset, 2 * lay.head_size).copy_(data)

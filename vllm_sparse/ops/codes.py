# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Codes of K and what else a sidecar holds, in plain PyTorch: how the reference reads
and writes a chunk (:mod:`vllm_sparse.cache.layout` has the bytes)."""

import torch

from ..cache.layout import BLOCK_SIZE, CODE_MAX, LANES, BlockLayout


def sidecar(chunk: torch.Tensor, offset: int, size: int) -> torch.Tensor:
    """``size`` bytes at byte ``offset`` of one contiguous (block, head) chunk."""
    return chunk.reshape(-1).view(torch.uint8)[offset : offset + size]


def quantise_k(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric 4-bit quantiser per channel (KIVI, arXiv 2402.02750, section 3.1).

    Args:
        k: [BLOCK_SIZE, head_size] keys of one block and head.

    Returns:
        codes [BLOCK_SIZE, head_size] uint8, scale and minimum [head_size] fp16, rounded
        before the codes are taken.
    """
    k = k.float()
    limit = torch.finfo(torch.float16).max
    minimum = k.amin(0).clamp(-limit, limit).half()
    scale = ((k.amax(0) - k.amin(0)) / CODE_MAX).clamp(max=limit).half()
    divisor = torch.where(scale > 0, scale.float(), 1.0)
    codes = ((k - minimum.float()) / divisor).round().clamp(0, CODE_MAX)
    return codes.to(torch.uint8), scale, minimum


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """[BLOCK_SIZE, head_size] codes to [head_size, BLOCK_SIZE / 2] bytes."""
    nibbles = codes.T.reshape(-1, BLOCK_SIZE // LANES, LANES).transpose(1, 2)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of pack_codes: [head_size, bytes] uint8 to [BLOCK_SIZE, head_size]."""
    pairs = packed.reshape(-1, LANES, BLOCK_SIZE // LANES // 2)
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)
    return nibbles.transpose(1, 2).reshape(-1, BLOCK_SIZE).T


def prefix_mean(chunk: torch.Tensor, lay: BlockLayout) -> torch.Tensor:
    """Mean of V from the context's start to this block's end: [head_size] fp32."""
    data = sidecar(chunk, lay.prefix_mean_offset, 2 * lay.head_size)
    return data.view(torch.float16).float()


def dequantise_k(chunk: torch.Tensor, lay: BlockLayout) -> torch.Tensor:
    """K of a sealed (block, head) chunk, from codes: [BLOCK_SIZE, head_size] fp32."""
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

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Dense prefill on GPUs: FlashAttention reads the rows of our blocks in place, or a
scratch cache made from quantised ones."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backends import fa_utils

from ..cache.layout import BLOCK_SIZE
from ..methods import LayerShape
from ..ops.reference import kv_rows
from .prefill_codes import QuantisedPrefill, Rows


@dataclass
class GpuPrefillRows:
    """The prefill rows of one step; all layers of a KV cache group share it.

    Attributes:
        query_start_loc: [num_rows + 1] int32, from the first prefill token.
        seq_lens: [num_rows] int32, context plus this step's tokens.
        block_table: [num_rows, max_blocks] int32.
        max_query_len, max_seq_len: at least the longest row's.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    max_seq_len: int


def flash_attention_version(shape: LayerShape) -> int | None:
    """The FlashAttention that serves this layer; None: vLLM has none for it."""
    if not fa_utils.is_flash_attn_varlen_func_available():
        return None
    return fa_utils.get_flash_attn_version(
        head_size=shape.head_size, requires_softcap=shape.soft_cap > 0
    )


def key_value_views(
    kv_cache: torch.Tensor, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V rows as FlashAttention pages: [num_blocks, BLOCK_SIZE, heads, D] each.

    A block's sidecar lies between the last row of one (block, KV head) and the first
    of the next, so only the outer strides show it.
    """
    rows = kv_rows(kv_cache, head_size).transpose(1, 2)
    key, value = rows.split(head_size, dim=-1)
    if kv_cache.shape[1] == 1:
        # A dimension of one may have any stride, but TMA wants a multiple of 16 bytes.
        stride = (*key.stride()[:2], head_size, 1)
        key, value = (t.as_strided(t.shape, stride) for t in (key, value))
    return key, value


def prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: GpuPrefillRows,
    shape: LayerShape,
    version: int | None,
    out: torch.Tensor,
) -> None:
    """Causal attention of the prefill tokens over their contexts.

    Args:
        query: the step's prefill tokens, [num_tokens, num_heads, head_size].
        kv_cache: the layer's cache, this step's rows already stored.
        version: FlashAttention's.
        out: [num_tokens, num_heads, head_size], written.
    """
    pages = key_value_views(kv_cache, shape.head_size)
    attend_pages(query, *pages, rows, shape, version, out)


def prefill_quantised(
    query: torch.Tensor,
    new: Rows,
    tails: Rows,
    kv_cache: torch.Tensor,
    plan: QuantisedPrefill,
    shape: LayerShape,
    version: int | None,
    out: torch.Tensor,
) -> None:
    """The same over quantised blocks; the step's tokens are stored.

    Args:
        query, new, out: all prefill tokens of the step; the plan takes its own.
        tails: what the plan saved before storing.
    """
    size = (plan.num_slots, shape.num_kv_heads, shape.head_size)
    scratch = (kv_cache.new_empty(size), kv_cache.new_empty(size))
    plan.fill(scratch, tails, new, kv_cache, shape)
    pages = (t.unflatten(0, (-1, BLOCK_SIZE)) for t in scratch)
    rows = GpuPrefillRows(
        query_start_loc=plan.query_start_loc,
        seq_lens=plan.seq_lens,
        block_table=plan.scratch_table,
        max_query_len=plan.max_query_len,
        max_seq_len=plan.max_seq_len,
    )
    attend_pages(query[plan.tokens], *pages, rows, shape, version, out[plan.tokens])


def attend_pages(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: GpuPrefillRows,
    shape: LayerShape,
    version: int | None,
    out: torch.Tensor,
) -> None:
    """FlashAttention over pages: key and value [num_blocks, BLOCK_SIZE, heads, D]."""
    fa_utils.flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=rows.query_start_loc,
        max_seqlen_q=rows.max_query_len,
        seqused_k=rows.seq_lens,
        max_seqlen_k=rows.max_seq_len,
        softmax_scale=shape.scale,
        causal=True,
        block_table=rows.block_table,
        softcap=shape.soft_cap,
        fa_version=version,
    )

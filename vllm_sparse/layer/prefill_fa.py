# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Dense rows on GPUs: FlashAttention reads the rows of our blocks in place, or pages
that were made from quantised ones."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils

from ..cache.layout import BLOCK_SIZE
from ..methods import LayerShape
from ..ops.reference import kv_rows
from .dense_rows import DenseRows, token_slice
from .prefill_codes import CodeRows, Rows


@dataclass
class FlashRows(DenseRows):
    """Rows as FlashAttention takes them.

    Attributes:
        query_start_loc: [num_rows + 1] int32, from :attr:`tokens`' first on.
        seq_lens: [num_rows] int32, context plus this step's tokens.
        block_table: [num_rows, max_blocks] int32.
        max_query_len, max_seq_len: at least the longest row's.
    """

    tokens: slice
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    max_seq_len: int

    @classmethod
    def of(cls, common: CommonAttentionMetadata, requests: slice) -> "FlashRows":
        tokens = token_slice(common, requests)
        starts = common.query_start_loc[requests.start : requests.stop + 1]
        return cls(
            tokens=tokens,
            # At its own address where it can be: CUDA graphs read it there.
            query_start_loc=starts - tokens.start if tokens.start else starts,
            seq_lens=common.seq_lens[requests],
            block_table=common.block_table_tensor[requests],
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
        )

    def attend(self, query, key, value, saved, kv_cache, shape, out) -> None:
        key, value = pages(kv_cache, shape.head_size)
        attend_pages(query, key, value, self, self.block_table, shape, out)


class FlashCodes(CodeRows):
    """Rows over quantised blocks, as pages that are made from them."""

    def scratch(self, kv_cache: torch.Tensor, shape: LayerShape) -> Rows:
        size = (self.num_slots, shape.num_kv_heads, shape.head_size)
        return kv_cache.new_empty(size), kv_cache.new_empty(size)

    def attend_scratch(self, query, scratch, shape, out) -> None:
        key, value = (t.unflatten(0, (-1, BLOCK_SIZE)) for t in scratch)
        attend_pages(query, key, value, self, self.scratch_table, shape, out)


def flash_attention_version(head_size: int, soft_cap: float) -> int:
    """The FlashAttention that serves a layer of the engine that is being made.

    Raises:
        ImportError: vLLM has none for it.
    """
    version = None
    if fa_utils.is_flash_attn_varlen_func_available():
        version = fa_utils.get_flash_attn_version(
            head_size=head_size, requires_softcap=soft_cap > 0
        )
    if version is None:
        raise ImportError(
            f"vLLM has no FlashAttention for this GPU or head size {head_size}, which "
            "sparse attention needs for prefill"
        )
    return version


def pages(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def attend_pages(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: FlashRows | FlashCodes,
    block_table: torch.Tensor,
    shape: LayerShape,
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
        block_table=block_table,
        softcap=shape.soft_cap,
        fa_version=shape.flash_attention,
    )

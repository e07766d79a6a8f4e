# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Dense rows on GPUs: FlashAttention reads the rows of our blocks in place, or pages
that were made from quantised ones."""

from dataclasses import dataclass

import torch
from vllm.utils.math_utils import round_up
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
        schedule: FlashAttention 3's tiles (:class:`FlashSchedule`); None: each layer
            makes its own.
        max_splits: the most parts of a context; 0: as FlashAttention likes.
    """

    tokens: slice
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    max_seq_len: int
    schedule: torch.Tensor | None = None
    max_splits: int = 0

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


class FlashSchedule:
    """FlashAttention 3's tiles of a step's rows, made once for all layers; in FULL CUDA
    graphs at one address, with a bound on the parts of a context, as their buffers are
    allocated at capture (vLLM's own builder does the same).

    Args:
        vllm_config: the engine's.
    """

    def __init__(self, shape: LayerShape, vllm_config, device: torch.device) -> None:
        self.shape, self.held, self.graph_tokens = shape, None, 0
        compilation = vllm_config.compilation_config
        if compilation.cudagraph_mode.has_full_cudagraphs():
            self.graph_tokens = compilation.max_cudagraph_capture_size or 0
            rows = max(vllm_config.scheduler_config.max_num_seqs, self.graph_tokens)
            # A semaphore, and four numbers of every row.
            size = 1 + 4 * round_up(rows, 4)
            self.held = torch.zeros(size, dtype=torch.int32, device=device)
        self.max_splits = (
            vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph
        )

    def plan(self, rows: FlashRows) -> None:
        """Fill in ``rows.schedule`` and ``rows.max_splits``."""
        graph = rows.tokens.stop <= self.graph_tokens
        rows.max_splits = self.max_splits if graph else 0
        made = fa_utils.get_scheduler_metadata(
            batch_size=len(rows.seq_lens),
            max_seqlen_q=rows.max_query_len,
            max_seqlen_k=rows.max_seq_len,
            num_heads_q=self.shape.num_heads,
            num_heads_kv=self.shape.num_kv_heads,
            headdim=self.shape.head_size,
            cache_seqlens=rows.seq_lens,
            qkv_dtype=self.shape.dtype,
            cu_seqlens_q=rows.query_start_loc,
            page_size=BLOCK_SIZE,
            causal=True,
            window_size=(-1, -1),
            num_splits=rows.max_splits,
        )
        if self.held is not None:
            # What is left of an earlier step could be taken for this one's.
            self.held[: len(made)] = made
            self.held[len(made) :] = 0
            made = self.held[: len(made)]
        rows.schedule = made


class FlashCodes(CodeRows):
    """Rows over quantised blocks, as pages that are made from them."""

    schedule, max_splits = None, 0

    def scratch(self, kv_cache: torch.Tensor, shape: LayerShape) -> Rows:
        size = (self.num_slots, shape.num_kv_heads, shape.head_size)
        return kv_cache.new_empty(size), kv_cache.new_empty(size)

    def attend_scratch(self, query, scratch, shape, out) -> None:
        key, value = (t.unflatten(0, (-1, BLOCK_SIZE)) for t in scratch)
        attend_pages(query, key, value, self, self.scratch_table, shape, out)


def flash_attention_version(
    head_size: int, soft_cap: float, has_sinks: bool = False
) -> int:
    """The FlashAttention that serves a layer of the engine that is being made.

    Raises:
        ImportError: vLLM has none for it.
    """
    version = None
    if fa_utils.is_flash_attn_varlen_func_available():
        version = fa_utils.get_flash_attn_version(
            head_size=head_size,
            requires_softcap=soft_cap > 0,
            has_sinks=has_sinks,
        )
    if has_sinks and version != 3:
        raise NotImplementedError(
            "attention sinks need FlashAttention 3, which serves Hopper GPUs: leave "
            "--attention-backend out"
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
        scheduler_metadata=rows.schedule,
        num_splits=rows.max_splits,
        fa_version=shape.flash_attention,
        # It takes nothing else.
        s_aux=None if shape.sinks is None else shape.sinks.to(torch.bfloat16),
    )

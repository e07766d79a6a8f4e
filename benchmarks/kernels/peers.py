# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Dense decode attention of others on the same paged cache: what we are timed against.

Every function prepares one call over ``cache`` and returns it; whatever a serving
engine would prepare once per step (schedules, masks, buffers) is prepared here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

TRITON_SEGMENTS = 16  # NUM_PAR_SOFTMAX_SEGMENTS of vLLM's Triton backend
XFORMERS_PAGE = 256


@dataclass
class DenseCache:
    """One layer's contexts as vLLM's dense backends keep them.

    Attributes:
        query, out: [batch, num_heads, head_size].
        key, value: [num_pages, page, num_kv_heads, head_size].
        block_table: [batch, pages] int32.
        seq_lens: [batch] int32.
        seq_len: the longest.
    """

    query: torch.Tensor
    out: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    seq_len: int

    def put(self, row: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """A whole context of [seq_len, num_kv_heads, head_size]."""
        page = self.key.shape[1]
        place = torch.arange(len(key), device=key.device)
        block = self.block_table[row][place // page].long()
        self.key[block, place % page] = key
        self.value[block, place % page] = value

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    @property
    def query_start_loc(self) -> torch.Tensor:
        device = self.query.device
        return torch.arange(self.batch + 1, dtype=torch.int32, device=device)


def flash_attention(cache: DenseCache, num_splits: int = 32) -> Callable[[], None]:
    """vLLM's FlashAttention-3 with a schedule made ahead, as under CUDA graphs."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    starts = cache.query_start_loc
    plan = get_scheduler_metadata(
        batch_size=cache.batch,
        max_seqlen_q=1,
        max_seqlen_k=cache.seq_len,
        num_heads_q=cache.query.shape[1],
        num_heads_kv=cache.key.shape[2],
        headdim=cache.query.shape[2],
        cache_seqlens=cache.seq_lens,
        qkv_dtype=cache.query.dtype,
        cu_seqlens_q=starts,
        page_size=cache.key.shape[1],
        causal=True,
        num_splits=num_splits,
    )

    def call() -> None:
        flash_attn_varlen_func(
            q=cache.query,
            k=cache.key,
            v=cache.value,
            out=cache.out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=cache.seq_lens,
            max_seqlen_k=cache.seq_len,
            softmax_scale=cache.scale,
            causal=True,
            block_table=cache.block_table,
            scheduler_metadata=plan,
            num_splits=num_splits,
            fa_version=3,
        )

    return call


def triton_attention(cache: DenseCache) -> Callable[[], None]:
    """vLLM's TRITON_ATTN, split over the context for small batches as it does."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    heads, size = cache.query.shape[1:]
    starts = cache.query_start_loc
    threshold = max(1, 128 // cache.key.shape[2])

    def scratch(*shape: int) -> torch.Tensor:
        return torch.empty(
            (threshold, heads, TRITON_SEGMENTS, *shape),
            dtype=torch.float32,
            device=cache.query.device,
        )

    output, top, total = scratch(size), scratch(), scratch()
    ones = torch.ones(cache.batch, cache.key.shape[2], device=cache.query.device)

    def call() -> None:
        unified_attention(
            q=cache.query,
            k=cache.key,
            v=cache.value,
            out=cache.out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=cache.seq_lens,
            max_seqlen_k=cache.seq_len,
            softmax_scale=cache.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=cache.block_table,
            softcap=0.0,
            q_descale=None,
            k_descale=ones,
            v_descale=ones,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=TRITON_SEGMENTS,
            softmax_segm_output=output,
            softmax_segm_max=top,
            softmax_segm_expsum=total,
        )

    return call


def xformers_decode(cache: DenseCache) -> Callable[[], None]:
    """xformers' split-K decode attention over pages of 256 tokens.

    The same memory in larger pages, hence other contexts than the others attend to.
    """
    if (cache.seq_lens != cache.seq_len).any():
        raise ValueError("contexts of one length only")
    from xformers.ops import fmha
    from xformers.ops.fmha import attn_bias, triton_splitk

    heads, kv_heads = cache.query.shape[1], cache.key.shape[2]
    size, batch = cache.query.shape[2], cache.batch
    pages = -(-cache.seq_len // XFORMERS_PAGE)
    device = cache.query.device
    tokens = cache.key.shape[0] * cache.key.shape[1] // XFORMERS_PAGE * XFORMERS_PAGE
    order = torch.randperm(tokens // XFORMERS_PAGE, device=device)
    order = torch.cat([order, order])[: batch * pages]  # the last pages may be short
    bias = attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * batch,
        kv_padding=pages * XFORMERS_PAGE,
        kv_seqlen=[cache.seq_len] * batch,
        device=device,
    ).make_paged(
        order.view(batch, pages).int(),
        XFORMERS_PAGE,
        attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
    )
    query = cache.query.view(1, batch, kv_heads, heads // kv_heads, size)
    shape = (1, tokens, kv_heads, heads // kv_heads, size)
    key, value = (
        t.flatten(0, 1)[:tokens].view(1, tokens, kv_heads, 1, size).expand(shape)
        for t in (cache.key, cache.value)
    )

    inputs = fmha.Inputs(query, key, value, attn_bias=bias, p=0.0, scale=cache.scale)

    def call() -> None:
        # Not by xformers' front door, which asks for a build with CUDA: this op is
        # Triton's.
        triton_splitk.FwOp.apply(inputs, needs_gradient=False)

    return call


def cpu_attention(cache: DenseCache) -> Callable[[], None]:
    """vLLM's CPU_ATTN, which keeps keys in an order of its own."""
    from vllm import _custom_ops as vllm_ops
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    current_platform.import_kernels()
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
    pages, page, kv_heads, size = cache.key.shape
    isa = _get_attn_isa(cache.key.dtype, page, size)
    packed = torch.zeros(pages, kv_heads, 2 * page, size, dtype=cache.key.dtype)
    key, value = packed.chunk(2, dim=2)
    vllm_ops.cpu_attn_reshape_and_cache(
        cache.key.flatten(0, 1),
        cache.value.flatten(0, 1),
        key,
        value,
        torch.arange(pages * page),
        isa,
    )
    starts = cache.query_start_loc
    plan = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=cache.batch,
        num_heads=cache.query.shape[1],
        num_kv_heads=kv_heads,
        head_dim=size,
        seq_lens=cache.seq_lens,
        dtype=cache.key.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )

    def call() -> None:
        vllm_ops.cpu_attention_with_kv_cache(
            query=cache.query,
            key_cache=key,
            value_cache=value,
            output=cache.out,
            query_start_loc=starts,
            seq_lens=cache.seq_lens,
            scale=cache.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=cache.block_table,
            softcap=0.0,
            scheduler_metadata=plan,
            s_aux=None,
        )

    return call


PEERS = {
    "cpu_attn": cpu_attention,
    "fa3": flash_attention,
    "triton": triton_attention,
    "xformers": xformers_decode,
}

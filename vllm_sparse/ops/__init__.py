# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The op boundary: one function per op, backed by compiled kernels or Triton's.

Meanings are in :mod:`vllm_sparse.ops.reference`, function by function; byte layout in
:mod:`vllm_sparse.cache.layout`. Common arguments:

- ``kv_cache``: [num_blocks, num_kv_heads, BLOCK_SIZE, C], fp32, fp16 or bf16.
- ``block_table``: [num_rows, max_blocks] int32 block ids of each row's context.
- ``seq_lens``: [num_rows] int32 tokens, the query's own token included.
- ``fmt``: how the cache keeps K and V (:mod:`vllm_sparse.cache.formats`). In quantised
  formats a row of ``block_table`` names ``lookahead_blocks`` blocks more than its
  tokens fill.
- ``query``: [num_rows, num_heads, head_size], one query position per row.

:mod:`vllm_sparse.ops.dispatch` says which kernels run; :func:`use` sets it.
A broken contract raises RuntimeError naming the tensor and what was expected.
"""

import torch

from ..cache.formats import ROWS, KvFormat
from .dispatch import KernelsError, kernels_for, use
from .dispatch import ops_for as _ops
from .library import load

__all__ = [
    "KernelsError",
    "attend",
    "cpu_isa",
    "gather_kv",
    "kernels_for",
    "load",
    "seal_blocks",
    "seal_rows",
    "sparq_attend",
    "sparq_select",
    "store_kv",
    "store_quantised",
    "store_rows",
    "use",
    "workspace_bytes",
]


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write K and V rows into their slots.

    Args:
        key, value: [>= num_tokens, num_kv_heads, head_size], any token and head stride.
        slot_mapping: [num_tokens] int64, block * BLOCK_SIZE + offset; negative: skip.
    """
    _ops(kv_cache).store_kv(key, value, kv_cache, slot_mapping)


def seal_blocks(
    kv_cache: torch.Tensor,
    block_ids: torch.Tensor,
    prev_block_ids: torch.Tensor,
    block_index: torch.Tensor,
    head_size: int,
) -> None:
    """Write the sidecar of full blocks; may be repeated for a block.

    Args:
        block_ids: [num_jobs] int32 blocks to seal.
        prev_block_ids: [num_jobs] int32 block before each in its context; -1: none.
        block_index: [num_jobs] int32 place in the context, ascending.
    """
    _ops(kv_cache).seal_blocks(
        kv_cache, block_ids, prev_block_ids, block_index, head_size
    )


def seal_rows(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    head_size: int,
) -> None:
    """Seal the block that each decode request's newest tokens have filled, if any.

    One fixed grid whatever the lengths, so that a CUDA graph may hold it. Block 0,
    vLLM's null block, is never sealed.

    Args:
        block_table, seq_lens: one row per request.
        query_start_loc: [num_rows + 1] int32; a request has at most BLOCK_SIZE new
            tokens.
    """
    _ops(kv_cache).seal_rows(
        kv_cache, block_table, seq_lens, query_start_loc, head_size
    )


def store_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """:func:`store_kv` of one new token per decode request, then :func:`seal_rows`.

    Args:
        key, value: [>= num_rows, num_kv_heads, head_size].
        slot_mapping, block_table, seq_lens: one row per request.
    """
    _ops(kv_cache).store_rows(key, value, kv_cache, slot_mapping, block_table, seq_lens)


def store_quantised(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    fmt: KvFormat,
) -> None:
    """Store new tokens in a quantised cache, and seal the blocks that they fill.

    Tokens of a block that is not full are kept as rows; so are all tokens of a request
    that brings at most ``rows_per_block`` new ones, as drafts may be rejected and the
    block sealed again. Block 0, vLLM's null block, is never sealed.

    Args:
        key, value: [>= num_tokens, num_kv_heads, head_size], any token and head stride.
        block_table, seq_lens: one row per request.
        query_start_loc: [num_rows + 1] int32, a request's new tokens in ``key``.
    """
    _ops(kv_cache).store_quantised(
        key, value, kv_cache, block_table, seq_lens, query_start_loc, fmt.code
    )


def gather_kv(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out_start: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    fmt: KvFormat = ROWS,
) -> None:
    """Copy whole contexts out of the blocks, row after row.

    In quantised formats all full blocks are read from their codes, also the last one.

    Args:
        out_start: [num_rows] int64, the row's first token in ``key`` and ``value``.
        key, value: [num_tokens, num_kv_heads, head_size], written.
    """
    _ops(kv_cache).gather_kv(
        kv_cache, block_table, seq_lens, out_start, key, value, fmt.code
    )


def sparq_select(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    budgets: torch.Tensor,
    *,
    rank: int,
    local_window: int,
    sink_tokens: int,
    scale: float,
    soft_cap: float,
    top_p: float = 1.0,
    min_tokens: int = 0,
    indices: torch.Tensor,
    counts: torch.Tensor,
    kept_mass: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    fmt: KvFormat = ROWS,
) -> None:
    """SparQ's choice of tokens per row and KV head.

    With ``top_p`` below 1 a (row, KV head) keeps the fewest tokens that leave at most
    1 - top_p of the estimated probability mass outside, summed over its query heads, so
    that each of them keeps at least top_p of its own (Twilight, arXiv 2502.02770,
    section 3, with the mass of the whole context). Estimates then go without SparQ's
    temperature, which would make them sharper than the truth.

    Args:
        budgets: [num_rows] int32 tokens to keep, forced ones included; negative: all.
            With ``top_p`` below 1, the most to keep.
        top_p: in (0, 1]; 1: keep what ``budgets`` says.
        min_tokens: the fewest to keep with ``top_p`` below 1, forced ones included.
        indices: [num_rows, num_kv_heads, max_kept] int32, written: ascending positions.
        counts: [num_rows, num_kv_heads] int32, written: valid entries of ``indices``,
            or -1 where everything is kept.
        kept_mass: [num_rows, num_heads] fp32, written: estimated probability mass kept.
        workspace: see :func:`workspace_bytes`; without it, the op allocates.
    """
    _ops(kv_cache).sparq_select(
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
        workspace,
        fmt.code,
    )


def sparq_attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    budgets: torch.Tensor,
    *,
    rank: int,
    local_window: int,
    sink_tokens: int,
    scale: float,
    soft_cap: float,
    top_p: float = 1.0,
    min_tokens: int = 0,
    indices: torch.Tensor,
    counts: torch.Tensor,
    kept_mass: torch.Tensor | None = None,
    out: torch.Tensor,
    tokens_read: torch.Tensor | None = None,
    kept_histogram: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    fmt: KvFormat = ROWS,
) -> None:
    """:func:`sparq_select`, then :func:`attend` over what it chose, in one call.

    Args:
        kept_histogram: [num_kv_heads, KEPT_BINS] int64, added to: how many tokens
            sparse rows keep (:mod:`vllm_sparse.ops.kept`).
    """
    _ops(kv_cache).sparq_attend(
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
        tokens_read,
        kept_histogram,
        workspace,
        fmt.code,
    )


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    indices: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    kept_mass: torch.Tensor | None = None,
    scale: float,
    soft_cap: float = 0.0,
    out: torch.Tensor,
    tokens_read: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    fmt: KvFormat = ROWS,
) -> None:
    """Exact attention over the listed tokens; without lists, over the whole context.

    Args:
        indices, counts, kept_mass: as written by a selector, positions ascending;
            ``kept_mass`` turns the mean-value term on.
        out: [num_rows, num_heads, head_size], written.
        tokens_read: [1] int64 counter, the tokens attended per KV head are added to it;
            [3] on the CPU: in quantised formats also those of them in sealed blocks,
            and these blocks.
        workspace: see :func:`workspace_bytes`; without it, the op allocates.
    """
    _ops(kv_cache).attend(
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
        tokens_read,
        workspace,
        fmt.code,
    )


def workspace_bytes(
    num_rows: int,
    num_kv_heads: int,
    group: int,
    max_blocks: int,
    head_size: int,
    device: torch.device,
    adapts: bool = False,
) -> int:
    """Bytes of workspace for decode calls on a device up to this shape; may be 0.

    A workspace is a 1-D uint8 tensor, zeroed once when it is made. Calls on one stream
    may share it, whatever their shapes; only the CUDA kernels use one.

    Args:
        group: query heads of a KV head.
        max_blocks: columns of the block table.
        adapts: for calls with ``top_p`` below 1.
    """
    if kernels_for(device) != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    shape = (num_rows, num_kv_heads, group, max_blocks, head_size, adapts)
    return load().workspace_bytes(*shape, index)


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: avx512, avx2 or portable."""
    return load().cpu_isa()

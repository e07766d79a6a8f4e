# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The op boundary: one function per op, backed by compiled kernels or Triton's.

The functions of this module take what serves their tensors best; :func:`bound` gives
the same functions with a choice of kernels (option ``sparse.kernels``), which
:mod:`vllm_sparse.ops.dispatch` explains. Meanings are in
:mod:`vllm_sparse.ops.reference`, function by function; byte layout in
:mod:`vllm_sparse.cache.layout`. Common arguments:

- ``kv_cache``: [num_blocks, num_kv_heads, BLOCK_SIZE, C], fp16 or bf16; on CPUs and
  with Triton's kernels also fp32.
- ``block_table``: [num_rows, max_blocks] int32 block ids of each row's context.
- ``seq_lens``: [num_rows] int32 tokens, the row's new ones included.
- ``fmt``: how the cache keeps K and V (:mod:`vllm_sparse.cache.formats`). In quantised
  formats a row of ``block_table`` names ``lookahead_blocks`` blocks more than its
  tokens fill.
- ``query``: [num_rows, num_heads, head_size], one query position per row.
- ``workspace``: see :meth:`Ops.workspace_bytes`; without it, the op allocates.

A broken contract raises RuntimeError naming the tensor and what was expected. Values
on a GPU are not checked: kernels skip what is out of range.
"""

from dataclasses import dataclass

import torch

from ..cache.formats import ROWS, KvFormat
from .dispatch import KernelsError, functions, resolve
from .library import load
from .options import SparqOptions

__all__ = [
    "KernelsError",
    "Ops",
    "SparqOptions",
    "attend",
    "bound",
    "cpu_isa",
    "gather_kv",
    "load",
    "sparq_attend",
    "store",
    "workspace_bytes",
]


@dataclass(frozen=True)
class Ops:
    """The ops with a choice of kernels: "auto", "cpu", "cuda" or "triton"."""

    kernels: str = "auto"

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        fmt: KvFormat = ROWS,
    ) -> None:
        """Store requests' new tokens, and seal the blocks that they fill.

        Request r brought the tokens from ``query_start_loc[r]`` up to
        ``query_start_loc[r + 1]``, the last ones of its context. A token without a slot
        is not stored, and a block is sealed exactly when its last token is among the
        stored ones: so neither padding nor idle steps change anything, and block 0,
        vLLM's null block, is never written. A block may be sealed again, as after
        rejected drafts.

        Plain rows go to their slots. In quantised formats places come from the block
        table: tokens of a block that is not full are kept as rows; so are all of a
        request that brings at most ``rows_per_block``, as drafts may be rejected.

        Args:
            key, value: [>= num_tokens, num_kv_heads, head_size], any token and head
                stride.
            slot_mapping: [num_tokens] int64, block * BLOCK_SIZE + offset; negative: no
                slot. Tokens beyond the last request's are not stored. Where there are
                as many slots as requests, each may bring one token at most.
            block_table, seq_lens: one row per request.
            query_start_loc: [num_rows + 1] int32.
        """
        self._functions(kv_cache).store(
            key,
            value,
            kv_cache,
            slot_mapping,
            block_table,
            seq_lens,
            query_start_loc,
            fmt.code,
        )

    def gather_kv(
        self,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        out_start: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        fmt: KvFormat = ROWS,
    ) -> None:
        """Copy whole contexts out of the blocks, row after row.

        In quantised formats all full blocks are read from their codes, also the last.

        Args:
            out_start: [num_rows] int64, the row's first token in ``key`` and ``value``.
            key, value: [num_tokens, num_kv_heads, head_size], written.
        """
        self._functions(kv_cache).gather_kv(
            kv_cache, block_table, seq_lens, out_start, key, value, fmt.code
        )

    def sparq_attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        budgets: torch.Tensor,
        options: SparqOptions,
        *,
        indices: torch.Tensor,
        counts: torch.Tensor,
        kept_mass: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        kept_histogram: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
        fmt: KvFormat = ROWS,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """SparQ's choice of tokens per row and KV head, and :meth:`attend` over it.

        Args:
            budgets: [num_rows] int32 tokens to keep, forced ones included; negative:
                all. With ``top_p`` below 1, the most to keep.
            indices: [num_rows, num_kv_heads, max_kept] int32, written: ascending
                positions.
            counts: [num_rows, num_kv_heads] int32, written: valid entries of
                ``indices``, or -1 where everything is kept.
            kept_mass: [num_rows, num_heads] fp32, written: estimated probability mass
                kept. It turns the mean-value term on.
            out: [num_rows, num_heads, head_size], written; None: choose only.
            kept_histogram: [num_kv_heads, KEPT_BINS] int64, added to: how many tokens
                sparse rows keep (:mod:`vllm_sparse.ops.kept`).
            sinks: as :meth:`attend` takes them; which tokens are chosen does not depend
                on them.
        """
        self._functions(kv_cache).sparq_attend(
            query,
            kv_cache,
            block_table,
            seq_lens,
            budgets,
            options.sizes,
            options.numbers,
            indices,
            counts,
            kept_mass,
            out,
            kept_histogram,
            workspace,
            fmt.code,
            sinks,
        )

    def attend(
        self,
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
        workspace: torch.Tensor | None = None,
        fmt: KvFormat = ROWS,
        sinks: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Exact attention over the listed tokens; without lists, the whole context.

        Args:
            indices, counts, kept_mass: as :meth:`sparq_attend` writes them, positions
                ascending; ``kept_mass`` turns the mean-value term on.
            out: [num_rows, num_heads, head_size], written.
            sinks: [num_heads] fp32 logits that join each head's softmax and have no
                value (attention sinks, as gpt-oss learns them); not with ``kept_mass``.
            lse: [num_rows, num_heads] fp32, written: the logarithm of each head's sum
                of exponentials, to merge the result with another part's. Not by
                Triton's kernels, and on GPUs not over quantised blocks.
        """
        self._functions(kv_cache).attend(
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
            workspace,
            fmt.code,
            sinks,
            lse,
        )

    def workspace_bytes(
        self,
        num_rows: int,
        num_kv_heads: int,
        group: int,
        max_blocks: int,
        head_size: int,
        device: torch.device,
        adapts: bool = False,
    ) -> int:
        """Bytes of workspace for decode calls on a device up to this shape; may be 0.

        A workspace is a 1-D uint8 tensor, zeroed once when it is made. Calls on one
        stream may share it, whatever their shapes; only the CUDA kernels use one.

        Args:
            group: query heads of a KV head.
            max_blocks: columns of the block table.
            adapts: for calls with ``top_p`` below 1.
        """
        if resolve(self.kernels, device) != "cuda":
            return 0
        index = torch.cuda.current_device() if device.index is None else device.index
        shape = (num_rows, num_kv_heads, group, max_blocks, head_size, adapts)
        return load().workspace_bytes(*shape, index)

    def _functions(self, t: torch.Tensor):
        return functions(resolve(self.kernels, t.device))


def bound(kernels: str, device: torch.device | str) -> Ops:
    """The ops with the kernels that serve a device by a choice (``sparse.kernels``).

    Returns:
        ops whose ``kernels`` are "cpu", "cuda" or "triton".

    Raises:
        KernelsError: when the choice is unknown or cannot serve ``device``.
    """
    return Ops(resolve(kernels, torch.device(device)))


_auto = Ops()
store, gather_kv = _auto.store, _auto.gather_kv
sparq_attend, attend = _auto.sparq_attend, _auto.attend
workspace_bytes = _auto.workspace_bytes


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: avx512, avx2 or portable."""
    return load().cpu_isa()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Dense prefill on the CPU through vLLM's own attention kernel.

That kernel wants K and V packed its own way (channel-major, or AMX tiles), which token
selection could not read cheaply, so our blocks keep plain rows. A prefill step packs
the contexts of its rows into a scratch cache, one layer after the other, and runs
vLLM's kernel on it: packing S tokens costs little beside attending a chunk to them.
"""

from dataclasses import dataclass

import torch
from vllm import _custom_ops as vllm_ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from .. import ops
from ..cache.layout import BLOCK_SIZE
from ..methods import LayerShape
from .prefill_codes import QuantisedPrefill, Rows


@dataclass(frozen=True)
class KernelShape:
    """One attention layer, as vLLM's kernel plans for it."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def isa(self) -> str:
        return _get_attn_isa(self.dtype, BLOCK_SIZE, self.head_size)


@dataclass
class PackedRows:
    """Query rows over a scratch cache that vLLM's kernel reads.

    Attributes:
        query_start_loc: [num_rows + 1] int32.
        seq_lens: [num_rows] int32; the row's queries are its context's last tokens.
        block_table: [num_rows, max_blocks] int32, blocks of the scratch cache.
        slots: [num_tokens] int64, scratch slots of the K and V rows.
        num_blocks: blocks the scratch cache must have.
        scheduler_metadata: vLLM's plan for its kernel.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor
    num_blocks: int
    scheduler_metadata: torch.Tensor


@dataclass
class PrefillRows:
    """The prefill rows of one step; all layers of a KV cache group share it.

    Attributes:
        packed: the rows over the scratch cache, whose tokens go row after row.
        block_table: [num_rows, max_blocks] int32, blocks of the real cache.
        out_start: [num_rows] int64, where a row's tokens start in that order.
        has_context: whether any row has tokens from earlier steps.
    """

    packed: PackedRows
    block_table: torch.Tensor
    out_start: torch.Tensor
    has_context: bool


def plan_rows(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    slots: torch.Tensor,
    num_blocks: int,
    shape: KernelShape,
) -> PackedRows:
    """Ask vLLM's kernel for its plan; see :class:`PackedRows`."""
    metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(seq_lens),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_size,
        seq_lens=seq_lens,
        dtype=shape.dtype,
        query_start_loc=query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=shape.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
    )
    return PackedRows(
        query_start_loc, seq_lens, block_table, slots, num_blocks, metadata
    )


@dataclass
class QuantisedRows:
    """The prefill rows of one step over quantised blocks."""

    plan: QuantisedPrefill
    packed: PackedRows

    def attend(
        self,
        query: torch.Tensor,
        new: Rows,
        tails: Rows,
        kv_cache: torch.Tensor,
        shape: LayerShape,
        out: torch.Tensor,
    ) -> None:
        """Causal attention of the prefill tokens, which are stored.

        Args:
            query, out: [num_tokens, num_heads, head_size].
            new: the tokens' K and V.
            tails: what the plan saved before storing.
        """
        rows = row_buffers(self.plan.num_slots, shape)
        self.plan.fill(rows, tails, new, kv_cache, shape)
        attend_packed(query, *rows, self.packed, shape, out)


def plan_quantised_rows(plan: QuantisedPrefill, shape: KernelShape) -> QuantisedRows:
    packed = plan_rows(
        plan.query_start_loc,
        plan.seq_lens,
        plan.scratch_table,
        torch.arange(plan.num_slots),
        plan.num_blocks,
        shape,
    )
    return QuantisedRows(plan, packed)


def plan_prefill(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    shape: KernelShape,
) -> PrefillRows:
    """Lay out the scratch cache.

    Args:
        query_start_loc: [num_rows + 1] int32; need not start at 0.
        seq_lens: [num_rows] int32, context plus this step's tokens.
        block_table: [num_rows, max_blocks] int32, blocks of the real cache.
    """
    query_start_loc = query_start_loc - query_start_loc[0]
    lens = seq_lens.long()
    blocks = (lens + BLOCK_SIZE - 1) // BLOCK_SIZE
    first_block = blocks.cumsum(0) - blocks
    out_start = lens.cumsum(0) - lens
    total = int(lens.sum())
    # Token i of all rows sits at its row's first scratch slot plus its position.
    shift = (first_block * BLOCK_SIZE - out_start).repeat_interleave(lens)
    width = int(blocks.max())
    num_blocks = int(blocks.sum())
    # Entries past a row's own blocks are never read, but must be blocks.
    table = first_block[:, None] + torch.arange(width)[None, :]
    table = table.clamp(max=num_blocks - 1).int()
    slots = torch.arange(total) + shift
    return PrefillRows(
        packed=plan_rows(query_start_loc, seq_lens, table, slots, num_blocks, shape),
        block_table=block_table,
        out_start=out_start,
        has_context=total > int(query_start_loc[-1]),
    )


class Scratch:
    """Buffers that all layers of one shape share, grown on demand."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, torch.Tensor] = {}

    def get(self, name: str, first: int, *rest: int, dtype: torch.dtype):
        """A [>= first, *rest] tensor; zeros at first, then whatever was left there."""
        key = (name, rest, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape[0] < first:
            # The old one goes first, or both would be held while it grows.
            del buffer
            self._buffers.pop(key, None)
            # Finite always: masked products of stale memory must not become NaN.
            buffer = torch.zeros((first, *rest), dtype=dtype)
            self._buffers[key] = buffer
        return buffer


scratch = Scratch()


def prefill(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: torch.Tensor,
    rows: PrefillRows,
    shape: LayerShape,
    out: torch.Tensor,
) -> None:
    """Causal attention of the prefill tokens over their contexts.

    Args:
        query, key, value: the step's prefill tokens, [num_tokens, heads, head_size];
            without key and value, all rows are read from the cache.
        kv_cache: the layer's cache, this step's rows already stored.
        out: [num_tokens, num_heads, head_size], written.
    """
    packed = rows.packed
    if rows.has_context or key is None or value is None:
        key, value = row_buffers(packed.slots.numel(), shape)
        ops.gather_kv(
            kv_cache, rows.block_table, packed.seq_lens, rows.out_start, key, value
        )
    attend_packed(query, key, value, packed, shape, out)


def row_buffers(
    num_tokens: int, shape: LayerShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scratch for K and V rows: [num_tokens, num_kv_heads, head_size] each."""
    size = (shape.num_kv_heads, shape.head_size)
    key, value = (
        scratch.get(name, num_tokens, *size, dtype=shape.dtype)[:num_tokens]
        for name in ("key", "value")
    )
    return key, value


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedRows,
    shape: LayerShape,
    out: torch.Tensor,
) -> None:
    """Pack K and V rows into the scratch cache and run vLLM's kernel on it.

    Args:
        query, out: [num_tokens, num_heads, head_size].
        key, value: [>= len(packed.slots), num_kv_heads, head_size].
    """
    dtype, heads, size = shape.dtype, shape.num_kv_heads, shape.head_size
    cache = scratch.get(
        "packed", packed.num_blocks, heads, 2 * BLOCK_SIZE, size, dtype=dtype
    )
    key_cache, value_cache = cache.chunk(2, dim=2)
    total = packed.slots.numel()
    vllm_ops.cpu_attn_reshape_and_cache(
        key[:total],
        value[:total],
        key_cache,
        value_cache,
        packed.slots,
        _get_attn_isa(dtype, BLOCK_SIZE, size),
    )
    vllm_ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=out,
        query_start_loc=packed.query_start_loc,
        seq_lens=packed.seq_lens,
        scale=shape.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=packed.block_table,
        softcap=shape.soft_cap,
        scheduler_metadata=packed.scheduler_metadata,
        s_aux=None,
    )

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
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from ..cache.layout import BLOCK_SIZE
from ..methods import LayerShape
from ..ops import Ops
from .dense_rows import DenseRows, token_slice
from .prefill_codes import CodeRows, Rows


@dataclass
class PackedRows(DenseRows):
    """Rows over a scratch cache that vLLM's kernel reads.

    Attributes:
        ops: with the engine's kernels.
        query_start_loc: [num_rows + 1] int32.
        seq_lens: [num_rows] int32; the row's queries are its context's last tokens.
        scratch_table: [num_rows, max_blocks] int32, blocks of the scratch cache.
        num_blocks: blocks of the scratch cache.
        slots: [sum of seq_lens] int64, scratch slots of the contexts' tokens.
        block_table: [num_rows, max_blocks] int32, blocks of the real cache.
        out_start: [num_rows] int64, a row's first among the contexts' tokens.
        has_context: whether any row has tokens from earlier steps.
        plan: vLLM's for its kernel.
    """

    ops: Ops
    tokens: slice
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    scratch_table: torch.Tensor
    num_blocks: int
    slots: torch.Tensor
    block_table: torch.Tensor
    out_start: torch.Tensor
    has_context: bool
    plan: torch.Tensor

    @classmethod
    def of(
        cls,
        common: CommonAttentionMetadata,
        requests: slice,
        shape: LayerShape,
        ops: Ops,
    ) -> "PackedRows":
        tokens = token_slice(common, requests)
        starts = common.query_start_loc[requests.start : requests.stop + 1]
        starts = starts - tokens.start
        seq_lens = common.seq_lens[requests]
        lens = seq_lens.long()
        blocks = (lens + BLOCK_SIZE - 1) // BLOCK_SIZE
        first_block = blocks.cumsum(0) - blocks
        out_start = lens.cumsum(0) - lens
        total = int(lens.sum())
        # Token i of all rows sits at its row's first scratch slot plus its position.
        shift = (first_block * BLOCK_SIZE - out_start).repeat_interleave(lens)
        num_blocks = int(blocks.sum())
        # Entries past a row's own blocks are never read, but must be blocks.
        table = first_block[:, None] + torch.arange(int(blocks.max()))[None, :]
        return cls(
            ops=ops,
            tokens=tokens,
            query_start_loc=starts,
            seq_lens=seq_lens,
            scratch_table=table.clamp(max=num_blocks - 1).int(),
            num_blocks=num_blocks,
            slots=torch.arange(total) + shift,
            block_table=common.block_table_tensor[requests],
            out_start=out_start,
            has_context=total > tokens.stop - tokens.start,
            plan=kernel_plan(starts, seq_lens, shape),
        )

    def attend(self, query, key, value, saved, kv_cache, shape, out) -> None:
        if self.has_context or key is None:
            key, value = row_buffers(len(self.slots), shape)
            where = (self.block_table, self.seq_lens, self.out_start)
            self.ops.gather_kv(kv_cache, *where, key, value, shape.fmt)
        attend_packed(query, key, value, self, shape, out)


class PackedCodes(CodeRows):
    """Rows over quantised blocks."""

    def __init__(self, shape: LayerShape, ops: Ops, **layout) -> None:
        super().__init__(ops, **layout)
        self.slots = torch.arange(self.num_slots)
        self.plan = kernel_plan(self.query_start_loc, self.seq_lens, shape)

    def scratch(self, kv_cache: torch.Tensor, shape: LayerShape) -> Rows:
        return row_buffers(self.num_slots, shape)

    def attend_scratch(self, query, scratch, shape, out) -> None:
        attend_packed(query, *scratch, self, shape, out)


def kernel_plan(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, shape: LayerShape
) -> torch.Tensor:
    """How vLLM's kernel spreads its work."""
    return vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(seq_lens),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_size,
        seq_lens=seq_lens,
        dtype=shape.dtype,
        query_start_loc=query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=_get_attn_isa(shape.dtype, BLOCK_SIZE, shape.head_size),
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
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


def row_buffers(num_tokens: int, shape: LayerShape) -> Rows:
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
    rows: PackedRows | PackedCodes,
    shape: LayerShape,
    out: torch.Tensor,
) -> None:
    """Pack K and V rows into the scratch cache and run vLLM's kernel on it.

    Args:
        query, out: [num_tokens, num_heads, head_size].
        key, value: [>= len(rows.slots), num_kv_heads, head_size].
    """
    dtype, heads, size = shape.dtype, shape.num_kv_heads, shape.head_size
    cache = scratch.get(
        "packed", rows.num_blocks, heads, 2 * BLOCK_SIZE, size, dtype=dtype
    )
    key_cache, value_cache = cache.chunk(2, dim=2)
    slots = rows.slots
    vllm_ops.cpu_attn_reshape_and_cache(
        key[: len(slots)],
        value[: len(slots)],
        key_cache,
        value_cache,
        slots,
        _get_attn_isa(dtype, BLOCK_SIZE, size),
    )
    vllm_ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=out,
        query_start_loc=rows.query_start_loc,
        seq_lens=rows.seq_lens,
        scale=shape.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=rows.scratch_table,
        softcap=shape.soft_cap,
        scheduler_metadata=rows.plan,
        s_aux=shape.sinks,
    )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Prefill over quantised blocks on the CPU.

A prompt's token attends to what it would if it were decoded: to the codes of the blocks
before its own, and to its own block's tokens in full precision. So neither chunks of a
prompt nor cached prefixes nor preemption change what a token sees. Each block of new
tokens is a row of its own for vLLM's kernel: its table names scratch blocks made from
codes and, last, an exact one.
"""

from dataclasses import dataclass

import torch

from .. import ops
from ..cache.layout import BLOCK_SIZE
from ..selectors import LayerShape
from .cpu_prefill import KernelShape, PackedRows, attend_packed, plan_rows, row_buffers


@dataclass
class QuantisedPrefill:
    """The prefill rows of one step; all layers of a KV cache group share it.

    K and V go into the scratch cache request after request: the tokens of sealed
    blocks, then those of the blocks that get new tokens.

    Attributes:
        packed: a row for every request and block with new tokens.
        block_table: [num_requests, max_blocks] int32, blocks of the real cache.
        sealed_lens: [num_requests] int32 tokens read from codes.
        sealed_start: [num_requests] int64, where they go.
        tail_table: the tables from the first block with new tokens on.
        tail_lens: [num_requests] int32 earlier tokens of that block.
        tail_start: [num_requests] int64, where they go.
        new_place: [num_new_tokens] int64, where the step's tokens go.
    """

    packed: PackedRows
    block_table: torch.Tensor
    sealed_lens: torch.Tensor
    sealed_start: torch.Tensor
    tail_table: torch.Tensor
    tail_lens: torch.Tensor
    tail_start: torch.Tensor
    new_place: torch.Tensor

    def before_storing(self, kv_cache: torch.Tensor, shape: LayerShape) -> None:
        """Copy what storing the step's tokens overwrites: rows of unfinished blocks."""
        key, value = row_buffers(self.packed.slots.numel(), shape)
        if bool(self.tail_lens.any()):
            ops.gather_kv(
                kv_cache,
                self.tail_table,
                self.tail_lens,
                self.tail_start,
                key,
                value,
                shape.fmt,
            )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        shape: LayerShape,
        out: torch.Tensor,
    ) -> None:
        """Causal attention, the step's tokens being stored.

        Args:
            query, key, value, out: the step's prefill tokens,
                [num_tokens, heads, head_size].
        """
        rows = row_buffers(self.packed.slots.numel(), shape)
        if bool(self.sealed_lens.any()):
            ops.gather_kv(
                kv_cache,
                self.block_table,
                self.sealed_lens,
                self.sealed_start,
                *rows,
                shape.fmt,
            )
        for new, row in zip((key, value), rows):
            row[self.new_place] = new
        attend_packed(query, *rows, self.packed, shape, out)


def plan_quantised_prefill(
    starts: list[int],
    seq_lens: list[int],
    block_table: torch.Tensor,
    shape: KernelShape,
) -> QuantisedPrefill:
    """Lay out the scratch cache.

    Args:
        starts: first token of each request, and the end of the last.
        seq_lens: context of each request, the step's tokens included.
        block_table: [num_requests, max_blocks] int32.
    """
    width = max((length - 1) // BLOCK_SIZE for length in seq_lens) + 1
    # Tables may be read beyond a request's blocks where it has none to read.
    shifted = torch.zeros_like(block_table)
    query_starts, lens, tables, slots, new_place = [0], [], [], [], []
    sealed_lens, sealed_start, tail_lens, tail_start = [], [], [], []
    num_tokens = num_blocks = 0
    for row, length in enumerate(seq_lens):
        new = starts[row + 1] - starts[row]
        computed, last = length - new, (length - 1) // BLOCK_SIZE
        first = computed // BLOCK_SIZE
        shifted[row, : block_table.shape[1] - first] = block_table[row, first:]
        sealed_lens.append(last * BLOCK_SIZE)
        sealed_start.append(num_tokens)
        tail_lens.append(computed - first * BLOCK_SIZE)
        tail_start.append(num_tokens + last * BLOCK_SIZE)
        place = tail_start[row] + tail_lens[row]
        new_place.append(torch.arange(place, place + new))
        count = last * BLOCK_SIZE + length - first * BLOCK_SIZE
        slots.append(torch.arange(count) + num_blocks * BLOCK_SIZE)
        for block in range(first, last + 1):
            end = min(length, (block + 1) * BLOCK_SIZE)
            begin = max(computed, block * BLOCK_SIZE)
            query_starts.append(query_starts[-1] + end - begin)
            lens.append(end)
            table = torch.full((width,), num_blocks)
            table[:block] += torch.arange(block)
            table[block] = num_blocks + last + block - first
            tables.append(table)
        num_tokens += count
        num_blocks += last + last - first + 1
    return QuantisedPrefill(
        packed=plan_rows(
            torch.tensor(query_starts, dtype=torch.int32),
            torch.tensor(lens, dtype=torch.int32),
            torch.stack(tables).int(),
            torch.cat(slots),
            num_blocks,
            shape,
        ),
        block_table=block_table,
        sealed_lens=torch.tensor(sealed_lens, dtype=torch.int32),
        sealed_start=torch.tensor(sealed_start),
        tail_table=shifted,
        tail_lens=torch.tensor(tail_lens, dtype=torch.int32),
        tail_start=torch.tensor(tail_start),
        new_place=torch.cat(new_place),
    )

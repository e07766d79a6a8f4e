# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Prefill over quantised blocks, on any device.

A prompt's token attends to what it would if it were decoded: to the codes of the blocks
before its own, and to its own block's tokens in full precision. So neither chunks of a
prompt nor cached prefixes nor preemption change what a token sees. Each block of new
tokens is a row of its own for the attention kernel: its table names scratch blocks made
from codes and, last, an exact one.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..cache.layout import BLOCK_SIZE
from ..methods import LayerShape
from ..ops import Ops
from .dense_rows import DenseRows, host_lens

Rows = tuple[torch.Tensor, torch.Tensor]


@dataclass
class CodeRows(DenseRows):
    """Requests whose contexts fill one scratch cache.

    The scratch cache has, request after request, a block for each that is read from its
    codes and one for each that gets new tokens. Places in it are token slots.

    Attributes:
        ops: with the engine's kernels.
        num_blocks: blocks of the scratch cache.
        query_start_loc: [num_rows + 1] int32, a row for every block with new tokens.
        seq_lens: [num_rows] int32; the row's queries are its context's last tokens.
        scratch_table: [num_rows, max_blocks] int32.
        max_query_len, max_seq_len: the longest row's.
        block_table: [num_requests, max_blocks] int32, blocks of the real cache.
        sealed_lens: [num_requests] int32 tokens read from codes.
        sealed_start: [num_requests] int64, where they go.
        tail_table: the tables from the first block with new tokens on.
        tail_lens: [num_requests] int32 earlier tokens of that block.
        tail_start: [num_requests] int64, where they go in a buffer of their own.
        tail_place: [sum of tail_lens] int64, and then in the scratch cache.
        new_place: [num_tokens] int64, where the step's tokens go.
        pad_place: int64 slots that nothing fills.
    """

    ops: Ops
    tokens: slice
    num_blocks: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    scratch_table: torch.Tensor
    max_query_len: int
    max_seq_len: int
    block_table: torch.Tensor
    sealed_lens: torch.Tensor
    sealed_start: torch.Tensor
    tail_table: torch.Tensor
    tail_lens: torch.Tensor
    tail_start: torch.Tensor
    tail_place: torch.Tensor
    new_place: torch.Tensor
    pad_place: torch.Tensor

    @property
    def num_slots(self) -> int:
        return self.num_blocks * BLOCK_SIZE

    def save(self, kv_cache: torch.Tensor, shape: LayerShape) -> Rows:
        """Rows of unfinished blocks."""
        size = (len(self.tail_place), shape.num_kv_heads, shape.head_size)
        tails = (kv_cache.new_empty(size), kv_cache.new_empty(size))
        if len(self.tail_place):
            where = (self.tail_table, self.tail_lens, self.tail_start)
            self.ops.gather_kv(kv_cache, *where, *tails, shape.fmt)
        return tails

    def attend(self, query, key, value, saved, kv_cache, shape, out) -> None:
        scratch = self.scratch(kv_cache, shape)
        where = (self.block_table, self.sealed_lens, self.sealed_start)
        self.ops.gather_kv(kv_cache, *where, *scratch, shape.fmt)
        for buffer, tail, new in zip(scratch, saved, (key, value)):
            buffer[self.tail_place] = tail
            buffer[self.new_place] = new
            # Kernels multiply what they mask by zero: it must be finite.
            buffer[self.pad_place] = 0
        self.attend_scratch(query, scratch, shape, out)

    @abstractmethod
    def scratch(self, kv_cache: torch.Tensor, shape: LayerShape) -> Rows:
        """K and V of the scratch cache: [num_slots, num_kv_heads, head_size] each."""

    @abstractmethod
    def attend_scratch(
        self, query: torch.Tensor, scratch: Rows, shape: LayerShape, out: torch.Tensor
    ) -> None:
        """Causal attention over the scratch cache."""


def plan_codes(
    common: CommonAttentionMetadata,
    requests: slice,
    scratch_blocks: int,
    make: Callable[..., CodeRows],
) -> list[DenseRows]:
    """Lay out scratch caches of at most ``scratch_blocks`` for several requests."""
    starts = common.query_start_loc_cpu[requests.start : requests.stop + 1].tolist()
    seq_lens = host_lens(common, requests)
    groups, first, blocks = [], 0, 0
    for row, length in enumerate(seq_lens):
        count = _blocks_of(length, starts[row + 1] - starts[row])
        if row > first and blocks + count > scratch_blocks:
            groups.append(slice(first, row))
            first, blocks = row, 0
        blocks += count
    groups.append(slice(first, len(seq_lens)))
    block_table = common.block_table_tensor[requests]
    return [_plan(make, starts, seq_lens, block_table, rows) for rows in groups]


def _blocks_of(length: int, new: int) -> int:
    last = (length - 1) // BLOCK_SIZE
    return last + last - (length - new) // BLOCK_SIZE + 1


def _plan(
    make: Callable[..., CodeRows],
    starts: list[int],
    seq_lens: list[int],
    block_table: torch.Tensor,
    rows: slice,
) -> CodeRows:
    lens, table = seq_lens[rows], block_table[rows]
    new_tokens = [starts[r + 1] - starts[r] for r in range(rows.start, rows.stop)]
    width = max((length - 1) // BLOCK_SIZE for length in lens) + 1
    query_starts, row_lens, tables = [0], [], []
    sealed_lens, sealed_start, tail_lens, tail_start = [], [], [], []
    first_blocks, tail_place, new_place, pad_place = [], [], [], []
    num_blocks = num_tails = 0
    for length, new in zip(lens, new_tokens):
        computed, last = length - new, (length - 1) // BLOCK_SIZE
        first = computed // BLOCK_SIZE
        first_blocks.append(first)
        sealed_lens.append(last * BLOCK_SIZE)
        sealed_start.append(num_blocks * BLOCK_SIZE)
        tail = computed - first * BLOCK_SIZE
        tail_lens.append(tail)
        tail_start.append(num_tails)
        num_tails += tail
        exact = (num_blocks + last) * BLOCK_SIZE
        end = exact + tail + new
        tail_place.append(torch.arange(exact, exact + tail))
        new_place.append(torch.arange(exact + tail, end))
        for block, place in enumerate(range(first, last + 1)):
            stop = min(length, (place + 1) * BLOCK_SIZE)
            begin = max(computed, place * BLOCK_SIZE)
            query_starts.append(query_starts[-1] + stop - begin)
            row_lens.append(stop)
            row = torch.full((width,), num_blocks)
            row[:place] += torch.arange(place)
            row[place] = num_blocks + last + block
            tables.append(row)
        num_blocks += _blocks_of(length, new)
        pad_place.append(torch.arange(end, num_blocks * BLOCK_SIZE))

    device = block_table.device

    def there(values, dtype) -> torch.Tensor:
        host = torch.as_tensor(values, dtype=dtype)
        if device.type != "cuda":
            return host
        return host.pin_memory().to(device, non_blocking=True)

    # Tables from the first block with new tokens on; beyond a table's end, block 0.
    columns = torch.arange(table.shape[1])[None] + torch.tensor(first_blocks)[:, None]
    beyond = there(columns >= table.shape[1], torch.bool)
    columns = there(columns.clamp(max=table.shape[1] - 1), torch.int64)
    return make(
        tokens=slice(starts[rows.start], starts[rows.stop]),
        num_blocks=num_blocks,
        query_start_loc=there(query_starts, torch.int32),
        seq_lens=there(row_lens, torch.int32),
        scratch_table=there(torch.stack(tables), torch.int32),
        max_query_len=max(b - a for a, b in zip(query_starts, query_starts[1:])),
        max_seq_len=max(row_lens),
        block_table=table,
        sealed_lens=there(sealed_lens, torch.int32),
        sealed_start=there(sealed_start, torch.int64),
        tail_table=table.gather(1, columns).masked_fill_(beyond, 0),
        tail_lens=there(tail_lens, torch.int32),
        tail_start=there(tail_start, torch.int64),
        tail_place=there(torch.cat(tail_place), torch.int64),
        new_place=there(torch.cat(new_place), torch.int64),
        pad_place=there(torch.cat(pad_place), torch.int64),
    )

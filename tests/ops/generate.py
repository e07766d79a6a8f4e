# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Random paged caches for tests and benchmarks."""

from dataclasses import dataclass

import torch

from vllm_sparse.cache.formats import ROWS, KvFormat
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout


@dataclass
class PagedContext:
    """A batch of contexts in a paged cache with randomly permuted blocks.

    Attributes:
        kv_cache: [num_blocks, num_kv_heads, BLOCK_SIZE, C]; unused memory is NaN.
        block_table: [num_rows, max_blocks] int32, padded with the null block 0.
        seq_lens: [num_rows] int32.
        keys, values: per row, [seq_len, num_kv_heads, head_size].
    """

    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def slots(self, row: int) -> torch.Tensor:
        """Slots of the row's tokens: [seq_len] int64."""
        position = torch.arange(int(self.seq_lens[row]))
        block = self.block_table[row][position // BLOCK_SIZE].long()
        return block * BLOCK_SIZE + position % BLOCK_SIZE

    def new_tokens(
        self, first: list[int] | None = None, last: list[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Arguments of ``store``, but for the cache, that bring the tokens of each row
        from ``first`` (0) to ``last`` (the whole context)."""
        last = self.seq_lens.tolist() if last is None else last
        first = [0] * len(last) if first is None else first
        spans = [slice(*span) for span in zip(first, last)]
        counts = torch.tensor([0] + [span.stop - span.start for span in spans])
        slots = [self.slots(row)[span] for row, span in enumerate(spans)]
        return dict(
            key=torch.cat([t[span] for t, span in zip(self.keys, spans)]),
            value=torch.cat([t[span] for t, span in zip(self.values, spans)]),
            slot_mapping=torch.cat(slots),
            block_table=self.block_table,
            seq_lens=torch.tensor(last, dtype=torch.int32),
            query_start_loc=counts.cumsum(0).int(),
        )


def empty_cache(
    num_blocks: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    fmt: KvFormat = ROWS,
) -> torch.Tensor:
    """A cache full of NaN (every byte 0xFF), so that unwritten memory shows."""
    layout = BlockLayout(head_size, dtype.itemsize, fmt)
    shape = (num_blocks, num_kv_heads, BLOCK_SIZE, layout.content_bytes)
    return torch.full(shape, 0xFF, dtype=torch.uint8).view(dtype)


def paged_context(
    seq_lens: list[int],
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    spare_blocks: int = 3,
    fmt: KvFormat = ROWS,
    heads_apart: bool = False,
) -> PagedContext:
    """Random keys (with a few strong channels, as in real models) and values.

    Args:
        heads_apart: blocks lie nearer to each other than heads.
    """
    ahead = BlockLayout(head_size, dtype.itemsize, fmt).lookahead_blocks
    counts = [-(-length // BLOCK_SIZE) + ahead for length in seq_lens]
    max_blocks, total = max(counts), sum(counts) + 1 + spare_blocks
    order = (torch.randperm(total - 1, generator=generator) + 1).tolist()
    table = torch.zeros(len(seq_lens), max_blocks + 1, dtype=torch.int32)
    keys, values = [], []
    strength = torch.rand(num_kv_heads, head_size, generator=generator) * 2
    offset = torch.randn(num_kv_heads, head_size, generator=generator)
    for row, length in enumerate(seq_lens):
        count = counts[row]
        table[row, :count] = torch.tensor([order.pop() for _ in range(count)])
        shape = (length, num_kv_heads, head_size)
        key = torch.randn(shape, generator=generator) * strength + offset
        keys.append(key.to(dtype))
        values.append(torch.randn(shape, generator=generator).to(dtype))
    cache = empty_cache(total, num_kv_heads, head_size, dtype, fmt)
    if heads_apart:
        cache = cache.transpose(0, 1).contiguous().transpose(0, 1)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return PagedContext(cache, table, lens, keys, values)

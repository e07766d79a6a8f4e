# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Random paged caches for tests and benchmarks."""

from dataclasses import dataclass

import torch

from ..cache.formats import ROWS, KvFormat
from ..cache.layout import BLOCK_SIZE, BlockLayout


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

    def slots(self, row: int, first: int = 0) -> torch.Tensor:
        """Slots of the row's tokens from ``first``: [seq_len - first] int64."""
        position = torch.arange(first, int(self.seq_lens[row]))
        block = self.block_table[row][position // BLOCK_SIZE].long()
        return block * BLOCK_SIZE + position % BLOCK_SIZE

    def seal_jobs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Arguments of ``seal_blocks`` for every full block."""
        jobs = []
        for row, length in enumerate(self.seq_lens.tolist()):
            blocks = self.block_table[row].tolist()
            for i in range(length // BLOCK_SIZE):
                jobs.append((i, blocks[i], blocks[i - 1] if i else -1))
        jobs.sort()
        index, block, prev = (
            torch.tensor([job[i] for job in jobs], dtype=torch.int32) for i in range(3)
        )
        return block, prev, index


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
) -> PagedContext:
    """Random keys (with a few strong channels, as in real models) and values."""
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
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return PagedContext(cache, table, lens, keys, values)

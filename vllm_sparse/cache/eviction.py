# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Contexts of which only the first and the last blocks are kept (StreamingLLM, arXiv
2309.17453, section 3.2), in whole blocks.

A query position in block b attends to the sink blocks, to the ``window_blocks`` blocks
before b, and to b up to itself; so the window has ``window_blocks * BLOCK_SIZE + 1`` to
``(window_blocks + 1) * BLOCK_SIZE`` tokens, and all positions of a block have the same.
Keys carry their positions, so what is attended to may lie anywhere: the kept blocks in
a row, the *compact* context, are attended to as any other context is.
"""

from dataclasses import dataclass

import torch

from .layout import BLOCK_SIZE

# Blocks behind the window that a request still holds: what has left is told from there.
LAG_BLOCKS = 1


@dataclass(frozen=True)
class Eviction:
    """What a request keeps.

    Attributes:
        sink_blocks: the first blocks of a context.
        window_blocks: whole blocks before a position's own.
        prompts: whether a prompt's positions are served so, too, and give blocks back
            while it is computed; else they attend to everything before them.
    """

    sink_blocks: int
    window_blocks: int
    prompts: bool

    @property
    def kept_blocks(self) -> int:
        """The most blocks that a position attends to."""
        return self.sink_blocks + self.window_blocks + 1

    def skipped_blocks(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """Blocks that the last position of contexts does not attend to."""
        blocks = (seq_lens + BLOCK_SIZE - 1) // BLOCK_SIZE
        return (blocks - self.kept_blocks).clamp(min=0)

    def evicted(self, computed_tokens: int) -> range:
        """Blocks that no position from ``computed_tokens`` on needs."""
        window = computed_tokens // BLOCK_SIZE - self.window_blocks
        return range(self.sink_blocks, window - LAG_BLOCKS)

    def compact_table(
        self, block_table: torch.Tensor, skipped: torch.Tensor
    ) -> torch.Tensor:
        """Block ids of compact contexts.

        Args:
            block_table: [num_rows, max_blocks] int32.
            skipped: [num_rows] blocks, of :meth:`skipped_blocks` or 0.

        Returns:
            [num_rows, width] int32, room for :attr:`kept_blocks`, or for whole contexts
            where prompts attend to them; entries behind a context are any of the row's.
        """
        width = most = block_table.shape[1]
        if self.prompts:
            width = min(self.kept_blocks, most)
        place = torch.arange(width, device=block_table.device)
        moved = place + skipped[:, None] * (place >= self.sink_blocks)
        return block_table.gather(1, moved.clamp(max=most - 1))

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Memory that decode rows share, at fixed addresses: CUDA graphs read it there."""

from collections.abc import Iterator, Mapping

import torch

from ..methods import DecodeRows, LayerShape
from ..ops import Ops

# Decode rows share this much memory for scores and lists; more rows take turns.
SCRATCH_BYTES = 512 * 2**20


class Buffers:
    """Room for the rows of a step.

    Args:
        num_rows: the most of a step.
        max_kept: the most tokens of a list.
        max_blocks: columns of the block table.
        adapts: whether budgets do (``top_p``).
    """

    def __init__(
        self,
        shape: LayerShape,
        ops: Ops,
        device: torch.device,
        num_rows: int,
        max_kept: int,
        max_blocks: int,
        adapts: bool,
    ) -> None:
        self.max_kept, self.max_blocks, self.adapts = max_kept, max_blocks, adapts
        heads = shape.num_kv_heads

        def scratch(rows: int) -> int:
            return ops.workspace_bytes(
                num_rows=rows,
                num_kv_heads=heads,
                group=shape.num_queries_per_kv,
                max_blocks=max_blocks,
                head_size=shape.head_size,
                device=device,
                adapts=adapts,
            )

        per_row = 4 * heads * max_kept + scratch(2) - scratch(1)
        self.rows_at_once = min(num_rows, max(8, SCRATCH_BYTES // per_row))
        rows = self.rows_at_once

        def empty(*size: int, dtype=torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        # Not zeroed on CPUs: what no list needs takes no memory there.
        make = torch.zeros if device.type == "cuda" else torch.empty
        size = (rows, heads, max_kept)
        self.indices = make(size, dtype=torch.int32, device=device)
        self.counts = empty(rows, heads)
        self.kept_mass = empty(rows, shape.num_heads, dtype=torch.float32)
        self.workspace = empty(scratch(rows), dtype=torch.uint8)
        self.budgets = empty(num_rows)
        # Of rows that are not one per request.
        self.seq_lens = empty(num_rows)
        self.block_table = empty(num_rows, max_blocks)

    def fits(self, num_rows: int, max_blocks: int) -> bool:
        return num_rows <= len(self.budgets) and max_blocks <= self.max_blocks

    def rows(
        self,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        budgets: torch.Tensor,
        kept_histograms: Mapping[str, torch.Tensor],
    ) -> Iterator[DecodeRows]:
        """Parts of a step's rows that fit into the buffers at once."""
        for first in range(0, len(seq_lens), self.rows_at_once):
            part = slice(first, min(first + self.rows_at_once, len(seq_lens)))
            size = part.stop - part.start
            yield DecodeRows(
                block_table=block_table[part],
                seq_lens=seq_lens[part],
                budgets=budgets[part],
                indices=self.indices[:size],
                counts=self.counts[:size],
                kept_mass=self.kept_mass[:size],
                workspace=self.workspace,
                kept_histograms=kept_histograms,
            )

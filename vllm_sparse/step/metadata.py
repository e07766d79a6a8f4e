# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the layers of one group share of a step."""

from dataclasses import dataclass
from functools import cached_property

import torch
from vllm.v1.attention.backend import AttentionMetadata

from ..cache.layout import BLOCK_SIZE
from ..layer.dense_rows import DenseRows
from ..methods import DecodeRows, Phase


@dataclass
class SparseMetadata(AttentionMetadata):
    """Requests that decode come first in the batch, prompts after them.

    Attributes:
        phase: what positions of requests that decode are for.
        slot_mapping: [num_actual_tokens] int64.
        block_table: [num_reqs, max_blocks] int32.
        seq_lens: [num_reqs] int32.
        query_start_loc: [num_reqs + 1] int32.
        decode: positions that may be sparse, one part after another, as they share
            their buffers.
        together: the same positions request by request, for layers in which they attend
            to everything; None where they are served one by one there, too.
        prefill: the other positions.
        anchor_slots: [num_actual_tokens] int64, where old lines leave anchors: the
            slots of the step's; -1: none.
    """

    phase: Phase
    num_actual_tokens: int
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    decode: list[DecodeRows]
    together: DenseRows | None
    prefill: list[DenseRows]
    anchor_slots: torch.Tensor | None = None

    @cached_property
    def filled(self) -> list[tuple[int, int, int]]:
        """Blocks whose last token this step stores: (place in the context, block id, id
        of the one before it, or of the null block), by their places. On the host."""
        starts, lens = self.query_start_loc.tolist(), self.seq_lens.tolist()
        found = []
        for row, length in enumerate(lens):
            done = length - (starts[row + 1] - starts[row])
            for place in range(done // BLOCK_SIZE, length // BLOCK_SIZE):
                token = starts[row] + (place + 1) * BLOCK_SIZE - 1 - done
                block = int(self.slot_mapping[token]) // BLOCK_SIZE
                if block > 0:  # else it has no slot: padding, or an idle step
                    before = int(self.block_table[row, place - 1]) if place else 0
                    found.append((place, block, before))
        return sorted(found)

    @cached_property
    def jobs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same on a GPU: block ids, those before, places; then -1."""
        from ..kernels.triton.seal_jobs import find_jobs

        return find_jobs(
            self.slot_mapping, self.block_table, self.seq_lens, self.query_start_loc
        )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the layers of one group share of a step."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionMetadata

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

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What accepted drafts would have cost dense decoding, told to the counters."""

from collections.abc import Iterable

import torch

from ...step.builder import SparseMetadataBuilder


def count_accepted(
    builders: Iterable, seq_lens: torch.Tensor, num_sampled: torch.Tensor
) -> None:
    """Count what a step verified, without waiting for the device.

    Args:
        builders: of a drafter, one of each group of layers.
        seq_lens: [num_reqs] context of the step, drafts included.
        num_sampled: [num_reqs] tokens that the step gave; 0 for a part of a prompt.
    """
    accepted = (num_sampled - 1).clamp(min=0)
    for builder in builders:
        if isinstance(builder, SparseMetadataBuilder):
            builder.counter.add_accepted(seq_lens, accepted)

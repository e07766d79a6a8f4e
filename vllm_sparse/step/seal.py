# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which blocks a step fills."""

from dataclasses import dataclass

import torch

from ..cache.layout import BLOCK_SIZE


@dataclass
class SealJobs:
    """Blocks that this step fills: the arguments of ``ops.seal_blocks``."""

    block_ids: torch.Tensor
    prev_block_ids: torch.Tensor
    block_index: torch.Tensor


def seal_jobs(
    block_table: torch.Tensor, starts: list[int], lens: list[int], first: int = 0
) -> SealJobs | None:
    """Blocks whose last token is stored in this step, by their place in the context.

    Draft tokens count: should they be rejected, the block's last token is stored again
    later and the block sealed again; until then the context ends before it.

    Args:
        block_table: [num_reqs, max_blocks] int32, on any device.
        starts: first token of each request, and the end of the last.
        lens: context of each request, this step's tokens included.
        first: requests before this one are left out.
    """
    jobs = []
    for req in range(first, len(lens)):
        computed = lens[req] - (starts[req + 1] - starts[req])
        for index in range(computed // BLOCK_SIZE, lens[req] // BLOCK_SIZE):
            jobs.append((index, req))
    if not jobs:
        return None
    jobs.sort()
    host = torch.tensor(jobs, pin_memory=block_table.is_cuda)
    index, req = host.to(block_table.device, non_blocking=True).T
    prev = block_table[req, (index - 1).clamp(min=0)]
    return SealJobs(
        block_ids=block_table[req, index].contiguous(),
        prev_block_ids=torch.where(index > 0, prev, -1).to(torch.int32),
        block_index=index.to(torch.int32),
    )

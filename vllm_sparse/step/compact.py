# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Prompts that attend to sinks and a window: a request for each block of positions."""

from dataclasses import replace

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..cache.eviction import Eviction
from ..cache.layout import BLOCK_SIZE
from ..layer.dense_rows import host_lens


def compacted(
    common: CommonAttentionMetadata, requests: slice, kept: Eviction
) -> tuple[CommonAttentionMetadata, slice]:
    """The positions of ``requests`` as requests of their own, one for each block in
    which they lie, with what that block's positions attend to as context.

    All positions of a block attend to the same blocks, causally.
    """
    starts = common.query_start_loc_cpu
    ends, lens, owners = [int(starts[requests.start])], [], []
    for request, length in enumerate(host_lens(common, requests), requests.start):
        new = int(starts[request + 1] - starts[request])
        done = length - new
        while done < length:
            end = min(length, (done // BLOCK_SIZE + 1) * BLOCK_SIZE)
            ends.append(ends[-1] + end - done)
            lens.append(end)
            owners.append(request)
            done = end
    device = common.block_table_tensor.device
    whole = torch.tensor(lens, dtype=torch.int32)
    skipped = kept.skipped_blocks(whole)
    seq_lens = whole - skipped * BLOCK_SIZE
    loc = torch.tensor(ends, dtype=torch.int32)
    table = common.block_table_tensor[torch.tensor(owners, device=device)]
    compact = replace(
        common,
        num_reqs=len(lens),
        num_actual_tokens=ends[-1],
        query_start_loc=loc.to(device),
        query_start_loc_cpu=loc,
        seq_lens=seq_lens.to(device),
        seq_lens_cpu_upper_bound=seq_lens,
        block_table_tensor=kept.compact_table(table, skipped.to(device)),
        max_query_len=int(loc.diff().max()),
        max_seq_len=int(seq_lens.max()),
    )
    return compact, slice(0, len(lens))

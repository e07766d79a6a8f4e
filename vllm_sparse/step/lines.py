# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which of a step's tokens are anchors, and what its positions attend to: the rules of
cache/lines.py for requests that come in pieces, without waiting for the device.

What has been found is kept with the anchors themselves: one byte for each LINE_GROUP
tokens, the mark, says which of them is the anchor (its place in the group plus 1), or
0. Only that of a group that an earlier step has begun is ever read.
"""

from dataclasses import dataclass

import torch

from ..cache.layout import BLOCK_SIZE
from ..cache.lines import LINE_GROUP, NEAR_BLOCKS, near_start
from ..methods.base import Lines

# Tokens whose anchors one block holds.
COVERED = BLOCK_SIZE * LINE_GROUP


@dataclass(frozen=True)
class NewTokens:
    """A step's tokens, request by request.

    Attributes:
        request: [n] int64.
        place: [n] int64, in the request's context.
        first: [num_reqs] int64, places of the requests' first new tokens.
    """

    request: torch.Tensor
    place: torch.Tensor
    first: torch.Tensor

    @classmethod
    def of(
        cls, query_start_loc: torch.Tensor, seq_lens: torch.Tensor, n: int
    ) -> "NewTokens":
        """
        Args:
            query_start_loc: [num_reqs + 1] int32.
            seq_lens: [num_reqs] int32.
            n: tokens of the step; those behind the last request's are padding, and
                stand at negative places.
        """
        starts = query_start_loc.long()
        first = seq_lens - starts.diff()
        token = torch.arange(n, device=starts.device)
        request = torch.searchsorted(starts[1:], token, right=True)
        padding = request == len(first)
        request = request.clamp(max=len(first) - 1)
        place = token - starts[request] + first[request]
        return cls(request, place.masked_fill(padding, -1), first)


def slots(table: torch.Tensor, request: torch.Tensor, place: torch.Tensor):
    """Where the anchors of tokens' groups lie: block ids and places in the block."""
    covered = place.clamp(min=0)
    block = table[request, covered // COVERED].long()
    return block, covered // LINE_GROUP % BLOCK_SIZE


def own_marks(
    first: torch.Tensor, marks: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Whether earlier steps found the anchor of the group in which requests' first new
    tokens lie: [num_reqs] int64, its mark, else 0.

    Args:
        first: [num_reqs] int64, places of the first new tokens.
        marks, table: as of :func:`mark`.
    """
    known = marks[slots(table, torch.arange(len(first), device=first.device), first)]
    # One at or behind the first new token is of a draft that was rejected.
    before = known <= first % LINE_GROUP
    return known.long() * before


def mark(
    ends: torch.Tensor,
    new: NewTokens,
    stored: torch.Tensor,
    marks: torch.Tensor,
    table: torch.Tensor,
) -> torch.Tensor:
    """Find a step's anchors (:func:`vllm_sparse.cache.lines.anchors`), and write their
    marks.

    Args:
        ends: [n] bool, tokens that end a line.
        stored: [n] bool; of others (padding, idle steps) nothing is written but to
            block 0, vLLM's null block.
        marks: [num_blocks, BLOCK_SIZE] uint8, a view, written.
        table: [num_reqs, max_blocks] int32 blocks of anchors.

    Returns:
        [n] bool, anchors.
    """
    request, place = new.request, new.place
    first = new.first[request]
    # Of the first token's group, which an earlier step may have begun.
    shared = place // LINE_GROUP == first // LINE_GROUP
    earlier = own_marks(new.first, marks, table)[request] * shared

    found = ends | (place == 0) | (place % LINE_GROUP == LINE_GROUP - 1)
    found &= (place >= 0) & (earlier == 0)
    # Only the first of those that the step has of a group.
    token = torch.arange(len(place), device=place.device)
    begins = (place == first) | (place % LINE_GROUP == 0)
    start = torch.where(begins, token, 0).cummax(0).values
    before = found.cumsum(0) - found.long()
    found &= before == before[start]

    block, slot = slots(table, request, place)
    at = block.masked_fill(~stored, 0), slot
    # All groups of the step begin anew; one that an earlier step has marked keeps that.
    value = found * (place % LINE_GROUP + 1) + earlier * (place == first)
    marks[at] = 0
    # At most one token of a group has a value: adding is writing, in any order.
    marks.index_put_(at, value.to(torch.uint8), accumulate=True)
    return found


def lists(
    new: NewTokens,
    anchor: torch.Tensor,
    table: torch.Tensor,
    near_table: torch.Tensor,
    longest: int,
    look_back: bool,
) -> Lines:
    """What a step's positions attend to (:func:`vllm_sparse.cache.lines.visible`).

    Args:
        anchor: [n] bool, of :func:`mark`.
        table, near_table: [num_reqs, max_blocks] int32 blocks of anchors, of lines.
        longest: tokens of the longest context, or more.
        look_back: whether anchors see older ones.
    """
    request, place = new.request, new.place
    padding = place < 0
    table = table[:, : -(-longest // COVERED)]
    start = near_start(place)
    # All groups before it are complete: each has its anchor.
    anchors = start // LINE_GROUP
    if not look_back:
        anchors = torch.where(anchor, anchors.clamp(max=1), anchors)
    counts = anchors + place - start + 1
    most = (NEAR_BLOCKS + 1) * BLOCK_SIZE + longest // LINE_GROUP
    behind = table.shape[1] * BLOCK_SIZE
    j = torch.arange(most, dtype=torch.int32, device=place.device)
    near = (behind - anchors).int()[:, None] + j
    blocks = torch.arange(NEAR_BLOCKS + 1, device=place.device)
    blocks = (start // BLOCK_SIZE)[:, None] + blocks
    blocks = blocks.clamp(max=near_table.shape[1] - 1)
    near_blocks = near_table[request[:, None], blocks]
    seq_lens = behind + place - start + 1
    return Lines(
        block_table=torch.cat([table[request], near_blocks], 1),
        seq_lens=seq_lens.masked_fill(padding, 0).int(),
        indices=torch.where(j < anchors[:, None], j, near),
        counts=counts.masked_fill(padding, -1).int(),
        anchors=anchors.masked_fill(padding, 0).int(),
    )

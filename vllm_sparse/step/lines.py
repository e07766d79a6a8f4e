# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which of a step's tokens are anchors, and what its positions attend to: the rules of
cache/lines.py for requests that come in pieces, without waiting for the device.

What has been found is kept with the anchors themselves: one byte for each LINE_GROUP
tokens says which of them is the anchor (its place in the group plus 1), or 0. Of a
context only what stands before a position is read, so what rejected drafts left behind
it does not count.
"""

from dataclasses import dataclass

import torch

from ..cache.layout import BLOCK_SIZE
from ..cache.lines import LINE_GROUP
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


def mark(
    ends: torch.Tensor,
    new: NewTokens,
    stored: torch.Tensor,
    marks: torch.Tensor,
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find a step's anchors, and write their marks.

    Args:
        ends: [n] bool, tokens that end a line.
        stored: [n] bool; of others (padding, idle steps) nothing is written but to
            block 0, vLLM's null block.
        marks: [num_blocks, BLOCK_SIZE] uint8, a view, written.
        table: [num_reqs, max_blocks] int32 blocks of anchors.

    Returns:
        [n] bool, anchors; [n] int64, places of the first tokens of the tokens' lines.
    """
    request, place, first = new.request, new.place, new.first
    n, group, block = len(place), place // LINE_GROUP, place // BLOCK_SIZE
    token = torch.arange(n, device=place.device)
    begins = place == first[request]
    # The anchors of the first tokens' own blocks and of those before.
    per_block = BLOCK_SIZE // LINE_GROUP
    near = torch.arange(2 * per_block, device=place.device) - per_block
    near = near + first[:, None] // BLOCK_SIZE * per_block
    rows = torch.arange(len(first), device=place.device)[:, None]
    at = slots(table, rows.expand_as(near), near * LINE_GROUP)
    known = marks[at].long()
    where = near * LINE_GROUP + known - 1
    valid = (near >= 0) & (known > 0) & (where < first[:, None])
    last = torch.where(valid, where, -1).amax(1)
    in_block = (valid & (near >= (first // BLOCK_SIZE * per_block)[:, None])).any(1)
    own = valid & (near == (first // LINE_GROUP)[:, None])
    in_group = own.any(1)

    def before(flags: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Flags before each token, from the last start on."""
        start = torch.where(starts, token, 0).cummax(0).values
        earlier = flags.cumsum(0) - flags.long()
        return earlier - earlier[start]

    found = ends | (place == 0)
    found &= ~((group == (first // LINE_GROUP)[request]) & in_group[request])
    found &= before(found, begins | (place % LINE_GROUP == 0)) == 0
    first_block = block == (first // BLOCK_SIZE)[request]
    alone = before(found, begins | (place % BLOCK_SIZE == 0)) + found.long() == 0
    alone &= ~(first_block & in_block[request])
    found |= alone & (place % BLOCK_SIZE == BLOCK_SIZE - 1)
    found &= place >= 0

    # Requests far apart in one order, so that a maximum never reaches into another.
    base = request << 32
    after = torch.where(found, base + place + 1, base).cummax(0).values
    after = torch.cat([base[:1], after[:-1]]).maximum(base) - base
    starts = after.maximum(last[request] + 1)

    at = slots(table, request, place)
    at = (at[0].masked_fill(~stored, 0), at[1])
    kept = (known * own).amax(1)[request] * begins
    value = found * (place % LINE_GROUP + 1) + kept
    marks[at] = 0
    marks.index_put_(at, value.to(torch.uint8), accumulate=True)
    return found, starts


def lists(
    new: NewTokens,
    anchor: torch.Tensor,
    starts: torch.Tensor,
    marks: torch.Tensor,
    table: torch.Tensor,
    lines_table: torch.Tensor,
    longest: int,
    most: int,
    look_back: bool,
) -> Lines:
    """
    Args:
        anchor, starts: of :func:`mark`, which has written ``marks``.
        table, lines_table: [num_reqs, max_blocks] int32 blocks of anchors, of lines.
        longest: tokens of the longest context, or more.
        most: room for a list.
        look_back: whether anchors see those before them.
    """
    request, place = new.request, new.place
    padding = place < 0
    table = table[:, : -(-longest // COVERED)]
    blocks = table.shape[1]
    known = marks[table.long()].flatten(1)
    group = torch.arange(known.shape[1], device=place.device)
    # Behind a context marks are anything; no count below reaches them.
    total = (known > 0).cumsum(1)
    packed = torch.zeros(len(table), known.shape[1] + 1, dtype=torch.int32)
    packed = packed.to(place.device)
    to = torch.where(known > 0, total - 1, known.shape[1])
    packed.scatter_(1, to, group.int().expand_as(to))
    # A line begins behind an anchor, the only one of its group.
    ended = (starts - 1).clamp(min=0)
    anchors = total[request, ended // LINE_GROUP] * (starts > 0)
    if not look_back:
        anchors = torch.where(anchor, anchors.clamp(max=1), anchors)
    first = (place // BLOCK_SIZE - 1).clamp(min=0)
    own = place - starts + 1
    counts = (anchors + own).masked_fill(padding, -1)
    j = torch.arange(most, dtype=torch.int32, device=place.device)
    line = (blocks * BLOCK_SIZE + starts - first * BLOCK_SIZE - anchors).int()
    line = line[:, None] + j
    listed = packed[request, :most]
    if listed.shape[1] < most:
        listed = torch.nn.functional.pad(listed, (0, most - listed.shape[1]))
    indices = torch.where(j < anchors[:, None], listed, line)
    near = torch.stack([first, first + 1], 1).clamp(max=lines_table.shape[1] - 1)
    near = lines_table[request[:, None], near]
    seq_lens = blocks * BLOCK_SIZE + place + 1 - first * BLOCK_SIZE
    return Lines(
        block_table=torch.cat([table[request], near], 1),
        seq_lens=seq_lens.masked_fill(padding, 0).int(),
        indices=indices,
        counts=counts.int(),
        anchors=anchors.masked_fill(padding, 0).int(),
    )

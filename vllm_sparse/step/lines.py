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


@dataclass(frozen=True)
class Earlier:
    """What earlier steps found near a step's first tokens, [num_reqs] each.

    Attributes:
        last: place of the last anchor before them; -1: there is none.
        in_block: whether their own block has one before them.
        own_mark: of their own group; 0: it has none before them.
    """

    last: torch.Tensor
    in_block: torch.Tensor
    own_mark: torch.Tensor

    @classmethod
    def of(
        cls, first: torch.Tensor, marks: torch.Tensor, table: torch.Tensor
    ) -> "Earlier":
        """
        Args:
            first: [num_reqs] int64, places of the first tokens.
            marks, table: as of :func:`mark`.
        """
        # The groups of their own blocks and of those before: a line begins in these.
        per_block = BLOCK_SIZE // LINE_GROUP
        own_block = (first // BLOCK_SIZE * per_block)[:, None]
        groups = torch.arange(-per_block, per_block, device=first.device) + own_block
        requests = torch.arange(len(first), device=first.device)[:, None]
        at = slots(table, requests.expand_as(groups), groups * LINE_GROUP)
        known = marks[at].long()
        places = groups * LINE_GROUP + known - 1
        valid = (groups >= 0) & (known > 0) & (places < first[:, None])
        own_group = groups == (first // LINE_GROUP)[:, None]
        return cls(
            last=torch.where(valid, places, -1).amax(1),
            in_block=(valid & (groups >= own_block)).any(1),
            own_mark=(known * (valid & own_group)).amax(1),
        )


def mark(
    ends: torch.Tensor,
    new: NewTokens,
    stored: torch.Tensor,
    marks: torch.Tensor,
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find a step's anchors (:func:`vllm_sparse.cache.lines.anchors`), and write their
    marks.

    Args:
        ends: [n] bool, tokens that end a line.
        stored: [n] bool; of others (padding, idle steps) nothing is written but to
            block 0, vLLM's null block.
        marks: [num_blocks, BLOCK_SIZE] uint8, a view, written.
        table: [num_reqs, max_blocks] int32 blocks of anchors.

    Returns:
        [n] bool, anchors; [n] int64, places of the first tokens of the tokens' lines.
    """
    request, place = new.request, new.place
    first, earlier = new.first[request], Earlier.of(new.first, marks, table)
    token = torch.arange(len(place), device=place.device)

    def so_far(flags: torch.Tensor, size: int) -> torch.Tensor:
        """Flags before each token among the step's tokens of its group of ``size``."""
        begins = (place == first) | (place % size == 0)
        start = torch.where(begins, token, 0).cummax(0).values
        before = flags.cumsum(0) - flags.long()
        return before - before[start]

    def shared(size: int) -> torch.Tensor:
        """Tokens whose group of ``size`` began in an earlier step."""
        return place // size == first // size

    found = ends | (place == 0)
    found &= ~(shared(LINE_GROUP) & (earlier.own_mark > 0)[request])
    found &= so_far(found, LINE_GROUP) == 0
    block_has = (so_far(found, BLOCK_SIZE) > 0) | found
    block_has |= shared(BLOCK_SIZE) & earlier.in_block[request]
    found |= (place % BLOCK_SIZE == BLOCK_SIZE - 1) & ~block_has
    found &= place >= 0

    # The place behind the last anchor before each token. Requests are far apart, so
    # that a running maximum never reaches from one into the next.
    base = request << 32
    behind = torch.where(found, base + place + 1, base).cummax(0).values
    behind = torch.cat([base[:1], behind[:-1]]).maximum(base) - base
    starts = behind.maximum(earlier.last[request] + 1)

    block, slot = slots(table, request, place)
    at = block.masked_fill(~stored, 0), slot
    # All groups of the step begin anew; one that an earlier step has marked keeps that.
    kept = earlier.own_mark[request] * (place == first)
    value = found * (place % LINE_GROUP + 1) + kept
    marks[at] = 0
    # At most one token of a group has a value: adding is writing, in any order.
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

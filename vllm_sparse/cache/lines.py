# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Contexts of which every old line leaves one token, its *anchor* (AnLLM, arXiv
2402.07616, section 3; lines of code as in AnchorCoder, arXiv 2411.06680).

A position attends to its own line up to itself and to the anchors of all lines before.
A line's anchor is the token that ends it, with three exceptions that bound what a
context keeps, whatever its text:

- of LINE_GROUP tokens (aligned) at most one is an anchor, the first that ends a line:
  the line of another goes on;
- a block without an anchor gets one at its last token, so a line begins in a position's
  own block or in the one before;
- the first token is one, and so is always seen (an attention sink).

Whether a token is an anchor depends on its block's tokens up to itself alone.
"""

import torch

from .layout import BLOCK_SIZE

LINE_GROUP = 8


def anchors(ends: torch.Tensor) -> torch.Tensor:
    """Which tokens of a whole context are anchors: [n] bool.

    Args:
        ends: [n] bool, tokens that end a line.
    """
    n = len(ends)
    blocks = -(-n // BLOCK_SIZE)
    padded = ends.new_zeros(blocks * BLOCK_SIZE)
    padded[:n] = ends
    padded[:1] = True
    groups = padded.view(-1, LINE_GROUP)
    found = (groups & (groups.cumsum(1) == 1)).view(blocks, BLOCK_SIZE)
    found[:, -1] |= ~found.any(1)
    return found.view(-1)[:n]


def line_starts(anchor: torch.Tensor) -> torch.Tensor:
    """Of every token the first one of its line: [n] int64.

    Args:
        anchor: [n] bool.
    """
    place = torch.arange(len(anchor), device=anchor.device)
    after = torch.where(anchor, place + 1, 0).cummax(0).values
    return torch.cat([after.new_zeros(1), after[:-1]])


def visible(anchor: torch.Tensor, anchors_look_back: bool = True) -> torch.Tensor:
    """Which tokens (columns) a position (row) attends to: [n, n] bool.

    Args:
        anchor: [n] bool, of :func:`anchors`.
        anchors_look_back: whether anchors see the anchors before them; else only the
            first token, and their own line.
    """
    place = torch.arange(len(anchor), device=anchor.device)
    own = place >= line_starts(anchor)[:, None]
    older = anchor.expand(len(anchor), -1)
    if not anchors_look_back:
        older = older & (~anchor[:, None] | (place == 0))
    return (own | older) & (place <= place[:, None])

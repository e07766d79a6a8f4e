# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Contexts of which old lines leave the tokens that end them, *anchors* (AnLLM, arXiv
2402.07616, section 3; lines of code as in AnchorCoder, arXiv 2411.06680).

A position attends to its own block of BLOCK_SIZE tokens up to itself, to the
NEAR_BLOCKS before it, and to the anchors of all text before these. AnLLM hides all but
the own line; that saves a block and reads, and costs far more than it saves
(docs/training.md).

Of LINE_GROUP tokens (aligned) one is an anchor: the first that ends a line, or the last
of the group if none does; so long lines leave more than one, and the second of two
short ones none. The first token of a context is an anchor, and so is always seen (an
attention sink).

Whether a token is an anchor depends on its group's tokens up to itself alone.
"""

import torch

from .layout import BLOCK_SIZE

LINE_GROUP = 8
NEAR_BLOCKS = 2


def anchors(ends: torch.Tensor) -> torch.Tensor:
    """Which tokens of a whole context are anchors: [n] bool.

    Args:
        ends: [n] bool, tokens that end a line.
    """
    n = len(ends)
    groups = ends.new_zeros(-(-n // LINE_GROUP), LINE_GROUP)
    groups.view(-1)[:n] = ends
    groups[:, -1] = True
    groups[:1, 0] = True
    return (groups & (groups.cumsum(1) == 1)).view(-1)[:n]


def near_start(place: torch.Tensor) -> torch.Tensor:
    """The first token that positions attend to beside anchors; of all before it they
    see anchors only: int64, as ``place``."""
    return (place // BLOCK_SIZE - NEAR_BLOCKS).clamp(min=0) * BLOCK_SIZE


def attended(seq_lens: torch.Tensor) -> torch.Tensor:
    """How many tokens the last position of contexts attends to, if anchors look back;
    else it is the most. It falls where a block begins."""
    older = near_start(seq_lens - 1)
    return seq_lens - older + older // LINE_GROUP


def visible(anchor: torch.Tensor, anchors_look_back: bool = True) -> torch.Tensor:
    """Which tokens (columns) a position (row) attends to: [n, n] bool.

    Args:
        anchor: [n] bool, of :func:`anchors`.
        anchors_look_back: whether anchors see older anchors; else, of older text, only
            the first token.
    """
    place = torch.arange(len(anchor), device=anchor.device)
    near = place >= near_start(place)[:, None]
    older = anchor.expand(len(anchor), -1)
    if not anchors_look_back:
        older = older & (~anchor[:, None] | (place == 0))
    return (near | older) & (place <= place[:, None])

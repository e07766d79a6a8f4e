# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which tokens are anchors and what a position sees, against one plain reading."""

import pytest
import torch

from vllm_sparse.cache.layout import BLOCK_SIZE
from vllm_sparse.cache.lines import (
    LINE_GROUP,
    NEAR_BLOCKS,
    anchors,
    attended,
    visible,
)


def plainly(ends: list[bool], look_back: bool) -> tuple[list[bool], list[list[bool]]]:
    """Token by token, as the rules are written down."""
    anchor: list[bool] = []
    for place, ends_line in enumerate(ends):
        group = place // LINE_GROUP * LINE_GROUP
        last = place == group + LINE_GROUP - 1
        first_of_group = not any(anchor[group:])
        anchor.append(place == 0 or (first_of_group and (ends_line or last)))
    sees = []
    for row in range(len(ends)):
        start = (row // BLOCK_SIZE - NEAR_BLOCKS) * BLOCK_SIZE
        back = look_back or not anchor[row]
        sees.append(
            [
                p <= row and (p >= start or (anchor[p] and (back or p == 0)))
                for p in range(len(ends))
            ]
        )
    return anchor, sees


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 7, 8, 127, 128, 129, 700])
def test_rules(share, n):
    ends = torch.rand(n, generator=torch.Generator().manual_seed(n)) < share
    found = anchors(ends)
    for look_back in (True, False):
        anchor, sees = plainly(ends.tolist(), look_back)
        assert found.tolist() == anchor
        assert visible(found, look_back).tolist() == sees


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_bounds_of_what_is_kept(share):
    n = 20 * BLOCK_SIZE
    ends = torch.rand(n, generator=torch.Generator().manual_seed(1)) < share
    found = anchors(ends)
    assert found.view(-1, LINE_GROUP).sum(1).eq(1).all()
    seen = visible(found).sum(1)
    assert torch.equal(seen, attended(torch.arange(1, n + 1)))
    assert seen.max() < (NEAR_BLOCKS + 1) * BLOCK_SIZE + n / LINE_GROUP


def test_a_prefix_has_the_same_anchors():
    ends = torch.rand(1000, generator=torch.Generator().manual_seed(2)) < 0.1
    whole = anchors(ends)
    for n in (1, 5, 128, 500, 640, 999):
        assert torch.equal(anchors(ends[:n]), whole[:n])

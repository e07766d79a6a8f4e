# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Anchors and lists of requests in pieces are those of whole contexts."""

import pytest
import torch

from vllm_sparse.cache.layout import BLOCK_SIZE
from vllm_sparse.cache.lines import LINE_GROUP, anchors, visible
from vllm_sparse.step.lines import COVERED, NewTokens, lists, mark

LENGTH = 3000


class Requests:
    """Contexts, blocks for their anchors and lines, marks full of nonsense."""

    def __init__(self, count: int, share: float, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.ends = torch.rand(count, LENGTH, generator=self.random) < share
        self.anchor = [anchors(ends) for ends in self.ends]
        per_request = -(-LENGTH // COVERED), -(-LENGTH // BLOCK_SIZE)
        ids = 1 + torch.randperm(count * sum(per_request), generator=self.random)
        self.table, self.lines = ids.int().view(count, -1).split(per_request, 1)
        size = (len(ids) + 1, BLOCK_SIZE)
        self.marks = torch.randint(256, size, generator=self.random, dtype=torch.uint8)

    def step(self, pieces: dict[int, range], padding=0, look_back=True, longest=0):
        """Serve new tokens of requests, and compare with the twin; then some that are
        padding, as their request is, too."""
        chosen = torch.tensor(list(pieces))
        sizes = torch.tensor([0, *(len(piece) for piece in pieces.values())])
        lens = torch.tensor([piece.stop for piece in pieces.values()]).int()
        n = int(sizes.sum()) + padding
        starts, table, lines = sizes.cumsum(0), self.table[chosen], self.lines[chosen]
        if padding:
            starts = torch.cat([starts, starts[-1:]])
            lens, table, lines = (
                torch.cat([t, torch.zeros_like(t[:1])]) for t in (lens, table, lines)
            )
        new = NewTokens.of(starts.int(), lens, n)
        ends = [self.ends[r, piece.start : piece.stop] for r, piece in pieces.items()]
        ends = torch.cat([*ends, torch.ones(padding, dtype=torch.bool)])
        found = mark(ends, new, new.place >= 0, self.marks, table)
        longest = max(longest, int(lens.max()))
        got = lists(new, found, table, lines, longest, look_back)
        row = 0
        for r, piece in pieces.items():
            sees = visible(self.anchor[r][: piece.stop], look_back)
            for place in piece:
                assert found[row] == self.anchor[r][place]
                assert (
                    self.listed(got, row, r, place)
                    == sees[place].nonzero().squeeze(1).tolist()
                )
                row += 1
        assert not found[row:].any()
        assert got.counts[row:].eq(-1).all() and got.seq_lens[row:].eq(0).all()

    def listed(self, got, row: int, request: int, place: int) -> list[int]:
        """Places in the context that a row's list names."""
        count, of_anchors = int(got.counts[row]), int(got.anchors[row])
        names = got.indices[row, :count]
        assert names.max() < got.seq_lens[row]
        places = []
        for i, name in enumerate(names.tolist()):
            block, offset = (
                int(got.block_table[row, name // BLOCK_SIZE]),
                name % BLOCK_SIZE,
            )
            if i < of_anchors:
                index = self.table[request].tolist().index(block)
                group = index * BLOCK_SIZE + offset
                places.append(group * LINE_GROUP + int(self.marks[block, offset]) - 1)
            else:
                index = self.lines[request].tolist().index(block)
                places.append(index * BLOCK_SIZE + offset)
        assert places[-1] == place
        return places


@pytest.mark.parametrize("share", [0.0, 0.09, 0.6])
def test_pieces_of_any_size_in_company(share):
    requests = Requests(3, share, seed=0)
    requests.step({0: range(0, 700), 2: range(0, 5)})
    requests.step({2: range(5, 6), 0: range(700, 701), 1: range(0, 1)})
    requests.step({1: range(1, 1300), 0: range(701, 1500), 2: range(6, 128)}, padding=3)
    requests.step({0: range(1500, 1501), 1: range(1300, 1301), 2: range(128, 129)})


def test_short_contexts_beside_room_for_long_ones():
    """As in CUDA graphs: tables have room for the longest context."""
    requests = Requests(2, 0.1, seed=5)
    requests.lines = requests.lines[:, :2]
    for pieces in ({0: range(1), 1: range(128)}, {0: range(1, 2), 1: range(128, 200)}):
        requests.step(pieces, padding=1, longest=LENGTH)


def test_one_token_at_a_time():
    requests = Requests(1, 0.1, seed=1)
    for place in range(300):
        requests.step({0: range(place, place + 1)})


def test_anchors_that_do_not_look_back():
    requests = Requests(1, 0.1, seed=2)
    requests.step({0: range(0, 500)}, look_back=False)
    requests.step({0: range(500, 777)}, look_back=False)


def test_what_rejected_drafts_left_does_not_count():
    requests = Requests(1, 0.3, seed=3)
    requests.step({0: range(0, 1000)})
    kept, truth = requests.ends.clone(), requests.anchor
    for place in range(1000, 1060, 3):
        drafts = range(place, place + 5)
        requests.ends[0, place + 1 : place + 5] = ~kept[0, place + 1 : place + 5]
        requests.anchor = [anchors(requests.ends[0])]
        requests.step({0: drafts})
        requests.ends, requests.anchor = kept.clone(), truth
        requests.step({0: range(place + 1, place + 3)})


def test_idle_steps_leave_marks_alone():
    """vLLM runs them with block tables of requests that are gone."""
    requests = Requests(1, 0.1, seed=4)
    requests.step({0: range(0, 300)})
    before = requests.marks.clone()
    ends, lens = torch.ones(5, dtype=torch.bool), torch.tensor([105], dtype=torch.int32)
    new = NewTokens.of(torch.tensor([0, 5], dtype=torch.int32), lens, 5)
    mark(ends, new, ~ends, requests.marks, requests.table)
    assert torch.equal(requests.marks[1:], before[1:])

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What contexts keep, against a plain reading of the rule."""

import pytest
import torch

from vllm_sparse import ops
from vllm_sparse.cache.eviction import Eviction
from vllm_sparse.config import SparseConfig
from vllm_sparse.methods import METHODS, LayerShape, Phase

KEPT = [Eviction(1, 2, True), Eviction(0, 1, False), Eviction(2, 8, True)]


def blocks_of(position: int, kept: Eviction) -> list[int]:
    """That a position attends to, by the rule's own words."""
    own = position // 128
    window = range(max(0, own - kept.window_blocks), own + 1)
    return sorted({*range(min(kept.sink_blocks, own + 1)), *window})


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_compact_contexts_are_the_blocks_of_the_rule(kept):
    lens = torch.arange(1, 2600)
    table = torch.stack([torch.randperm(99).int() for _ in lens])[:, :24]
    skipped = kept.skipped_blocks(lens)
    compact = kept.compact_table(table, skipped)
    assert compact.shape[1] == (min(24, kept.kept_blocks) if kept.prompts else 24)
    for row, length in enumerate(lens.tolist()):
        expected = table[row, blocks_of(length - 1, kept)]
        count = -(-(length - int(skipped[row]) * 128) // 128)
        assert compact[row, :count].tolist() == expected.tolist()


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_what_is_given_back_is_never_needed_again(kept):
    """Nor is the block behind the window, in which a state of what left may lie."""
    for done in range(0, 2600, 37):
        gone = set(kept.evicted(done))
        for position in range(done, done + 300):
            needed = blocks_of(position, kept)
            assert not gone & {*needed, position // 128 - kept.window_blocks - 1}
        # And no more is held than the rule needs.
        last = done // 128 - kept.window_blocks - 2
        assert last < kept.sink_blocks or last in gone


def test_budgets_count_what_is_kept():
    config = SparseConfig(
        selector="streaming", sink_tokens=128, local_window=256, prefill="streaming"
    )
    shape = LayerShape(4, 2, 64, torch.float32)
    method = METHODS["streaming"](config, shape, ops.Ops())
    for phase in Phase:
        kept = method.budgets(phase, 3000)
        for length in range(1, 3001, 61):
            blocks = blocks_of(length - 1, method.kept)
            tokens = sum(min(128, length - 128 * b) for b in blocks)
            assert kept[length] == (-1 if tokens == length else tokens)

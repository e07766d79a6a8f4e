# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which tokens survive: forced ones, budgets, and the best scores of each selector."""

import sys
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import pytest
import torch

from tests.ops.generate import paged_context
from vllm_sparse import ops
from vllm_sparse.config import EVICTING, SparseConfig
from vllm_sparse.methods import METHODS, DecodeRows, LayerShape
from vllm_sparse.methods.base import ScoreBytes
from vllm_sparse.ops.reference import forced_ranges
from vllm_sparse.selectors import SELECTORS

SEQ_LENS = [100, 128, 165, 300, 512, 1111]
BUDGETS = [64, 64, 60, 100, -1, 200]
UNTOUCHED = -7
CHOOSING = [name for name in METHODS if name not in ("dense", *EVICTING)]


@pytest.mark.parametrize(
    ("length", "local_window", "sink_tokens", "sinks", "recent"),
    [
        (300, 32, 4, 4, 256),  # the unsealed tail (44) is longer than the window
        (300, 100, 4, 4, 200),  # the window is longer than the tail
        (256, 32, 4, 4, 224),  # no tail
        (257, 1, 0, 0, 256),
        (130, 32, 4, 4, 98),
        (127, 32, 4, 0, 0),  # nothing sealed: all of it is tail
        (128, 128, 4, 0, 0),
        (128, 500, 4, 0, 0),  # a window longer than the context
        (129, 126, 4, 3, 3),  # sinks meet the window
        (1, 1, 0, 0, 0),
    ],
)
def test_forced_ranges(length, local_window, sink_tokens, sinks, recent):
    assert forced_ranges(length, local_window, sink_tokens) == (sinks, recent)


def kept_of(length: int, budget: int, local_window=16, sink_tokens=4) -> int:
    sinks, recent = forced_ranges(length, local_window, sink_tokens)
    dense = budget < 0 or budget >= length or recent <= sinks
    return length if dense else max(budget, sinks + length - recent)


class Batch:
    """Sealed contexts and one selector's choice among their tokens."""

    def __init__(self, name, num_heads=6, num_kv_heads=2, soft_cap=0.0, **options):
        torch.manual_seed(0)
        options = dict(selector=name, local_window=16, sink_tokens=4) | options
        shape = LayerShape(
            num_heads, num_kv_heads, 64, torch.float32, 64**-0.5, soft_cap
        )
        config = SparseConfig(**options).resolve(64, num_heads // num_kv_heads)
        self.method = METHODS[name](config, shape, ops.Ops())
        generator = torch.Generator().manual_seed(1)
        self.ctx = ctx = paged_context(
            SEQ_LENS, num_kv_heads, 64, torch.float32, generator
        )
        ops.store(kv_cache=ctx.kv_cache, **ctx.new_tokens())
        self.query = torch.randn(len(SEQ_LENS), num_heads, 64)
        rows, room = len(SEQ_LENS), 300
        self.rows = DecodeRows(
            block_table=ctx.block_table,
            seq_lens=ctx.seq_lens,
            budgets=torch.tensor(BUDGETS, dtype=torch.int32),
            indices=torch.full((rows, num_kv_heads, room), UNTOUCHED).int(),
            counts=torch.full((rows, num_kv_heads), UNTOUCHED).int(),
            kept_mass=torch.empty(rows, num_heads),
        )
        self.kept_mass = self.method.select(self.query, ctx.kv_cache, self.rows)

    def kept(self, row, head) -> list[int]:
        count = int(self.rows.counts[row, head])
        indices = self.rows.indices[row, head]
        assert (indices[count:] == UNTOUCHED).all()
        return indices[:count].tolist()


def true_weights(batch, row, head, soft_cap=0.0) -> torch.Tensor:
    """Attention weights of the group's heads, summed: [length]."""
    key = batch.ctx.keys[row][:, head]
    group = batch.query.shape[1] // key_heads(batch)
    query = batch.query[row, head * group : (head + 1) * group]
    logits = query @ key.T * 64**-0.5
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return logits.softmax(-1).sum(0)


def key_heads(batch) -> int:
    return batch.ctx.kv_cache.shape[1]


def quest_bounds(batch, row, head) -> torch.Tensor:
    """Quest's score of every token, token by token and page by page: [length]."""
    key = batch.ctx.keys[row][:, head]
    group = batch.query.shape[1] // key_heads(batch)
    total = 0
    for query in batch.query[row, head * group : (head + 1) * group]:
        bounds = []
        for start in range(0, len(key), 16):
            page = key[start : start + 16]
            channels = torch.maximum(query * page.amax(0), query * page.amin(0))
            bounds.append(channels.sum() * 64**-0.5)
        total = total + torch.stack(bounds).softmax(-1)
    return total.repeat_interleave(16)[: len(key)]


@pytest.mark.parametrize("name", CHOOSING)
def test_lists_are_ascending_unique_and_exactly_as_long_as_the_budget(name):
    batch = Batch(name)
    for row, (length, budget) in enumerate(zip(SEQ_LENS, BUDGETS, strict=True)):
        expected = kept_of(length, budget)
        for head in range(2):
            if expected == length:
                assert batch.rows.counts[row, head] == -1
                assert (batch.rows.indices[row, head] == UNTOUCHED).all()
                continue
            kept = batch.kept(row, head)
            assert kept == sorted(set(kept))
            assert len(kept) == expected
            sinks, recent = forced_ranges(length, 16, 4)
            assert set(range(sinks)) | set(range(recent, length)) <= set(kept)
    dense = (batch.rows.counts == -1).all(1).tolist()
    assert dense == [True, False, False, False, True, False]


@pytest.mark.parametrize("name", CHOOSING)
def test_budget_below_the_forced_tokens_keeps_these_alone(name):
    # Row 2: a budget of 60 tokens of 165, but 4 sinks and a window of 70.
    batch = Batch(name, local_window=70)
    for head in range(2):
        assert batch.kept(2, head) == [*range(4), *range(95, 165)]


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_exact_keeps_the_highest_attention_weights(soft_cap):
    batch = Batch("exact", soft_cap=soft_cap)
    check_best_survive(batch, lambda *a: true_weights(*a, soft_cap=soft_cap))


def test_quest_keeps_the_pages_with_the_highest_bounds():
    check_best_survive(Batch("quest"), quest_bounds)


def check_best_survive(batch, score):
    chosen = 0
    for row in (1, 2, 3, 5):
        sinks, recent = forced_ranges(SEQ_LENS[row], 16, 4)
        for head in range(2):
            scores = score(batch, row, head)
            kept = {i for i in batch.kept(row, head) if sinks <= i < recent}
            dropped = set(range(sinks, recent)) - kept
            worst = min(scores[i] for i in kept)
            assert worst >= max(scores[i] for i in dropped) * (1 - 1e-5)
            chosen += len(kept)
    assert chosen > 200


def test_window_keeps_sinks_and_the_most_recent():
    batch = Batch("window")
    for row in (1, 2, 3, 5):
        length = SEQ_LENS[row]
        count = kept_of(length, BUDGETS[row])
        expected = [*range(4), *range(length - count + 4, length)]
        assert batch.kept(row, 0) == batch.kept(row, 1) == expected


def test_exact_is_the_oracle_no_selector_keeps_more_mass():
    batches = {name: Batch(name) for name in CHOOSING}
    mass = {
        name: sum(
            float(true_weights(batch, row, head)[batch.kept(row, head)].sum())
            for row in (1, 2, 3, 5)
            for head in range(2)
        )
        for name, batch in batches.items()
    }
    assert max(mass, key=mass.get) == "exact"
    assert mass["exact"] > mass["sparq"] > mass["window"]


def test_the_selector_of_the_documentation_works_as_written(monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "selectors.md"
    parts = page.read_text().split("```python\n")[1:]
    code, line = (part.split("```")[0] for part in parts)
    ((name, path),) = eval(f"{{{line}}}").items()
    module = path.split(":")[0]
    assert code.startswith(f"# {module.replace('.', '/')}.py\n")
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    exec(code, vars(sys.modules[module]))
    monkeypatch.setitem(SELECTORS, name, path)
    monkeypatch.setitem(METHODS, name, resolve_name(path))
    batch = Batch(name)
    check_best_survive(
        batch, lambda b, row, head: 1 / b.ctx.keys[row][:, head].norm(dim=-1)
    )
    assert batch.method.score_bytes == ScoreBytes(per_token=2)


def test_sparq_with_all_channels_is_nearly_the_oracle():
    # rank = head size leaves only the 4-bit codes between the two.
    sparq, exact = Batch("sparq", rank=64), Batch("exact")
    for row in (1, 2, 3, 5):
        for head in range(2):
            ours, best = set(sparq.kept(row, head)), set(exact.kept(row, head))
            assert len(ours & best) >= 0.85 * len(best), (row, head)


@pytest.mark.parametrize("mean_value", [True, False])
def test_sparq_returns_the_kept_mass_only_for_the_mean_value_term(mean_value):
    batch = Batch("sparq", mean_value=mean_value)
    if not mean_value:
        assert batch.kept_mass is None
        return
    assert batch.kept_mass.shape == (len(SEQ_LENS), 6)
    assert (batch.kept_mass[[0, 4]] == 1).all()
    sparse = batch.kept_mass[[1, 2, 3, 5]]
    assert ((sparse > 0) & (sparse < 1)).all()


@pytest.mark.parametrize("name", ["exact", "quest", "window"])
def test_comparison_selectors_have_no_mean_value_term(name):
    assert Batch(name, mean_value=True).kept_mass is None


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # 16 channels of a block, 64 code and 4 parameter bytes each
        ("sparq", {"rank": 16}, ScoreBytes(per_sealed_block=16 * 68)),
        # and one prefix mean of 64 fp16 values
        (
            "sparq",
            {"rank": 16, "mean_value": True},
            ScoreBytes(per_row=128, per_sealed_block=16 * 68),
        ),
        # minima and maxima of 16 tokens, in fp32
        ("quest", {}, ScoreBytes(per_token=2 * 64 * 4 / 16)),
        ("exact", {}, ScoreBytes()),
        ("window", {}, ScoreBytes()),
    ],
)
def test_score_bytes(name, options, expected):
    shape = LayerShape(6, 2, 64, torch.float32, 0.125)
    config = SparseConfig(selector=name, **options).resolve(64, 3)
    assert METHODS[name](config, shape, ops.Ops()).score_bytes == expected

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which tokens survive: forced ones, budgets, and the best scores of each selector."""

import math
from pathlib import Path
from random import Random

import pytest
import torch

from vllm_sparse import config as config_module
from vllm_sparse import ops
from vllm_sparse.cache.layout import BLOCK_SIZE
from vllm_sparse.config import SparseConfig
from vllm_sparse.methods import SELECTORS, DecodeRows, LayerShape
from vllm_sparse.methods.base import keeps_all, tokens_kept
from vllm_sparse.ops.reference import forced_ranges
from vllm_sparse.testing.generate import paged_context

SEQ_LENS = [100, 128, 165, 300, 512, 1111]
BUDGETS = [64, 64, 60, 100, -1, 200]
UNTOUCHED = -7


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


@pytest.mark.parametrize(
    ("length", "budget", "local_window", "sink_tokens", "kept"),
    [
        (300, 100, 32, 4, 100),
        (300, 36, 32, 4, 48),  # tail of 44 and 4 sinks
        (300, 36, 100, 4, 104),  # window of 100 and 4 sinks
        (300, 299, 32, 4, 299),
        (300, 300, 32, 4, 300),
        (300, 5000, 32, 4, 300),
        (300, -1, 32, 4, 300),  # dense
        (127, 36, 32, 4, 127),  # nothing sealed
        (128, 36, 32, 4, 36),
        (129, 36, 126, 4, 129),  # forced ranges meet
        (256, 1, 1, 0, 1),
    ],
)
def test_tokens_kept(length, budget, local_window, sink_tokens, kept):
    assert tokens_kept(length, budget, local_window, sink_tokens) == kept
    dense = keeps_all(length, budget, local_window, sink_tokens)
    assert dense == (kept == length)


def test_keeps_all_and_tokens_kept_follow_from_the_forced_ranges():
    rng = Random(0)
    sparse = 0
    for _ in range(5000):
        length = rng.choice([rng.randint(1, 140), rng.randint(120, 2000)])
        window = rng.choice([1, rng.randint(1, 64), rng.randint(1, 2000)])
        sink = rng.choice([0, 4, rng.randint(0, 300)])
        budget = rng.choice([-1, rng.randint(1, 64), rng.randint(1, 2500)])
        sinks, recent = forced_ranges(length, window, sink)
        case = (length, budget, window, sink)
        assert 0 <= sinks <= recent <= length, case
        dense = budget < 0 or budget >= length or recent <= sinks
        kept = length if dense else max(budget, sinks + length - recent)
        assert keeps_all(*case) == dense, case
        assert tokens_kept(*case) == kept <= length, case
        sparse += not dense
    assert sparse > 900


def test_a_budget_is_met_for_every_fraction_and_length():
    config = SparseConfig(top_k=0.25, local_window=16, sink_tokens=4)
    for length in range(1, 3000, 7):
        kept = tokens_kept(length, config.budget(length), 16, 4)
        tail = length % BLOCK_SIZE
        if length < BLOCK_SIZE:
            assert kept == length
        else:
            assert kept == max(math.ceil(length / 4), 4 + max(16, tail))


class Batch:
    """Sealed contexts and one selector's choice among their tokens."""

    def __init__(self, name, num_heads=6, num_kv_heads=2, soft_cap=0.0, **options):
        torch.manual_seed(0)
        options = dict(selector=name, local_window=16, sink_tokens=4) | options
        shape = LayerShape(
            num_heads, num_kv_heads, 64, torch.float32, 64**-0.5, soft_cap
        )
        config = SparseConfig(**options).resolve(64, num_heads // num_kv_heads)
        self.selector = SELECTORS[name](config, shape)
        generator = torch.Generator().manual_seed(1)
        self.ctx = ctx = paged_context(
            SEQ_LENS, num_kv_heads, 64, torch.float32, generator
        )
        for row in range(len(SEQ_LENS)):
            ops.store_kv(ctx.keys[row], ctx.values[row], ctx.kv_cache, ctx.slots(row))
        ops.seal_blocks(ctx.kv_cache, *ctx.seal_jobs(), 64)
        self.query = torch.randn(len(SEQ_LENS), num_heads, 64)
        rows, room = len(SEQ_LENS), 300
        self.rows = DecodeRows(
            block_table=ctx.block_table,
            seq_lens=ctx.seq_lens,
            budgets=torch.tensor(BUDGETS, dtype=torch.int32),
            indices=torch.full((rows, num_kv_heads, room), UNTOUCHED).int(),
            counts=torch.full((rows, num_kv_heads), UNTOUCHED).int(),
            seq_lens_list=SEQ_LENS,
            budgets_list=BUDGETS,
        )
        self.kept_mass = self.selector.select(self.query, ctx.kv_cache, self.rows)

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


@pytest.mark.parametrize("name", list(SELECTORS))
def test_lists_are_ascending_unique_and_exactly_as_long_as_the_budget(name):
    batch = Batch(name)
    for row, (length, budget) in enumerate(zip(SEQ_LENS, BUDGETS, strict=True)):
        expected = tokens_kept(length, budget, 16, 4)
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


@pytest.mark.parametrize("name", list(SELECTORS))
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
        count = tokens_kept(length, BUDGETS[row], 16, 4)
        expected = [*range(4), *range(length - count + 4, length)]
        assert batch.kept(row, 0) == batch.kept(row, 1) == expected


def test_exact_is_the_oracle_no_selector_keeps_more_mass():
    batches = {name: Batch(name) for name in SELECTORS}
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
    code = page.read_text().split("```python\n")[1].split("```")[0]
    namespace: dict = {}
    exec(code, namespace)
    selector = namespace["KeyNormSelector"]
    monkeypatch.setitem(SELECTORS, selector.name, selector)
    names = (*config_module.SELECTOR_NAMES, selector.name)
    monkeypatch.setattr(config_module, "SELECTOR_NAMES", names)
    batch = Batch(selector.name)
    check_best_survive(
        batch, lambda b, row, head: 1 / b.ctx.keys[row][:, head].norm(dim=-1)
    )
    assert batch.selector.score_bytes(1000) == 2000


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
    ("name", "options", "seq_len", "expected"),
    [
        # 8 sealed blocks, 16 channels of 64 code and 4 parameter bytes each.
        ("sparq", {"rank": 16}, 1111, 8 * 16 * 68),
        ("sparq", {"rank": 16}, 1151, 8 * 16 * 68),
        ("sparq", {"rank": 16}, 1152, 9 * 16 * 68),
        ("sparq", {"rank": 3}, 127, 0),
        # and one prefix mean of 64 fp16 values
        ("sparq", {"rank": 16, "mean_value": True}, 1111, 8 * 16 * 68 + 128),
        # 70 pages of 16 tokens, minima and maxima in fp32
        ("quest", {}, 1111, 70 * 2 * 64 * 4),
        ("quest", {}, 1120, 70 * 2 * 64 * 4),
        ("exact", {}, 1111, 0),
        ("window", {}, 1111, 0),
    ],
)
def test_score_bytes(name, options, seq_len, expected):
    shape = LayerShape(6, 2, 64, torch.float32, 0.125)
    config = SparseConfig(selector=name, **options).resolve(64, 3)
    assert SELECTORS[name](config, shape).score_bytes(seq_len) == expected


@pytest.mark.parametrize("kv_format", ["auto", "int4"])
@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=300),
        dict(top_k=0.1, local_window=40, sink_tokens=7),
        dict(top_k=0.3, dense_below=900),
        dict(top_k=1.0),
        dict(top_p=0.9),
        dict(top_p=0.9, min_tokens=400, max_tokens=700),
        dict(top_p=0.9, min_tokens=0, max_tokens=0.25),
        dict(selector="dense"),
    ],
    ids=str,
)
def test_the_table_of_budgets_is_what_every_length_gets(options, kv_format):
    from vllm_sparse.step.builder import budget_for, budget_table

    options = dict(dense_below=0) | options
    config = SparseConfig(kv_format=kv_format, **options).resolve(64, 3)
    fmt = config.format(64, 3)
    table = budget_table(1500, config, fmt).tolist()
    assert table == [-1, *(budget_for(n, config, fmt) for n in range(1, 1501))]

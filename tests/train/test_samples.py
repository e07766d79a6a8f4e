# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Positions, samples made on the spot, and the mixture of a step."""

import re
from functools import partial

import numpy as np
import pytest

from benchmarks.accuracy import tasks
from vllm_sparse.train import synthetic
from vllm_sparse.train.corpus import Corpus
from vllm_sparse.train.mixture import Mixture
from vllm_sparse.train.positions import default_theta, skipped
from vllm_sparse.train.synthetic import Synthetic, token_text
from vllm_sparse.train.wordings import Wordings


@pytest.mark.parametrize("length, target", [(16, 64), (100, 400), (8, 8), (2, 9)])
def test_skipped_positions_rise_within_the_target(length, target):
    rng = np.random.default_rng(0)
    drawn = np.stack([skipped(length, target, rng) for _ in range(2000)])
    assert drawn.shape == (2000, length) and (drawn[:, 0] == 0).all()
    assert (np.diff(drawn, axis=1) >= 1).all() and drawn.max() == target - 1
    if target > length:
        jumps = (np.diff(drawn, axis=1) > 1).sum(1)
        assert jumps.max() == min(3, length - 1)
        # Every distance occurs, not only the longest.
        distances = {int(row[-1] - row[0]) for row in drawn}
        assert len(distances) > 0.8 * (target - length)


def test_windows_longer_than_the_target_are_refused():
    with pytest.raises(ValueError, match="windows of 9 tokens exceed"):
        skipped(9, 8, np.random.default_rng(0))


def test_default_theta():
    assert default_theta(1e5, 4, 64) == 1.0e6
    assert default_theta(1e4, 1, 64) == 1e4


@pytest.fixture(scope="module")
def made(tokenizer):
    return Synthetic(
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        lambda token: tokenizer.decode([token]),
        len(tokenizer),
    )


@pytest.fixture(scope="module")
def corpus(data_folder):
    return Corpus(data_folder)


def answers(sample, made, tokenizer) -> list[str]:
    """Runs of tokens that count more."""
    edges = np.flatnonzero(np.diff(sample.weights == made.answer_weight, append=False))
    spans = np.split(np.arange(len(sample.ids)), edges + 1)
    heavy = [span for span in spans if len(span) and sample.weights[span[0]] > 1]
    return [tokenizer.decode(sample.ids[span]) for span in heavy]


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_every_fact_is_stated_and_asked_for(made, corpus, tokenizer, kind):
    rng = np.random.default_rng(0)
    for form in synthetic.FACTS[kind]:
        window = lambda n: corpus.window("train-code", n, rng)
        sample = made.facts([form], window, 1900, rng, number=4)
        assert len(sample.ids) == len(sample.weights) == 1900
        assert sample.weights[-sample.answer :].min() == made.answer_weight
        values = [a.strip(" .") for a in answers(sample, made, tokenizer)]
        text = tokenizer.decode(sample.ids)
        assert len(values) == 4 and all(text.count(v) == 2 for v in values)


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_several_wordings_in_a_window(corpus, tokenizer, kind):
    """Each fact is asked for as its own wording asks; longer windows ask more."""
    wide = Wordings.of(tokenizer, repeats=0.0, forms=8, comments=1.0)
    rng = np.random.default_rng(0)
    forms = [(f"{{name}} {n} {{value}};", f"{n} {{name}}?", " {value}") for n in "pq"]
    window = partial(corpus.window, "train-code", rng=rng)
    text = tokenizer.decode(wide.facts(forms, window, 1900, rng, 6).ids)
    asked = re.findall(r"([pq]) (\w+)\? (\d+)", text)
    stated = re.findall(r"(\w+) ([pq]) (\d+);", text)
    assert sorted(stated) == sorted((name, n, value) for n, name, value in asked)
    assert sorted(n for n, _, _ in asked) == [*"pppqqq"]

    wide.words = [f"word{i}" for i in range(999)]

    def answered(length: int) -> float:
        samples = [
            wide.sample(kind, lambda n: np.zeros(n, np.int64), length, rng)
            for _ in range(40)
        ]
        return np.mean([(np.diff(s.weights) > 0).sum() for s in samples])

    assert answered(16384) > 2 * answered(2048)


def test_questions_in_comments(tokenizer):
    """One line each, in other words than the code that says it."""
    wide, rng = Wordings.of(tokenizer, comments=1.0), np.random.default_rng(0)
    for _ in range(100):
        stated, asked, _ = wide.wording("code", rng)
        assert all(line.startswith("# ") for line in asked.split("\n"))
        assert "{name}" in asked and "{key}" not in asked and "{value}" in stated
    silent = Wordings.of(tokenizer)
    asked = [silent.wording("code", rng)[1] for _ in range(100)]
    assert any(not line.startswith("#") for line in asked)


def test_tokens_are_read_within_a_text():
    """Tokenizers like SentencePiece's drop the space before a text's first word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"▁a": 0, "▁word": 1, "\n": 2, "<unk>": 3}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert tokenizer.decode([1]) == "word"
    text = token_text(tokenizer)
    assert [text(1), text(2)] == [" word", "\n"]


def test_copies_are_copies(made, corpus, tokenizer):
    rng, found = np.random.default_rng(0), 0
    for _ in range(20):
        text = corpus.window("train-code", 1024, rng)
        sample = made.copies("code", text, rng)
        assert len(sample.ids) == 1024
        for copied in answers(sample, made, tokenizer):
            assert tokenizer.decode(sample.ids).count(copied) >= 2
            found += 1
    assert found > 20


def test_wording_is_not_that_of_the_benchmarks(tokenizer):
    """No key and no three words in a row of the benchmark's sentences."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.lower().replace(",", " ").split()
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    evaluated = set()
    for form in tasks.FORMS.values():
        evaluated |= runs(form.header) | runs(form.hidden) | runs(form.question)
    forms = [form for forms in synthetic.FACTS.values() for form in forms]
    held_out = [synthetic.HELD_OUT_FACT, synthetic.HELD_OUT_CODE]
    for form in [*forms, *held_out]:
        assert not runs(" ".join(form)) & evaluated
    wide = Wordings.of(tokenizer, comments=0.5)
    rng = np.random.default_rng(0)
    for kind in ("prose", "code"):
        for _ in range(1000):
            assert not runs(" ".join(wide.wording(kind, rng))) & evaluated
    assert not set(tasks.KEYS) & {
        *synthetic.THINGS.split(),
        *synthetic.QUALITIES.split(),
    }
    # Nor do the room's own held-out forms share a run of words with what it trains.
    trained = runs(" ".join(map(" ".join, forms)))
    shared = runs(" ".join(map(" ".join, held_out))) & trained
    assert not {run for run in shared if "{key}" not in run}


def mixture(corpus, made, **options) -> Mixture:
    defaults = dict(
        context=1024,
        window=256,
        batch_tokens=2048,
        steps=10,
        full_share=0.2,
        synthetic=0.5,
        code=0.5,
        replay=0.25,
        seed=0,
    )
    return Mixture(corpus, made, **(defaults | options))


def test_a_step_is_a_function_of_its_number(corpus, made):
    one, two = mixture(corpus, made), mixture(corpus, made)
    for step in (7, 0, 9):
        first, second = one.batch(step), two.batch(step)
        assert (first.ids == second.ids).all()
        assert (first.positions == second.positions).all()
    assert not (one.batch(0).ids == one.batch(1).ids).all()
    assert not (one.batch(0).ids == mixture(corpus, made, seed=1).batch(0).ids).all()


def test_last_steps_have_full_length(corpus, made):
    mixed = mixture(corpus, made)
    shapes = [tuple(mixed.batch(step).ids.shape) for step in range(10)]
    assert shapes == [(8, 256)] * 8 + [(2, 1024)] * 2
    assert (mixed.batch(9).positions.numpy() == np.arange(1024)).all()


def test_shares(corpus, made):
    mixed = mixture(corpus, made)
    batches = [mixed.batch(step) for step in range(8) for _ in range(1)]
    plain = np.mean([(b.positions[:, -1] == 255).float().mean() for b in batches])
    made_up = np.mean([(b.weights.amax(1) > 1).float().mean() for b in batches])
    assert 0.1 < plain < 0.4 and 0.35 < made_up < 0.65
    assert mixture(corpus, made, replay=1.0).batch(0).positions.amax() == 255
    assert mixture(corpus, made, synthetic=0.0).batch(0).weights.amax() == 1

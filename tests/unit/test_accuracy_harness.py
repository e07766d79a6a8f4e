# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The accuracy harness without an engine: arithmetic, samples, records, report."""

import json
import math
from functools import partial
from random import Random

import pytest
import torch

from benchmarks.accuracy import approximate
from benchmarks.accuracy.methods import (
    Method,
    ModelShape,
    estimate_bytes,
    options_for,
    parse_method,
)
from benchmarks.accuracy.metrics import ForcedResult
from benchmarks.accuracy.report import markdown, paired, plot
from benchmarks.accuracy.run import Plan, main, model_path, run, to_json
from benchmarks.accuracy.tasks import DEPTHS, PACKED_TASKS, TASKS, make_samples
from benchmarks.accuracy.text import PackedTexts, TextSources
from tests.ops.inputs import (
    filled,
    list_buffers,
    probabilities,
    random_query,
    select,
    sparq_options,
)
from vllm_sparse.config import SparseConfig
from vllm_sparse.methods import DecodeRows, LayerShape
from vllm_sparse.ops import Ops, reference

SHAPE = ModelShape(head_size=64, num_layers=30)
CONTEXT = 1024

# Keys of facts come from them; their ids are no characters of any text.
FIRST_WORD = 0xE000
WORDS = [f" {a}{b}word" for a in "bcdfghkl" for b in "aeiouy"]


class CharTokenizer:
    """One token per character; its vocabulary has words that it does not use."""

    def encode(self, text, add_special_tokens=True):
        return [ord(char) for char in text]

    def decode(self, token_ids):
        return "".join(map(self.text, token_ids))

    def text(self, token):
        word = token - FIRST_WORD
        return WORDS[word] if 0 <= word < len(WORDS) else chr(token)

    def __len__(self):
        return FIRST_WORD + len(WORDS)


class FakeEngine:
    """Answers correctly when dense; a fixed, worse distribution otherwise."""

    tokenizer = CharTokenizer()
    shape = SHAPE

    def __init__(self):
        self.selectors = []
        self.prefilled = 0

    def configure(self, options):
        self.selectors.append(options["selector"])

    def reset_stats(self):
        pass

    def stats(self):
        read = 100 if self.selectors[-1] == "dense" else 10
        return {"kv_bytes_read": read, "kv_bytes_dense": 100}

    def kept_tokens(self):
        return {"layer": [[10.0, 9.5, 15.0]]}

    def prefill(self, samples):
        self.prefilled += len(samples)

    def force(self, samples):
        p = 0.5 if self.selectors[-1] == "dense" else 0.25
        return [
            ForcedResult(
                [math.log(p)] * len(s.forced_ids),
                [{t: math.log(p), -1: math.log(0.3)} for t in s.forced_ids],
            )
            for s in samples
        ]

    def answer(self, samples):
        good = self.selectors[-1] == "dense"
        return [f" {s.answer}." if good else " 0." for s in samples]


@pytest.fixture(scope="module")
def sources():
    return TextSources(CharTokenizer())


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_reproducible_and_of_the_asked_length(task, sources):
    samples = make_samples(task, sources, CONTEXT, 2)
    assert samples == make_samples(task, TextSources(CharTokenizer()), CONTEXT, 2)
    assert samples[0] != samples[1]
    assert [len(s.prompt_ids) for s in samples] == [CONTEXT, CONTEXT]
    assert all(len(s.forced_ids) >= 2 for s in samples)


@pytest.mark.parametrize("task", TASKS)
def test_first_token_of_the_model_comes_first_and_counts(task):
    class WithBos(CharTokenizer):
        def encode(self, text, add_special_tokens=True):
            return [2] * add_special_tokens + super().encode(text)

    (sample,) = make_samples(task, TextSources(WithBos()), CONTEXT, 1)
    assert len(sample.prompt_ids) == CONTEXT
    assert sample.prompt_ids[0] == 2
    assert 2 not in sample.prompt_ids[1:] + sample.forced_ids


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder of packed text whose ids are characters, and its model's folder."""
    import numpy as np
    from tokenizers import Tokenizer, models

    from vllm_sparse.train.build import Gathered, write
    from vllm_sparse.train.corpus import tokenizer_hash
    from vllm_sparse.train.sources import Source

    folder, model = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("model")
    words = models.WordLevel({"x": 0}, unk_token="x")
    Tokenizer(words).save(str(model / "tokenizer.json"))
    gathered = []
    for kind in ("prose", "code"):
        lines = "".join(f"{kind} of line {i}.\n" for i in range(400))
        held_out = np.array([*map(ord, lines), 0], dtype=np.uint16)
        train = np.array([*map(ord, "x" * 90_000), 0], dtype=np.uint16)
        source = Source("toy", "PSF-2.0", "pip", kind, ("*",))
        gathered.append(Gathered(source, train=[train], held_out=[held_out] * 9))
    hashed = tokenizer_hash(model)
    write(folder, gathered, 10**6, tokenizer=hashed, end_of_document=0)
    return folder, model


@pytest.mark.parametrize("task", TASKS)
def test_packed_texts_give_windows_longer_than_pythons(task, packed):
    """Of held-out streams only; ends of documents are empty lines."""
    sources = PackedTexts(CharTokenizer(), *packed)
    for sample in make_samples(task, sources, 32768, 2):
        text = sources.decode(sample.prompt_ids + sample.forced_ids)
        assert len(sample.prompt_ids) == 32768
        assert "x" * 10 not in text and chr(0) not in text
        assert text.count("code of line" if "code" in task else "prose of line") > 900
        assert "line 399.\n\n\n" in text


def test_packed_texts_name_themselves_and_their_tokenizer(packed, tmp_path):
    folder, _ = packed
    origin = PackedTexts(CharTokenizer(), *packed).origin
    assert PackedTexts(CharTokenizer(), *packed).corpus.digest in origin
    content = (packed[1] / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace('"x"', '"other"'))
    with pytest.raises(ValueError, match="tokenised for another model"):
        PackedTexts(CharTokenizer(), folder, tmp_path)


@pytest.mark.parametrize("task", PACKED_TASKS)
def test_facts_are_the_training_rooms(task, packed):
    """Stated once, in held-out text, and as the room's evaluation makes them."""
    import numpy as np

    sources = PackedTexts(CharTokenizer(), *packed)
    kind = "code" if task == "fact_code" else "prose"
    samples = make_samples(task, sources, CONTEXT, 6)
    assert samples[:2] == make_samples(
        task, PackedTexts(CharTokenizer(), *packed), CONTEXT, 2
    )
    assert [s.depth for s in samples] == [*DEPTHS, DEPTHS[0]]
    assert len({s.answer for s in samples}) == 6
    for index, sample in enumerate(samples):
        prompt = sources.decode(sample.prompt_ids)
        assert len(sample.prompt_ids) == CONTEXT and f"{kind} of line" in prompt
        assert sources.decode(sample.forced_ids) == f" {sample.answer}"
        assert prompt.count(sample.answer) == 1
        if kind == "code":
            asked = prompt.rpartition("issued to ")[2].removesuffix(" is")
            stated = f"tickets.issue({asked}, serial={sample.answer})\n"
        else:
            asked = prompt.rpartition("says that the ")[2].removesuffix(" was")
            stated = f"visitors' book, the {asked} was {sample.answer}.\n"
        assert abs(prompt.index(stated) / CONTEXT - sample.depth) < 0.15
        rng = np.random.default_rng(Random(f"{task}/{CONTEXT}/{index}").getrandbits(64))
        room = sources.synthetic.held_out(
            kind,
            partial(sources.corpus.window, f"heldout-{kind}", rng=rng),
            CONTEXT + len(sample.forced_ids),
            rng,
            sample.depth,
        )
        assert sample.prompt_ids + sample.forced_ids == room.ids.tolist()
        assert room.answer == len(sample.forced_ids)


def test_facts_without_packed_text_are_refused(sources, monkeypatch, capsys):
    with pytest.raises(ValueError, match="'fact' needs packed text: give --texts"):
        make_samples("fact", sources, CONTEXT, 1)
    argv = ["run", "--tasks", "needle", "fact", "--output", "none.json"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit):
        main()
    assert "fact: asked in packed text, give --texts DATA" in capsys.readouterr().err


def test_models_by_name(monkeypatch):
    monkeypatch.setattr("scripts.get_model.get_model", lambda name: f"made of {name}")
    for name in ("smollm2-135m", "smollm2-135m-32k"):
        assert model_path(name) == f"made of {name}"
    assert model_path("folder/of/a/model") == "folder/of/a/model"


def test_samples_per_length():
    assert Plan(lengths=[8, 16], samples=[6, 4]).samples_of(16) == 4
    assert Plan(lengths=[8, 16], samples=5).samples_of(16) == 5


def test_json_keeps_plain_lists_on_one_line():
    data = {"kept": {"layer": [[1.5, 2], []]}, "text": "[\n  1,\n  2 ]"}
    data["samples"] = [{"hit": 1.0, "text": "{\n}"}, {"hit": 0.0}]
    text = to_json(data)
    assert "[1.5, 2]" in text and '{"hit": 0.0}' in text
    assert json.loads(text) == data
    assert json.loads(to_json({"kl": [0.123456789]})) == {"kl": [0.12346]}


@pytest.mark.parametrize(
    ("task", "num_keys"), [("needle", 1), ("needle_2keys", 2), ("needle_4keys", 4)]
)
def test_needle_holds_every_key_once_and_forces_the_asked_value(
    task, num_keys, sources
):
    more_than_plain_prose = len(sources.plain_prose[0]) + 100
    for sample in (
        *make_samples(task, sources, 2048, 5),
        *make_samples(task, sources, more_than_plain_prose, 1),
    ):
        prompt = sources.decode(sample.prompt_ids)
        assert prompt.count("One of the special magic numbers for") == num_keys
        assert prompt.count(sample.answer) == 1
        assert sources.decode(sample.forced_ids) == f" {sample.answer}"
        key = prompt.rpartition("special magic number for ")[2].split()[0]
        assert f"for {key} is: {sample.answer}." in prompt


def test_repetition_forces_what_followed_the_passage(sources):
    for sample in make_samples("repetition", sources, CONTEXT, 5):
        prompt, forced = map(sources.decode, (sample.prompt_ids, sample.forced_ids))
        cue = prompt.rpartition("\n\n")[2][-20:]
        assert cue + forced in prompt


def test_window_that_no_text_can_fill_is_an_error(sources):
    with pytest.raises(ValueError, match="no text of 100000000 tokens"):
        sources.window(sources.code, 100_000_000, Random(0))


def test_parse_method():
    assert parse_method("sparq") == Method("sparq")
    method = parse_method("sparq:rank=32:mean_value=false")
    assert method.options == {"rank": 32, "mean_value": False}
    assert method.label == "sparq:mean_value=False:rank=32"
    assert not parse_method("window:top_k=256").takes_budget
    with pytest.raises(ValueError, match="unknown method 'spark'"):
        parse_method("spark")
    with pytest.raises(ValueError, match="option=value"):
        parse_method("sparq:rank")


def test_estimate_bytes():
    assert estimate_bytes(Method("sparq", {"rank": 16}), SHAPE, 4096) == 4096 * 8.5
    assert estimate_bytes(Method("sparq"), SHAPE, 4096 + 127) == 4096 * 12.75
    assert estimate_bytes(Method("quest"), SHAPE, 4096) == 4096 * 16 + 256
    assert estimate_bytes(Method("exact"), SHAPE, 4096) == 0


@pytest.mark.parametrize("name", ["sparq", "sparq:rank=32", "quest", "window"])
@pytest.mark.parametrize("dense_layers", [0, 2])
def test_budget_is_met_and_used_up(name, dense_layers):
    method = parse_method(f"{name}:dense_layers={dense_layers}")
    options = options_for(method, 0.25, 4096, SHAPE)
    per_layer = estimate_bytes(method, SHAPE, 4096) + options["top_k"] * 256
    dense = 4096 * 256
    total = dense_layers * dense + (30 - dense_layers) * per_layer
    assert 0.249 < total / (30 * dense) <= 0.25
    assert isinstance(options["top_k"], int)


def test_options_leave_nothing_of_the_previous_method_behind():
    a = options_for(parse_method("sparq:rank=8"), 0.125, 4096, SHAPE)
    b = options_for(parse_method("window"), 0.125, 4096, SHAPE)
    assert set(a) == set(b) and b["rank"] is None


def test_serving_judges_what_a_method_asks_for():
    served = lambda options: SparseConfig.from_additional_config({"sparse": options})
    adaptive = options_for(parse_method("sparq:top_p=0.9"), None, 4096, SHAPE)
    assert served(adaptive).top_p == 0.9
    with pytest.raises(ValueError, match="leave top_k out"):
        served(options_for(parse_method("sparq:top_p=0.9:top_k=9"), None, 4096, SHAPE))


def test_budget_below_the_estimate_is_reported_as_impossible():
    assert options_for(Method("quest"), 1 / 16, 4096, SHAPE) is None


def test_run_and_report(tmp_path):
    plan = Plan(
        tasks=["needle", "repetition"],
        lengths=[CONTEXT],
        methods=["sparq", "quest"],
        budgets=[0.125, 0.05],
        samples=3,
    )
    engine = FakeEngine()
    records = run(plan, engine, progress=False)
    assert engine.prefilled == 6
    methods = ["dense", "sparq", "sparq", "quest", "quest"]
    assert [r["method"] for r in records] == 2 * methods
    by_key = {(r["task"], r["method"], r["budget"]): r for r in records}
    assert "skipped" in by_key["needle", "quest", 0.05]
    dense = by_key["needle", "dense", None]
    sparq = by_key["needle", "sparq", 0.125]
    assert (dense["kv_share"], sparq["kv_share"]) == (1.0, 0.1)
    assert sparq["kept_tokens"] == {"layer": [[10.0, 9.5, 15.0]]}
    assert paired(sparq, dense, "hit") == (-1.0, 0.0, 3)
    assert paired(sparq, dense, "bits_per_char")[0] == pytest.approx(1.0)
    # One character per token: bits are those of the probability itself.
    assert dense["samples"][0]["bits_per_char"] == pytest.approx(1.0)

    table = markdown(json.loads(json.dumps(records)))
    assert "### needle, 1024 tokens, n = 3" in table
    assert "| sparq | 0.125 | 0.100 | +1.000 ± 0.000 |" in table
    assert "| 10 to 10 |" in table
    header = {
        "engine": {"model": "m", "dtype": "bfloat16"},
        "machine": {"cpu": "c", "cores": 2},
        "versions": {"vllm": "0"},
        "commit": "0",
        "plan": {"samples": 3},
    }
    plot({"header": header, "records": records}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_forcing_leaves_one_finite_logit():
    pytest.importorskip("vllm")
    import torch

    from benchmarks.accuracy.forcing import ForceTokens, forced_params

    processor = ForceTokens(None, torch.device("cpu"), False)
    force = processor.new_req_logits_processor(forced_params([5, 3], 20))
    for emitted, expected in (([], 5), ([5], 3), ([5, 3], 3)):
        logits = force(emitted, torch.randn(8))
        assert logits.argmax() == expected
        assert logits.isfinite().sum() == 1
    from vllm import SamplingParams

    assert processor.new_req_logits_processor(SamplingParams()) is None


@pytest.mark.parametrize("method", [approximate.Sampled, approximate.SampledParams])
def test_coarse_selections_keep_nearly_the_best(method):
    ctx = filled([300, 2000, 129], 3, 64, torch.bfloat16)
    query, options = random_query(ctx, 9, torch.bfloat16), sparq_options(24, 0.125)
    budgets = [150, 300, -1]
    want = select(reference, ctx, query, budgets, options, False)
    config = SparseConfig(rank=24, local_window=16, sink_tokens=4)
    shape = LayerShape(9, 3, 64, torch.bfloat16, 0.125)
    lists = list_buffers(ctx, 9, want["indices"].shape[2], False)
    rows = DecodeRows(
        ctx.block_table,
        ctx.seq_lens,
        torch.tensor(budgets, dtype=torch.int32),
        **lists,
    )
    method(config.resolve(64, 3), shape, Ops()).select(query, ctx.kv_cache, rows)
    assert torch.equal(rows.counts, want["counts"])
    for row, head in (want["counts"] > 0).nonzero().tolist():
        p = probabilities(ctx, query, row, head, options).sum(0)
        kept, best = (
            t["indices"][row, head, : budgets[row]].long() for t in (lists, want)
        )
        assert (kept.diff() > 0).all() and p[kept].sum() > 0.95 * p[best].sum()

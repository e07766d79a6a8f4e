# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""From packages to packed text: what is read, held out, dropped, how it is stored."""

import json
import zlib

import numpy as np
import pytest

from vllm_sparse.train import build, corpus
from vllm_sparse.train.build import Gathered, gather, level, take, write
from vllm_sparse.train.corpus import Corpus
from vllm_sparse.train.fetch import clean, documents, html_text
from vllm_sparse.train.shingles import Shingles
from vllm_sparse.train.sources import SOURCES, Source, evaluated_texts

END = 0


def text_of(seed: int, words: int = 400) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(f"w{i}" for i in rng.integers(0, 5000, words))


def encode(texts):
    return [[int(word[1:]) + 1 for word in text.split()] for text in texts]


def run(texts, held_out=("held/*",), seen=None, known=None) -> Gathered:
    source = Source("toy", "MIT", "pip", "code", ("*",), held_out)
    return gather(source, texts, encode, seen or Shingles(), known or Shingles(), END)


def test_held_out_files_are_not_trained_on():
    found = run([("held/a", text_of(0)), ("b", text_of(1))])
    assert [len(ids) for ids in found.train] == [401]
    assert list(found.train[0]) == [*encode([text_of(1)])[0], END]
    assert list(found.held_out[0][:-1]) == encode([text_of(0)])[0]
    assert found.held_out_paths == ["held/a"]


def test_copies_of_held_out_text_are_dropped():
    """Also where they are a tenth of a file."""
    copied = text_of(0, 80)
    found = run([("held/a", text_of(0, 80)), ("b", text_of(1, 700) + " " + copied)])
    assert found.train == [] and found.dropped["held out"] == 1


def test_near_duplicates_are_dropped_across_sources():
    seen = Shingles()
    run([("a", text_of(2))], seen=seen)
    changed = text_of(2).replace(" ", "  ").split(" ")
    changed[50:60] = ["w1"] * 10
    found = run([("b", " ".join(changed)), ("c", text_of(3))], seen=seen)
    assert found.dropped == {"duplicate": 1, "held out": 0} and len(found.train) == 1


def test_what_benchmarks_evaluate_on_is_never_trained_on():
    from benchmarks.accuracy.text import CODE_MODULES

    evaluated = evaluated_texts()
    assert {f"{name}.py" for name in CODE_MODULES} < set(evaluated)
    known = Shingles()
    for text in evaluated.values():
        known.seen |= Shingles.of(text)
    for name, text in evaluated.items():
        assert known.share(Shingles.of(text)) == 1, name
        part = text[len(text) // 2 :][:4000]
        assert known.share(Shingles.of(part)) > build.MAX_HELD_OUT, name
    topics = evaluated["pydoc_data.topics"]
    found = gather(
        next(s for s in SOURCES if s.name == "pytest"),
        [("vendored.py", topics[:20_000])],
        lambda texts: [[1]] * len(texts),
        Shingles(),
        known,
        END,
    )
    assert found.train == []


def test_sources_say_what_they_are():
    names = [source.name for source in SOURCES]
    assert len(names) == len(set(names))
    assert all(source.licence and source.files for source in SOURCES)
    held_out = {s.kind for s in SOURCES if s.held_out == ("*",)}
    assert held_out == {"prose", "code"}
    assert any("Persuasion" in p for s in SOURCES for p in s.held_out)


@pytest.mark.parametrize(
    "sizes, budget, expected",
    [([5, 100, 100], 45, 20), ([5, 6], 100, 6), ([30, 30], 30, 15), ([], 9, 0)],
)
def test_level(sizes, budget, expected):
    assert level(sizes, budget) == expected
    assert sum(min(size, expected) for size in sizes) <= budget


def test_take_cuts_the_last_document():
    ids = [np.arange(n) for n in (3, 4, 5)]
    assert [len(i) for i in take(ids, 8)] == [3, 4, 1]
    assert [len(i) for i in take(ids, 7)] == [3, 4] and take(ids, 0) == []


@pytest.fixture
def packed(tmp_path, monkeypatch, model_folder):
    """Documents of 30, 90 and 50 tokens in parts of 64."""
    monkeypatch.setattr(build, "PART_TOKENS", 64)
    source = Source("toy", "MIT", "pip", "code", ("*",))
    train = [np.arange(n, dtype=np.uint16) + 100 * n for n in (30, 90, 50)]
    hashed = corpus.tokenizer_hash(model_folder)
    write(
        tmp_path,
        [Gathered(source, train=train)],
        170,
        tokenizer=hashed,
        end_of_document=0,
    )
    return tmp_path, np.concatenate(train)


def test_parts_hold_the_stream(packed):
    folder, stream = packed
    read = Corpus(folder)
    parts = read.parts["train-code"]
    assert [len(part) for part in parts] == [30, 64, 26, 50]
    assert np.array_equal(np.concatenate(parts), stream)
    assert read.tokens("train-code") == 170 and read.tokens("heldout-code") == 0
    offsets = np.load(folder / "train-code-offsets.npy")
    assert offsets.tolist() == [0, 30, 120, 170]


def test_windows_lie_within_parts(packed):
    folder, _ = packed
    read, rng = Corpus(folder), np.random.default_rng(0)
    starts = {int(read.window("train-code", 40, rng)[0]) for _ in range(300)}
    windows = [read.window("train-code", 40, rng) for _ in range(50)]
    assert all((np.diff(w) == 1).all() for w in windows)
    assert len(starts) == (64 - 39) + (50 - 39)
    with pytest.raises(ValueError, match="no 65 tokens in train-code"):
        read.window("train-code", 65, rng)


def test_other_text_is_refused(packed, model_folder, tmp_path):
    folder, _ = packed
    other, content = tmp_path / "tokenizer.json", model_folder / "tokenizer.json"
    Corpus(folder, model_folder)
    other.write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        Corpus(folder, tmp_path)
    changed = json.loads(content.read_text())
    changed["model"]["merges"].pop()
    other.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="tokenised for another model"):
        Corpus(folder, tmp_path)
    (folder / "train-code-001.bin").write_bytes(b"changed")
    with pytest.raises(ValueError, match="train-code-001.bin differs"):
        Corpus(folder)
    with pytest.raises(FileNotFoundError, match="give a model's folder"):
        Corpus(folder, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="vllm_sparse.train data --out"):
        Corpus(folder / "none")


def test_a_tokenizer_is_known_however_it_is_written(model_folder, tmp_path):
    content = json.loads((model_folder / "tokenizer.json").read_text())

    def hashed(change) -> str:
        changed = json.loads(json.dumps(content))
        change(changed)
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed, indent=1))
        return corpus.tokenizer_hash(tmp_path)

    def respelt(tokenizer):
        merges = tokenizer["model"]["merges"]
        joined = [m.split(" ") if isinstance(m, str) else " ".join(m) for m in merges]
        tokenizer["model"]["merges"] = joined
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "b", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {"b": {"id": "b", "ids": [1], "tokens": ["b"]}},
        }
        tokenizer["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        tokenizer["padding"] = {
            "strategy": {"Fixed": 500},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "b",
        }
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": []}
        tokenizer["pre_tokenizer"]["trim_offsets"] ^= True

    same = corpus.tokenizer_hash(model_folder)
    assert hashed(respelt) == same
    assert hashed(lambda t: t["model"]["merges"].pop()) != same
    assert hashed(lambda t: t.update(pre_tokenizer=None)) != same
    assert hashed(lambda t: t.update(normalizer={"type": "NFKC"})) != same


def test_html():
    page = """<head><title>no</title></head><body><nav>no</nav><h1>Title</h1>
    <p>One   <b>two</b>
    three.</p><pre>a
      b</pre><script>no()</script></body>"""
    assert clean(html_text(page)) == "Title\n\nOne two three.\n\na\n      b\n"


def test_novels_and_wheels_are_read(tmp_path):
    import zipfile

    def string(text: str) -> bytes:
        return b"\0\x04\0\x09" + len(text).to_bytes(4) + text.encode()

    books = b""
    for title in ("EMMA", "Persuasion"):
        raw = b"X\n header" + b"".join(map(string, [title, "", "A line."]))
        books += len(raw).to_bytes(4) + zlib.compress(raw)
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a/Rdata.rdb", books)
        wheel.writestr("a/b.py", "x = y\n" * 300)
        wheel.writestr("a/data.py", "1234567, " * 3000)
        wheel.writestr("a/tiny.py", "x = y\n")
    source = Source("a", "MIT", "pip", "code", ("*.py", "*.rdb"), ())
    found = dict(documents(source, tmp_path / "a-1-py3-none-any.whl"))
    assert found == {
        "a/Rdata.rdb/Emma": "EMMA\n\nA line.\n",
        "a/Rdata.rdb/Persuasion": "Persuasion\n\nA line.\n",
        "a/b.py": "x = y\n" * 300,
    }


def test_manifest_names_sources(data_folder):
    manifest = json.loads((data_folder / "manifest.json").read_text())
    entry = manifest["sources"][0]
    assert entry["licence"] == "PSF-2.0" and entry["tokens"] > 0
    assert len(Corpus(data_folder).digest) == 64

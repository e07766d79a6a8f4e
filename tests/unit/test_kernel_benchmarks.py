# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Two builds in turns, without running either."""

import json
import subprocess
import sys

import pytest

from benchmarks.kernels import compare_builds

TREE = """
import json, sys
from pathlib import Path
count = Path("count")
runs = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(runs))
if {fails}: raise SystemExit("no GPU")
row = {{"case": "1x9", "sparq": runs * {time}, "gb_per_s": 3.0}}
rows = [row, {{"case": "{own}", "sparq": 1.0}}]
Path(sys.argv[-1]).write_text(json.dumps({{"{key}": rows, "device": "{own}"}}))
"""


@pytest.fixture
def tree(tmp_path):
    def make(own: str, time: float, key: str, fails: bool = False):
        (tmp_path / own).mkdir()
        text = TREE.format(own=own, time=time, key=key, fails=fails)
        (tmp_path / own / "times.py").write_text(text)
        return str(tmp_path / own)

    return make


def run(tmp_path, *folders: str):
    command = [sys.executable, "-m", "benchmarks.kernels.compare_builds", *folders]
    command += ["--command", "times", "--rounds", "3"]
    command += ["--output", str(tmp_path / "out.json")]
    return subprocess.run(command, capture_output=True, text=True)


def test_medians_of_what_both_builds_have_are_compared(tree, tmp_path):
    done = run(tmp_path, tree("old", 2.0, "rows"), tree("new", 3.0, "results"))
    assert "| 1x9 | sparq | 4.0 | 6.0 | 1.500 |" in done.stdout, done.stderr
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [build["device"] for build in result["builds"]] == ["old", "new"]
    (row,) = result["rows"]
    assert (row["all_old"], row["all_new"]) == ([2.0, 4.0, 6.0], [3.0, 6.0, 9.0])


def test_a_build_that_fails_says_why(tree, tmp_path):
    done = run(tmp_path, tree("old", 2.0, "rows"), tree("new", 3.0, "rows", fails=True))
    assert done.returncode == 1 and "no GPU" in done.stderr


def test_cases_of_older_results_have_the_same_names():
    row = {"case": {"batch": 4, "seq_len": 512}, "sparq": 7.0, "ratio": 2.0}
    assert compare_builds.read({"rows": [row]}) == {("4x512", "sparq"): 7.0}

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Thousands of requests of every kind, each compared with itself run alone."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

from .tiny import save_llama  # noqa: E402

pytestmark = pytest.mark.engine
SPARSE = {"dense_below": 0, "top_k": 48, "local_window": 16}


LOSSLESS = SPARSE | {"lossless": True, "draft_above": 0}
ALWAYS = {"draft_adapt": False}  # drafts as many, whatever they bring


@pytest.mark.parametrize(
    ("requests", "mebibytes", "options", "longest"),
    [
        (2000, 10, SPARSE, 60),
        (300, 3, SPARSE | {"kv_format": "int4"}, 60),
        (200, 8, LOSSLESS | ALWAYS, 60),
        pytest.param(200, 10, LOSSLESS | ALWAYS, 512, marks=pytest.mark.slow),
        pytest.param(2000, 10, LOSSLESS, 512, marks=pytest.mark.slow),
        pytest.param(
            200,
            6,
            LOSSLESS | ALWAYS | {"kv_format": "int4"},
            512,
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "rows",
        "int4",
        "lossless",
        "lossless-long",
        "lossless-adapts",
        "lossless-int4",
    ],
)
def test_every_output_is_that_of_the_request_alone(
    tmp_path, requests, mebibytes, options, longest
):
    model, output = save_llama(tmp_path / "model", num_kv_heads=2), tmp_path / "soak"
    command = [sys.executable, "-m", "benchmarks.serving.soak", "--model", str(model)]
    command += ["--requests", str(requests), "--jobs", "60", "--output", str(output)]
    command += ["--kv-cache-mib", str(mebibytes), "--sparse", json.dumps(options)]
    command += ["--max-tokens", str(longest)]
    # Steps of so small a model are shorter than waking a second thread.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    # It would override the size of the cache.
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert output.exists(), done.stderr[-3000:]
    report = json.loads(output.read_text())
    assert report["mismatches"] == []
    assert report["leaked_blocks"] == report["unfinished_in_scheduler"] == 0
    assert report["requests"] == requests
    if "lossless" in options:
        assert report["changed_after_preemption"] == 0
        assert 0 < report["accepted"] < report["drafted"]
    for kind in ("aborted", "streamed", "several", "prefix_hits", "preempted"):
        assert report[kind] > 0, kind
    # The first half meets every number of tokens that a step can have.
    half = len(report["megabytes"]) // 2
    assert report["megabytes"][-1] < 1.03 * report["megabytes"][half]
    assert done.returncode == 0

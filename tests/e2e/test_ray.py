# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The examples for Ray: several small engines on this machine's CPU."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("ray.serve")

from benchmarks.serving.processes import free_port, running  # noqa: E402
from scripts.get_model import get_model  # noqa: E402

pytestmark = pytest.mark.engine
EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_LAYERS = 30
TOO_LONG = "word " * 600
SECONDS = 400
PROMPTS = {
    "The capital of France is the city of": "Paris",
    "One, two, three, four,": "five",
    "Water consists of hydrogen and": "oxygen",
    "A week has seven": "days",
    "The largest planet of the solar system is": "Jupiter",
}
OPTIONS = [
    "--model",
    str(get_model()),
    "--additional-config",
    json.dumps({"sparse": {"top_k": 0.25}}),
    "--engine-args",
    json.dumps(
        {
            "enforce_eager": True,
            "kv_cache_memory_bytes": 2**27,
            "max_model_len": 512,
        }
    ),
]


def environment() -> dict[str, str]:
    return os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


def batch(folder: Path, lines: list[str], *options: str) -> subprocess.CompletedProcess:
    (folder / "in.jsonl").write_text("\n".join(lines))
    return subprocess.run(
        [sys.executable, EXAMPLES / "ray_batch.py", "in.jsonl", "out.jsonl"]
        + OPTIONS
        + list(options),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def test_a_batch_over_two_engines(tmp_path):
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    rows.insert(3, {"id": 5, "prompt": TOO_LONG})
    lines = [*map(json.dumps, rows), ""]
    options = ["--engines", "2", "--batch-size", "2", "--max-tokens", "8"]
    done = batch(tmp_path, lines, *options)
    assert done.returncode == 1, done.stderr[-4000:]
    assert "1 of 6 prompts were refused" in done.stderr
    answers = [json.loads(s) for s in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{k: a[k] for k in ("id", "prompt")} for a in answers] == rows
    refused = answers.pop(3)
    assert "512" in refused["error"] and "text" not in refused
    for answer in answers:
        assert PROMPTS[answer["prompt"]] in answer["text"]
        assert answer["tokens"] == 8 and answer["finish_reason"] == "length"
    assert "6/6" in done.stderr  # the progress bar


def test_engines_that_do_not_fit_are_refused(tmp_path):
    line = json.dumps({"prompt": "a"})
    done = batch(tmp_path, [line], "--engines", "999")
    assert done.returncode == 1
    assert "999 engines of 1 CPUs and 0 GPUs do not fit on Ray's nodes" in done.stderr
    done = batch(tmp_path, [line], "--engines", "0")
    assert "argument --engines: must be 1 or more" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_line_without_a_prompt_stops_a_batch_before_ray_starts(tmp_path):
    done = batch(tmp_path, [json.dumps({"prompt": "a"}), json.dumps({"text": "b"})])
    assert done.returncode == 1
    assert "in.jsonl, line 2: expected a JSON object with a string" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@contextmanager
def served(log: Path, *options: str):
    """The URL of a running Ray Serve deployment; its output goes to ``log``."""
    port = free_port()
    command = [sys.executable, str(EXAMPLES / "ray_serve.py"), "--port", str(port)]
    with running([*command, *OPTIONS, *options], log, environment()) as process:
        yield process, f"http://127.0.0.1:{port}/v1/completions"


def post(url: str, body: dict) -> dict:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def wait_for_rows(url: str, expected: float, deadline: float) -> None:
    """Until all replicas' rows of prompts are in what Ray collects now and then."""
    while True:
        with urllib.request.urlopen(url, timeout=30) as response:
            lines = response.read().decode().splitlines()
        rows = sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if "vllm_sparse_rows_dense" in line and 'reason="prefill"' in line
        )
        if rows == expected:
            return
        assert rows < expected and time.monotonic() < deadline, (rows, expected)
        time.sleep(1)


def test_two_replicas_answer(tmp_path):
    log = tmp_path / "serve.log"
    greedy = {"max_tokens": 8, "temperature": 0}
    deadline = time.monotonic() + SECONDS
    metrics_port = str(free_port())
    options = ("--replicas", "2", "--metrics-port", metrics_port)
    with served(log, *options) as (process, url):
        while "Application 'vllm-sparse' is ready" not in log.read_text():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)

        def ask(prompt):
            return post(url, {"prompt": prompt} | greedy)

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(ask, PROMPTS))
        for word, answer in zip(PROMPTS.values(), answers, strict=True):
            assert word in answer["choices"][0]["text"]
            assert answer["usage"]["completion_tokens"] == 8
        tokens = sum(answer["usage"]["prompt_tokens"] for answer in answers)
        metrics = f"http://127.0.0.1:{metrics_port}/metrics"
        wait_for_rows(metrics, tokens * NUM_LAYERS, deadline)
        with pytest.raises(urllib.error.HTTPError) as error:
            post(url, {"prompt": "a", "n": 2})
        assert error.value.code == 422
        assert "Extra inputs are not permitted" in error.value.read().decode()
        with pytest.raises(urllib.error.HTTPError) as error:
            post(url, {"prompt": TOO_LONG})
        assert error.value.code == 400
        assert "512" in error.value.read().decode()
    assert process.poll() is not None

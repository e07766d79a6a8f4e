# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Ray's own libraries with our backend in their engines' arguments, on CPUs."""

import json
import os
import re
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
pytest.importorskip("ray.data.llm", exc_type=ImportError)  # Ray's extra "data"

from vllm import AsyncEngineArgs  # noqa: E402

from benchmarks.serving.processes import free_port, running  # noqa: E402
from scripts.get_model import get_model  # noqa: E402

pytestmark = pytest.mark.engine
EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 400
NUM_LAYERS = 30
TOO_LONG = "word " * 600
PROMPTS = {
    "The capital of France is the city of": "Paris",
    "One, two, three, four,": "five",
    "Water consists of hydrogen and": "oxygen",
    "A week has seven": "days",
    "The largest planet of the solar system is": "Jupiter",
}
ENGINE = {
    "additional_config": {"sparse": {"top_k": 0.25}},
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**27,
    "max_model_len": 512,
    "max_num_batched_tokens": 512,
}
ENVIRONMENT = os.environ | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    # On CPUs vLLM then lets an engine of one rank do without a process for it, where
    # Ray allows that (in batches).
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "RAY_metrics_report_interval_ms": "1000",
    # Each engine says that it answered, in its own name.
    "RAY_DEDUP_LOGS": "0",
    # So that no engine has answered all before the other one is there.
    "RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": str(SECONDS),
}


def options() -> list[str]:
    return ["--model", str(get_model()), "--engine-kwargs", json.dumps(ENGINE)]


@contextmanager
def served(folder: Path, replicas: int, cpus: float):
    """A server that has just been started, its log, its URL and that of metrics."""
    log, port, metrics = folder / "serve.log", free_port(), free_port()
    command = [sys.executable, str(EXAMPLES / "ray_serve_llm.py"), *options()]
    command += ["--served-model-name", "tiny", "--port", str(port)]
    command += ["--replicas", str(replicas), "--cpus", str(cpus)]
    command += ["--metrics-port", str(metrics)]
    with running(command, log, ENVIRONMENT) as process:
        yield process, log, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """With one replica."""
    with served(tmp_path_factory.mktemp("serve"), 1, 1) as started:
        yield started


def answer_a_batch(folder: Path, *more: str) -> str:
    """Checks the answers to ``PROMPTS`` and ``TOO_LONG``; what was logged."""
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    rows.insert(3, {"prompt": TOO_LONG, "generated_text": "of an earlier run"})
    (folder / "in.jsonl").write_text("\n".join([*map(json.dumps, rows), ""]))
    command = [sys.executable, EXAMPLES / "ray_data_llm.py", "in.jsonl", "out.jsonl"]
    done = subprocess.run(
        [*command, *options(), "--max-tokens", "8", *more],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 1, done.stderr[-4000:]
    assert "1 of 6 prompts were refused" in done.stderr
    answers = [json.loads(s) for s in (folder / "out.jsonl").read_text().splitlines()]
    refused = answers.pop(3)
    assert refused.keys() == {"prompt", "error"} and refused["prompt"] == TOO_LONG
    assert "maximum context length is 512 tokens" in refused["error"]
    for number, (prompt, word) in enumerate(PROMPTS.items()):
        row = answers[number]
        assert (row["id"], row["prompt"]) == (number, prompt)
        assert word in row["generated_text"] and row["num_generated_tokens"] == 8
    return done.stdout + done.stderr


def test_a_batch(tmp_path):
    answer_a_batch(tmp_path, "--cpus", "1")


@pytest.fixture
def example(monkeypatch):
    """Its configuration, made by its own command line."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def module(name: str, *arguments: str):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        found = __import__(name)
        return found, found.parse_args()

    return module


def assert_ours(arguments: dict) -> None:
    """vLLM takes them, and they choose our backend with our options."""
    config = AsyncEngineArgs(**arguments).create_engine_config()
    assert config.attention_config.backend.name == "SPARQ"
    assert config.additional_config == ENGINE["additional_config"]


def test_ray_data_takes_our_arguments(example):
    module, args = example("ray_data_llm", "in.jsonl", "out", *options())
    config = module.processor_config(args)
    assert config.placement_group_config is None  # GPUs, as Ray chooses them
    arguments = config.engine_kwargs
    assert arguments.pop("task_type") == "generate"
    assert_ours(arguments | {"model": config.model_source})


def test_ray_serve_takes_our_arguments(example):
    module, args = example("ray_serve_llm", *options())
    config = module.llm_config(args).get_engine_config()
    assert config.placement_bundles == [{"GPU": 1}]
    arguments = config.get_initialization_kwargs()
    assert arguments.pop("distributed_executor_backend") == "ray"  # not on CPUs
    assert_ours(arguments)


def test_a_line_without_a_prompt_is_named(example):
    prepare = example("ray_data_llm", "in.jsonl", "out", *options())[0].prepare
    for line in ('{"text": "b"}', '{"prompt": 1}', "[]", '{"prompt": "b"'):
        with pytest.raises(ValueError, match=re.escape(f"got {line!r}")):
            prepare(line, chat=False, max_tokens=8)


@pytest.mark.slow
def test_a_batch_over_two_engines(tmp_path):
    more = ["--concurrency", "2", "--cpus", "0.5", "--batch-size", "2"]
    log = answer_a_batch(tmp_path, *more)
    answered = re.findall(r"pid=(\d+)\).*Elapsed time for batch", log)
    assert len(answered) == 3 and len(set(answered)) == 2


def post(url: str, body: dict) -> dict:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def wait_for_rows(url: str, expected: float, deadline: float) -> int:
    """Until all replicas' rows of prompts are in what Ray collects now and then;
    of how many replicas they are."""
    while True:
        with urllib.request.urlopen(url, timeout=30) as response:
            lines = response.read().decode().splitlines()
        lines = [
            line
            for line in lines
            if "vllm_sparse_rows_dense" in line and 'reason="prefill"' in line
        ]
        rows = sum(float(line.rsplit(" ", 1)[1]) for line in lines)
        if rows == expected:
            return len({re.search('ReplicaId="(.*?)"', line)[1] for line in lines})
        assert rows < expected and time.monotonic() < deadline, (rows, expected)
        time.sleep(0.5)


def assert_serves(process, log: Path, url: str, metrics: str, replicas: int) -> None:
    deadline = time.monotonic() + SECONDS
    while "is ready at" not in log.read_text():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)
    url += "/v1/completions"

    def ask(prompt):
        return post(
            url, {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        )

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(ask, PROMPTS))
    for word, answer in zip(PROMPTS.values(), answers, strict=True):
        assert word in answer["choices"][0]["text"]
        assert answer["usage"]["completion_tokens"] == 8
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(TOO_LONG)
    assert error.value.code == 400
    assert "maximum context length is 512 tokens" in error.value.read().decode()
    tokens = sum(answer["usage"]["prompt_tokens"] for answer in answers)
    rows = tokens * NUM_LAYERS
    assert wait_for_rows(metrics + "/metrics", rows, deadline) == replicas


@pytest.mark.slow
def test_a_server(server):
    assert_serves(*server, replicas=1)


@pytest.mark.slow
def test_two_replicas(tmp_path):
    with served(tmp_path, 2, 0.5) as (process, *where):
        assert_serves(process, *where, replicas=2)
    assert process.poll() is not None

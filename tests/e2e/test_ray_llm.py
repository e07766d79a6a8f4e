# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Ray's own libraries with our backend in their engines' arguments, on CPUs."""

import json
import subprocess
import sys
import time

import pytest

pytest.importorskip("vllm")
pytest.importorskip("ray.data.llm", exc_type=ImportError)  # Ray's extra "data"

from vllm import AsyncEngineArgs  # noqa: E402

from benchmarks.serving.processes import free_port, running  # noqa: E402
from scripts.get_model import get_model  # noqa: E402

from .test_ray import EXAMPLES, PROMPTS, SECONDS, environment, post  # noqa: E402

pytestmark = pytest.mark.engine
ENGINE = {
    "additional_config": {"sparse": {"top_k": 0.25}},
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**27,
    "max_model_len": 512,
}


def options(**engine) -> list[str]:
    return ["--model", str(get_model()), "--engine-kwargs", json.dumps(ENGINE | engine)]


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


@pytest.mark.slow
def test_a_batch(tmp_path):
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, EXAMPLES / "ray_data_llm.py", "in.jsonl", "out"]
    command += [*options(), "--max-tokens", "8", "--cpus", "1"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [
        json.loads(line)
        for file in (tmp_path / "out").glob("*.json")
        for line in file.read_text().splitlines()
    ]
    answers = {line["id"]: line for line in lines}
    assert len(lines) == len(answers) == len(rows)
    for row, word in zip(rows, PROMPTS.values(), strict=True):
        assert answers[row["id"]]["prompt"] == row["prompt"]
        assert word in answers[row["id"]]["generated_text"]


@pytest.mark.slow
def test_a_server(tmp_path):
    port, log = free_port(), tmp_path / "serve.log"
    command = [sys.executable, str(EXAMPLES / "ray_serve_llm.py"), *options()]
    command += ["--served-model-name", "tiny", "--cpus", "1", "--port", str(port)]
    deadline = time.monotonic() + SECONDS
    greedy = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    with running(command, log, environment()) as process:
        while "is ready at" not in log.read_text():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        url = f"http://127.0.0.1:{port}/v1/completions"
        for prompt, word in PROMPTS.items():
            answer = post(url, greedy | {"prompt": prompt})
            assert word in answer["choices"][0]["text"]
            assert answer["usage"]["completion_tokens"] == 8
    assert process.poll() is not None

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The command line, and a model whose layers are not all ours."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch  # noqa: E402

from scripts.get_model import get_model  # noqa: E402

pytestmark = pytest.mark.engine

START_SECONDS = 400
EXTENSION = "vllm_sparse.attention.stats.WorkerExtension"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(log: Path, *arguments: str):
    """A running ``vllm serve`` and its URL; its output goes to ``log``.

    The module is what that command runs; the command itself asks for the version of a
    package named vllm, which the CPU distribution is not.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(get_model()), "--host", "127.0.0.1"]
    command += ["--port", str(port), *arguments]
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        # SIGINT is what Ctrl-C sends; the group holds engine core and worker.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_healthy(process, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no server: {log.read_text()[-4000:]}")


def test_serve_answers_with_the_options_of_the_command_line(tmp_path):
    log = tmp_path / "server.log"
    arguments = ["--attention-backend", "sparq", "--enforce-eager"]
    arguments += ["--additional-config.sparse.top_k", "0.25"]
    arguments += ["--max-model-len", "1024", "--kv-cache-memory-bytes", "256M"]
    arguments += ["--served-model-name", "tiny"]
    with server(log, *arguments) as (process, url):
        wait_until_healthy(process, url, log)
        body = {
            "model": "tiny",
            "prompt": "The capital of France is the city of",
            "max_tokens": 5,
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
    assert "Paris" in answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 5
    output = log.read_text()
    assert "Sparse attention: SparseConfig(selector='sparq'" in output
    assert "top_k=0.25" in output
    assert process.poll() is not None


def test_serve_stops_on_a_bad_option_before_loading_anything(tmp_path):
    log = tmp_path / "server.log"
    arguments = ["--attention-backend", "sparq", "--additional-config.sparse.rank", "0"]
    with server(log, *arguments) as (process, _):
        assert process.wait(START_SECONDS) != 0
    output = log.read_text()
    assert "sparse.rank = 0 is not allowed" in output
    assert "--additional-config.sparse.rank 16" in output
    assert "Loading" not in output


@pytest.fixture(scope="module")
def hybrid_model(tmp_path_factory) -> Path:
    """Gemma 3 in small: sliding-window layers, and full ones that are ours."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=256,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size=512,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Gemma3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # Strong enough that attention matters for the next token.
            torch.nn.init.normal_(parameter, std=0.15)
    folder = tmp_path_factory.mktemp("hybrid")
    model.float().save_pretrained(folder)
    return folder


@contextmanager
def engine(model: Path, **options):
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        environment = dict(os.environ)
        llm = LLM(
            model=str(model),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            kv_cache_memory_bytes=2**28,
            max_model_len=1024,
            max_num_batched_tokens=500,
            **options,
        )
        try:
            yield llm
        finally:
            from vllm.distributed import cleanup_dist_env_and_memory

            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()
            for name in set(os.environ) - set(environment):
                del os.environ[name]


def answers(llm) -> list[list[int]]:
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(1)
    prompts = [
        {"prompt_token_ids": torch.randint(3, 512, (n,), generator=generator).tolist()}
        for n in (700, 129, 300)
    ]
    params = SamplingParams(
        temperature=0, max_tokens=20, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_sliding_window_layers_beside_ours(hybrid_model):
    """Two KV cache groups whose pages differ in size, one of them with a sidecar."""
    with engine(hybrid_model, attention_backend="CPU_ATTN") as llm:
        expected = answers(llm)
    with engine(
        hybrid_model,
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": {"top_k": 1.0}},
    ) as llm:
        # Totals belong to the process, which other tests' engines used before.
        llm.collective_rpc("reset_sparse_stats")
        assert answers(llm) == expected
        (dense,) = llm.collective_rpc("sparse_stats")
        assert dense["decode_tokens"] == 3 * 19
        assert dense["decode_rows"] == 2 * 3 * 19  # the two full layers alone
        assert dense["sparse_rows"] == 0
        # Prefix-cache hits in both groups.
        assert answers(llm) == expected

        assert llm.reset_prefix_cache()
        options = {"top_k": 0.3, "dense_below": 0, "local_window": 16}
        llm.collective_rpc("reconfigure_sparse", args=(options,))
        llm.collective_rpc("reset_sparse_stats")
        assert len(answers(llm)) == 3
        (sparse,) = llm.collective_rpc("sparse_stats")
        assert sparse["sparse_rows"] == sparse["decode_rows"] == 2 * 3 * 19
    assert len({tuple(ids) for ids in expected}) == 3

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The command line, and a model whose layers are not all ours."""

import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch  # noqa: E402

from benchmarks.serving.processes import free_port, running  # noqa: E402
from scripts.get_model import get_model  # noqa: E402
from vllm_sparse.stats import live_figures  # noqa: E402

from .engines import EXTENSION  # noqa: E402
from .engines import running as running_engine  # noqa: E402
from .tiny import save  # noqa: E402

pytestmark = pytest.mark.engine

START_SECONDS = 400


@contextmanager
def server(log: Path, *arguments: str):
    """A running ``vllm-sparse serve`` and its URL; its output goes to ``log``."""
    port = free_port()
    command = [sys.executable, "-m", "vllm_sparse", "serve"]
    command += [str(get_model()), "--host", "127.0.0.1"]
    command += ["--port", str(port), *arguments]
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with running(command, log, environment) as process:
        yield process, f"http://127.0.0.1:{port}"


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


def complete(url: str, prompt: str | list[int], tokens: int, **options) -> dict:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens} | options
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body | {"temperature": 0}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def sparse_metrics(url: str) -> dict[str, float]:
    """Our metrics; the names of those of engine 0 without vLLM's labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = re.findall(r"^vllm_sparse:(\S+) (\S+)$", text, re.M)
    # Labels come in alphabetical order: le between vLLM's two, reason after them.
    ours = re.compile(r'(engine="0"|model_name="tiny"),?')
    return {
        ours.sub("", name).replace(",}", "}").replace("{}", ""): float(value)
        for name, value in found
    }


def test_serve_answers_with_the_options_of_the_command_line(tmp_path):
    log = tmp_path / "server.log"
    arguments = ["--attention-backend", "sparq", "--enforce-eager"]
    arguments += ["--additional-config.sparse.top_k", "0.25"]
    arguments += ["--additional-config.sparse.dense_below", "256"]
    arguments += ["--max-model-len", "1024", "--kv-cache-memory-bytes", "256M"]
    arguments += ["--served-model-name", "tiny"]
    with server(log, *arguments) as (process, url):
        wait_until_healthy(process, url, log)
        assert sparse_metrics(url)["rows_sparse_total"] == 0
        answer = complete(url, "The capital of France is the city of", 5)
        complete(url, [*range(100, 400)], 8, ignore_eos=True)
        metrics = sparse_metrics(url)
    assert "Paris" in answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 5
    output = log.read_text()
    assert "Sparse attention: SparseConfig(selector='sparq'" in output
    assert "top_k=0.25" in output
    assert process.poll() is not None
    # Two prompts, and all tokens but the first of each answer, in 30 layers.
    prompt = answer["usage"]["prompt_tokens"]
    assert metrics['rows_dense_total{reason="prefill"}'] == 30 * (prompt + 300)
    assert metrics['rows_dense_total{reason="short_context"}'] == 30 * 4
    assert metrics['rows_dense_total{reason="budget_covers_context"}'] == 0
    assert metrics["rows_sparse_total"] == 30 * 7
    # Contexts of 301 to 307 keep a quarter, in each of three KV heads.
    assert metrics["kept_tokens_sum_total"] == 30 * 3 * (4 * 76 + 3 * 77)
    assert metrics['kept_tokens_bucket_total{le="63"}'] == 0
    assert metrics['kept_tokens_bucket_total{le="95"}'] == 30 * 3 * 7
    # The last report is of the second request.
    assert metrics["sparse_row_share"] == 1
    assert metrics["kept_tokens_p50"] == metrics["kept_tokens_p99"] == 76
    assert 0.25 < metrics["kv_read_fraction"] < 0.4
    saved = metrics["kv_bytes_dense_total"] - metrics["kv_bytes_read_total"]
    assert metrics["kv_bytes_saved_total"] == saved > 0
    assert "Engine 000: sparse attention: 0.0% of 120 decode rows sparse" in output


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
    return save(Gemma3ForCausalLM(config), tmp_path_factory.mktemp("hybrid"))


@contextmanager
def engine(model: Path, in_process: bool = True, **options):
    settings = dict(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        kv_cache_memory_bytes=2**28,
        max_model_len=1024,
        max_num_batched_tokens=500,
    )
    with pytest.MonkeyPatch.context() as patch:
        if not in_process:  # ranks wait for each other spinning
            patch.setenv("OMP_NUM_THREADS", "1")
        with running_engine(in_process, **settings | options) as llm:
            yield llm


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


@pytest.mark.slow  # families with windows always run
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
        alone = live_figures(llm)
    assert len({tuple(ids) for ids in expected}) == 3
    # Prompts in all four layers; the sliding-window layers serve decode rows too.
    assert alone.rows_sparse == alone.rows_dense["unsupported_layer"] == 2 * 3 * 19
    assert alone.rows_dense["prefill"] == 4 * (700 + 129 + 300)
    assert alone.sparse_share == 0.5
    assert alone.kept_tokens.rows == 2 * 3 * 19 * 2

    # Two workers with a KV head each, in processes of their own: the sums are the same.
    with engine(
        hybrid_model,
        in_process=False,
        attention_backend="sparq",
        additional_config={"sparse": options},
        tensor_parallel_size=2,
        disable_log_stats=True,
    ) as llm:
        assert len(answers(llm)) == 3
        assert live_figures(llm) == alone

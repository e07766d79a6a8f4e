# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Real engines on a real model, each in processes of its own as vLLM starts them."""

import os

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

EXTENSION = "vllm_sparse.attention.stats.WorkerExtension"


def make_llm(model, backend: str, sparse: dict | None = None, **overrides):
    """An engine on ``backend`` with 256 MiB of KV cache and fp32 weights."""
    from vllm import LLM

    options = dict(
        model=str(model),
        dtype="float32",
        attention_backend=backend,
        max_model_len=2048,
        max_num_seqs=8,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=True,
        disable_log_stats=True,
    )
    if backend == "sparq":
        options |= {
            "additional_config": {"sparse": sparse or {}},
            "worker_extension_cls": EXTENSION,
        }
    return LLM(**(options | overrides))


def shut_down(llm) -> None:
    """End an engine's processes now; tests need the memory and the cores."""
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def model():
    from scripts.get_model import get_model

    return get_model()

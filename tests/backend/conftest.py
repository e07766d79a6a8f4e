# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Engines' worth of configuration for a driver, on every path."""

import json
import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import (  # noqa: E402
    AttentionConfig,
    CacheConfig,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)

from .driver import BF16, FP32, Driver, Shape  # noqa: E402
from .plain import plain_attention  # noqa: E402


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Config files of tiny Llamas, by shape."""

    def make(shape: Shape) -> str:
        folder = tmp_path_factory.mktemp("model")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.heads * shape.size,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.size,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "vocab_size": 128,
            "max_position_embeddings": 4096,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


def plan_as_on_gpus(common, requests, shape, ops, scratch_blocks):
    from vllm_sparse.layer.prefill_codes import plan_codes
    from vllm_sparse.layer.prefill_fa import FlashCodes, FlashRows

    if shape.fmt.quantised:
        make = partial(FlashCodes, ops)
        return plan_codes(common, requests, scratch_blocks, make)
    return [FlashRows.of(common, requests)]


@pytest.fixture(
    params=[
        "cpu",
        "gpu-on-cpu",  # the GPU's dense rows, in plain PyTorch
        pytest.param("triton-on-cpu", marks=pytest.mark.interpreted),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def drive(model_folder, request, monkeypatch):
    path = request.param
    if path == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if path == "triton-on-cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    if path in ("gpu-on-cpu", "triton-on-cpu"):
        from vllm_sparse.layer import prefill_fa
        from vllm_sparse.step import builder

        monkeypatch.setattr(prefill_fa, "attend_pages", plain_attention)
        monkeypatch.setattr(builder, "plan_dense", plan_as_on_gpus)
        monkeypatch.setattr(builder, "one_call", lambda device, fmt: not fmt.quantised)

    def make(shape: Shape, options: dict, num_requests: int, **layer_arguments):
        if path == "gpu" and shape.dtype == FP32:
            shape = replace(shape, dtype=BF16)
        if path == "triton-on-cpu":
            options = options | {"kernels": "triton"}
        model = ModelConfig(
            model=model_folder(shape), skip_tokenizer_init=True, dtype=shape.dtype
        )
        vllm_config = VllmConfig(
            model_config=model,
            cache_config=CacheConfig(),
            attention_config=AttentionConfig(backend="SPARQ"),
            compilation_config={"cudagraph_mode": "NONE"},
            additional_config={"sparse": options},
        )
        if shape.spec_tokens:
            vllm_config.speculative_config = SimpleNamespace(
                method="ngram",
                num_speculative_tokens=shape.spec_tokens,
                parallel_drafting=False,
            )
        with set_current_vllm_config(vllm_config):
            return Driver(path, shape, vllm_config, num_requests, **layer_arguments)

    return make

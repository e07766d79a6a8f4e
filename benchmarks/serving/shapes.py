# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Shapes of well-known models, for speed with dummy weights: only a config.json."""

import json
from pathlib import Path
from typing import Any

# Name: architecture, model type of transformers, what differs from its defaults.
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "LlamaForCausalLM",
        "llama",
        dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=128256,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
    ),
    # Every fourth layer attends to all; gated delta nets in the others.
    "qwen3.5-27b": (
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        dict(
            hidden_size=5120,
            intermediate_size=17408,
            num_hidden_layers=64,
            num_attention_heads=24,
            num_key_value_heads=4,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=48,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
            },
        ),
    ),
    # Every sixth layer attends to all, the others to 1,024 tokens.
    "gemma-3-12b": (
        "Gemma3ForCausalLM",
        "gemma3_text",
        dict(
            hidden_size=3840,
            intermediate_size=15360,
            num_hidden_layers=48,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
            sliding_window=1024,
        ),
    ),
    # Every second layer attends to all, the others to 128 tokens; sinks in both.
    "gpt-oss-20b": (
        "GptOssForCausalLM",
        "gpt_oss",
        dict(num_hidden_layers=24, num_local_experts=32),
    ),
}


def save_shape(name: str, folder: Path) -> Path:
    """Write ``config.json`` into a folder of its own, and return that.

    Args:
        name: one of ``SHAPES``; after a colon, how many of its layers.

    Raises:
        ValueError: it has no such number of layers.
    """
    from transformers import AutoConfig

    shape, _, layers = name.partition(":")
    architecture, model_type, values = SHAPES[shape]
    values = {"max_position_embeddings": 131072} | values
    if layers:
        if not 0 < int(layers) <= values["num_hidden_layers"]:
            raise ValueError(f"{shape} has {values['num_hidden_layers']} layers")
        values["num_hidden_layers"] = int(layers)
    config = AutoConfig.for_model(model_type, **values)
    config.architectures = [architecture]
    folder /= name.replace(":", "-")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return folder

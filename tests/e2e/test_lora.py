# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""vLLM's own LoRA over our backend, an adapter made on the spot."""

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch  # noqa: E402

from .engines import (  # noqa: E402
    DENSE,
    EXTENSION,
    SPARSE,
    configure,
    greedy,
    running,
    stats,
    tokens,
)
from .tiny import random_prompts, save_llama  # noqa: E402

pytestmark = pytest.mark.engine
RANK = 8
HIDDEN, HEAD_SIZE, HEADS, KV_HEADS, LAYERS = 128, 64, 4, 2, 3  # of tiny.py's model


def save_adapter(folder: Path, seed: int = 0) -> None:
    """Random low-rank changes of every layer's Q and K, as the peft package saves."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    outputs = {"q_proj": HEADS * HEAD_SIZE, "k_proj": KV_HEADS * HEAD_SIZE}
    weights = {}
    for layer in range(LAYERS):
        for name, size in outputs.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in {"A": (RANK, HIDDEN), "B": (size, RANK)}.items():
                drawn = torch.randn(shape, generator=generator)
                weights[f"{key}.lora_{part}.weight"] = drawn * 0.2
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(outputs),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_gives_the_tokens_of_dense_attention(tmp_path):
    from vllm.lora.request import LoRARequest

    save_llama(tmp_path / "model", KV_HEADS)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter")
    chosen = random_prompts(129, 300)
    adapter = LoRARequest("random", 1, str(tmp_path / "adapter"))

    def generate(llm):
        """Tokens without the adapter, and with it.

        Not in one batch: vLLM's LoRA for CPUs takes -1, no adapter, for the last one.
        """
        batch = [{"prompt_token_ids": p} for p in chosen]
        params = greedy(detokenize=False)
        return [
            tokens(llm.generate(batch, params, use_tqdm=False, lora_request=request))
            for request in (None, adapter)
        ]

    options = dict(
        model=str(tmp_path / "model"),
        skip_tokenizer_init=True,
        dtype="float32",
        enable_lora=True,
        max_loras=1,
        max_lora_rank=RANK,
    )
    with running(attention_backend="CPU_ATTN", **options) as llm:
        expected = generate(llm)
    with running(
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": DENSE},
        **options,
    ) as llm:
        assert generate(llm) == expected
        # Blocks of the same tokens without the adapter are not taken for those with it.
        assert generate(llm) == expected
        configure(llm, SPARSE)
        generate(llm)
        assert stats(llm)["sparse_rows"] > 0
    without, with_adapter = expected
    assert all(a != b for a, b in zip(without, with_adapter, strict=True))

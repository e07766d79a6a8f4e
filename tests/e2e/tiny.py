# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Models of a few hundred kilobytes, made on the spot with random weights."""

from pathlib import Path

import torch

VOCABULARY = 512


def save_llama(
    folder: Path, num_kv_heads: int = 2, vocabulary: int = VOCABULARY
) -> Path:
    """A Llama of three layers with twice as many query heads of size 64; fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2 * num_kv_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=64,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save(LlamaForCausalLM(config), folder)


def save(model: torch.nn.Module, folder: Path) -> Path:
    """In fp32, with weights strong enough that attention matters for a token."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.float().save_pretrained(folder)
    return folder


def random_prompts(*lengths: int, vocabulary: int = VOCABULARY) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, vocabulary, (n,), generator=generator).tolist()
        for n in lengths
    ]

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Model families in miniature: a configuration each, weights by parameter name.

A family's layers are of its own kinds (windows, chunks, states, experts), a few of each
and small, but with the head sizes, groups and states that decide how vLLM lays out
blocks. Nothing is downloaded, nothing but ``config.json`` lies on the disk.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

VOCABULARY = 512

TEXT = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=VOCABULARY,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WINDOW = 192
# Layers with a window and without, in turns.
WINDOWS = ["sliding_attention", "full_attention"] * 2
MOE = dict(
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
)
# States of real proportions: vLLM raises the block size above 128 for them.
MAMBA2 = dict(
    mamba_n_heads=8,
    mamba_d_head=64,
    mamba_n_groups=1,
    mamba_d_state=128,
    mamba_d_conv=4,
    mamba_expand=4,
    mamba_chunk_size=256,
)
DELTA = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
    layer_types=["linear_attention", "full_attention"] * 2,
)
VISION = dict(
    depth=1,
    hidden_size=64,
    intermediate_size=64,
    num_heads=2,
    out_hidden_size=128,
    patch_size=14,
)

# name: (architecture, model type of transformers, what differs from TEXT)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "llama", {}),
    "Mistral": ("MistralForCausalLM", "mistral", dict(sliding_window=None)),
    "Ministral": (
        "MinistralForCausalLM",
        "ministral",
        dict(sliding_window=WINDOW, layer_types=WINDOWS),
    ),
    "Qwen2": ("Qwen2ForCausalLM", "qwen2", dict(hidden_size=256)),
    "Qwen3": ("Qwen3ForCausalLM", "qwen3", {}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", "qwen3_moe", MOE),
    "Qwen3-Next": (
        "Qwen3NextForCausalLM",
        "qwen3_next",
        DELTA | MOE | dict(shared_expert_intermediate_size=64),
    ),
    "Qwen3.5": ("Qwen3_5ForCausalLM", "qwen3_5_text", DELTA),
    "Qwen3.5-MoE": (
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        DELTA | MOE | dict(shared_expert_intermediate_size=64),
    ),
    "Mixtral": ("MixtralForCausalLM", "mixtral", MOE | dict(sliding_window=None)),
    "Gemma 2": (
        "Gemma2ForCausalLM",
        "gemma2",
        dict(sliding_window=WINDOW, layer_types=WINDOWS, tie_word_embeddings=True),
    ),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        "gemma3_text",
        dict(sliding_window=WINDOW, layer_types=WINDOWS, tie_word_embeddings=True),
    ),
    "Gemma 3, 8 KV heads": (
        "Gemma3ForCausalLM",
        "gemma3_text",
        dict(
            sliding_window=WINDOW,
            layer_types=WINDOWS,
            num_attention_heads=8,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
    ),
    "Gemma 3n": (
        "Gemma3nForCausalLM",
        "gemma3n_text",
        dict(
            sliding_window=WINDOW,
            layer_types=WINDOWS,
            num_kv_shared_layers=2,
            tie_word_embeddings=True,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=32,
            laurel_rank=16,
            activation_sparsity_pattern=[0.0] * 4,
            intermediate_size=[256] * 4,
        ),
    ),
    "Gemma 4": (
        "Gemma4ForCausalLM",
        "gemma4_text",
        dict(
            sliding_window=WINDOW,
            layer_types=WINDOWS,
            num_kv_shared_layers=0,
            global_head_dim=128,
            num_global_key_value_heads=1,
            tie_word_embeddings=True,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=0,
        ),
    ),
    "Phi-3": ("Phi3ForCausalLM", "phi3", dict(num_key_value_heads=4, hidden_size=256)),
    "OLMo 2": ("Olmo2ForCausalLM", "olmo2", dict(hidden_size=256)),
    "OLMo 3": (
        "Olmo3ForCausalLM",
        "olmo3",
        dict(hidden_size=256, sliding_window=WINDOW, layer_types=WINDOWS),
    ),
    "GLM-4": ("Glm4ForCausalLM", "glm4", {}),
    "GLM-4-MoE": (
        "Glm4MoeForCausalLM",
        "glm4_moe",
        MOE
        | dict(
            n_routed_experts=4,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
    ),
    "Cohere 2": (
        "Cohere2ForCausalLM",
        "cohere2",
        dict(
            hidden_size=256,
            sliding_window=WINDOW,
            layer_types=WINDOWS,
            tie_word_embeddings=True,
        ),
    ),
    "Llama 4": (
        "Llama4ForCausalLM",
        "llama4_text",
        dict(
            attention_chunk_size=256,
            interleave_moe_layer_step=8,  # no layer of four has experts
            intermediate_size_mlp=256,
            no_rope_layers=[1, 1, 1, 0],
            layer_types=["chunked_attention"] * 3 + ["full_attention"],
        ),
    ),
    "Granite hybrid": (
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        MAMBA2
        | dict(
            layer_types=["mamba", "attention"] * 2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=256,
        ),
    ),
    "Nemotron-H": (
        "NemotronHForCausalLM",
        "nemotron_h",
        dict(
            layers_block_type=["mamba", "attention", "mamba", "attention"],
            mamba_num_heads=8,
            mamba_head_dim=64,
            n_groups=1,
            ssm_state_size=128,
            conv_kernel=4,
            expand=4,
            chunk_size=256,
        ),
    ),
    "Falcon-H1": (
        "FalconH1ForCausalLM",
        "falcon_h1",
        MAMBA2 | dict(mamba_d_ssm=512, projectors_bias=False),
    ),
    "LFM2": (
        "Lfm2ForCausalLM",
        "lfm2",
        dict(
            hidden_size=256,
            layer_types=["conv", "full_attention"] * 2,
            block_auto_adjust_ff_dim=False,
            conv_dim=256,
            conv_dim_out=256,
            block_dim=256,
        ),
    ),
    "MiniMax-M2": (
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        MOE
        | dict(
            rotary_dim=64,
            scoring_func="softmax",
            num_mtp_modules=0,
            qk_norm_type="per_layer",
            use_qk_norm=True,
        ),
    ),
    "Seed-OSS": ("SeedOssForCausalLM", "seed_oss", {}),
    "StableLM": ("StableLmForCausalLM", "stablelm", dict(hidden_size=256)),
    "SmolLM3": ("SmolLM3ForCausalLM", "smollm3", {}),
    "Granite": ("GraniteForCausalLM", "granite", dict(hidden_size=256)),
    "GPT-2": (
        "GPT2LMHeadModel",
        "gpt2",
        dict(hidden_size=256, n_positions=4096),
    ),
    "OPT": (
        "OPTForCausalLM",
        "opt",
        dict(hidden_size=256, ffn_dim=256, word_embed_proj_dim=256),
    ),
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        dict(vision_config=VISION, text_config=dict(hidden_size=256)),
    ),
    "Qwen3-VL": (
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        dict(vision_config=VISION | dict(deepstack_visual_indexes=[0]), text_config={}),
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "whisper",
        dict(
            d_model=256,
            hidden_size=256,
            encoder_layers=2,
            decoder_layers=4,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=256,
            decoder_ffn_dim=256,
            max_target_positions=448,
            max_source_positions=100,
            decoder_start_token_id=3,
        ),
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        "gpt_oss",
        dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=128,
            layer_types=WINDOWS,
        ),
    ),
    "MiMo-V2": (
        "MiMoV2FlashForCausalLM",
        "mimo_v2_flash",
        dict(
            sliding_window=WINDOW,
            layer_types=WINDOWS,
            hybrid_layer_pattern=[1, 0, 1, 0],
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=64,
            swa_v_head_dim=64,
            v_head_dim=64,
            sliding_window_size=WINDOW,
            moe_layer_freq=[0, 0, 0, 0],
            add_full_attention_sink_bias=False,
            add_swa_attention_sink_bias=False,
            layernorm_epsilon=1e-5,
            attention_value_scale=None,
            n_routed_experts=4,
            scoring_func="sigmoid",
            partial_rotary_factor=0.5,
            swa_rope_theta=10000,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            topk_method="noaux_tc",
            n_shared_experts=None,
        ),
    ),
    "Mistral, all windows": (
        "MistralForCausalLM",
        "mistral",
        dict(sliding_window=WINDOW),
    ),
    "BLOOM": ("BloomForCausalLM", "bloom", dict(hidden_size=256)),
}


def save_config(name: str, folder: Path) -> Path:
    """Write the family's ``config.json``."""
    from transformers import AutoConfig

    architecture, model_type, changes = FAMILIES[name]
    values = TEXT | changes
    if "text_config" in changes:
        values["text_config"] = TEXT | changes["text_config"]
    config = AutoConfig.for_model(model_type, **values).to_dict()
    # Some of what vLLM reads is not among transformers' own.
    config |= {k: v for k, v in changes.items() if k not in config}
    config["architectures"] = [architecture]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def save_whisper_processor(folder: Path) -> None:
    """A tokenizer of single bytes, and features of two seconds of sound."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        WhisperFeatureExtractor,
        WhisperProcessor,
        WhisperTokenizerFast,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["endoftext", "startoftranscript", "en", "transcribe", "notimestamps"]
    special = [f"<|{name}|>" for name in special]
    tokenizer.add_special_tokens(special)
    tokens = dict.fromkeys(["bos_token", "eos_token", "unk_token"], special[0])
    WhisperProcessor(
        WhisperFeatureExtractor(chunk_length=2),
        WhisperTokenizerFast(tokenizer_object=tokenizer, **tokens),
    ).save_pretrained(folder)


@register_model_loader("by_name")
class NamedWeights(DummyModelLoader):
    """``load_format``: weights that are a function of the parameter's name."""

    def load_weights(self, model: torch.nn.Module, model_config) -> None:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(_values(name, parameter))


class InWorker:
    """Worker extension whose import registers the loader in a worker process."""


def _values(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Strong enough that attention matters for a token."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(parameter.shape, generator=generator)
    last = name.rpartition(".")[2]
    if last in ("A", "A_log"):  # decay of a state
        decay = noise.abs() * 0.5 + 0.5
        return -decay if last == "A" else decay.log()
    if parameter.dim() > 1:
        sharp = any(part in name for part in ("q_proj", "k_proj", "qkv", "c_attn"))
        return (0.3 if sharp else 0.15) * noise
    if "bias" in last:
        return 0.05 * noise
    return (2 if "q_norm" in name or "k_norm" in name else 1) + 0.1 * noise

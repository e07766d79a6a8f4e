# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What lossless speculation cannot be had with, in words that say what to change."""

from collections.abc import Iterator
from importlib.metadata import entry_points

from ...config import SparseConfig


def refusals(vllm_config, config: SparseConfig) -> Iterator[str]:
    """Reasons why an engine so configured cannot speculate.

    Args:
        config: our options of it.
    """
    if config.draft_weights == "fp8":
        yield from _refusals_of_fp8(vllm_config)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        yield "it speculates itself, leave --speculative-config out"
    if model.runner_type != "generate":
        yield f"models that do not generate ({model.runner_type}) have nothing to draft"
    if model.is_encoder_decoder:
        yield "encoder-decoder models are not served"
    if model.is_hybrid or model.is_attention_free:
        yield (
            "models with Mamba or linear attention are not served (drafts would change "
            "their states)"
        )
    multimodal = model.multimodal_config
    if multimodal is not None and not multimodal.language_model_only:
        yield "images and sounds are not served, for text add --language-model-only"
    if model.enable_prompt_embeds:
        yield "prompt embeddings are not served, remove --enable-prompt-embeds"
    if model.uses_mrope:
        yield "models with M-RoPE positions are not served"
    if model.logits_processors:
        yield "further logits processors are not served, remove --logits-processors"
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism is not served, remove --pipeline-parallel-size"
    if parallel.data_parallel_size > 1:
        yield "data parallelism is not served, start an engine for each replica"
    if parallel.decode_context_parallel_size > 1:
        yield "context parallelism is not served, remove --decode-context-parallel-size"
    if parallel.prefill_context_parallel_size > 1:
        yield (
            "context parallelism is not served, remove --prefill-context-parallel-size"
        )
    if parallel.enable_eplb:
        yield "expert load balancing is not served, remove --enable-eplb"
    if parallel.use_ubatching:
        yield "batches in two halves are not served, remove --enable-dbo"
    plugins = entry_points(group="vllm.logits_processors")
    if plugins and _on_cpu():
        # vLLM would leave them out without a word.
        yield f"uninstall the logits processors {', '.join(sorted(plugins.names))}"
    if vllm_config.lora_config is not None and not _on_cpu():
        yield "LoRA adapters are served on CPUs only, remove --enable-lora"
    if not _on_cpu() and not vllm_config.use_v2_model_runner:
        yield (
            "on GPUs it needs vLLM's V2 model runner, which VLLM_USE_V2_MODEL_RUNNER=0 "
            "or a feature that the log names turns off"
        )


def _refusals_of_fp8(vllm_config) -> Iterator[str]:
    """Where draft_weights.py cannot copy weights, or copies would not be used."""
    from vllm import envs
    from vllm.model_executor.layers.quantization.utils import w8a8_utils

    if _on_cpu():
        yield "draft_weights = 'fp8' is for GPUs, leave it out"
        return
    if vllm_config.model_config.dtype.itemsize != 2:
        yield "draft_weights = 'fp8' needs --dtype bfloat16 or float16"
    if not w8a8_utils.cutlass_fp8_supported():
        yield "draft_weights = 'fp8' needs a GPU of compute capability 8.9 or newer"
    offload = vllm_config.offload_config
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
        yield "draft_weights = 'fp8' copies weights on the GPU, remove --cpu-offload-gb"
    if vllm_config.kernel_config.linear_backend != "auto":
        yield "draft_weights = 'fp8' has a kernel of its own, remove --linear-backend"
    if envs.VLLM_BATCH_INVARIANT:
        yield "draft_weights = 'fp8' cannot be had with VLLM_BATCH_INVARIANT"


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Why a layer cannot be served, in words that say what to change."""

from collections.abc import Iterator

import torch
from vllm.platforms.interface import DeviceCapability

from ..cache.layout import BLOCK_SIZE

HEAD_SIZES = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = DeviceCapability(8, 0)


def refusal(layer, name: str, capability: DeviceCapability | None) -> str | None:
    """Why the backend ``name`` cannot serve ``layer``; None where it can.

    What belongs to the model or the GPU comes alone, as nothing else would help;
    otherwise all options that would have to change are named.

    Args:
        layer: vLLM's ``AttentionSelectorConfig`` of a decoder layer without a window.
        capability: the GPU's; None on CPUs.
    """
    inherent = next(_of_the_model(layer, capability), None)
    if inherent is not None:
        return (
            f"--attention-backend {name} does not serve {inherent}: leave "
            "--attention-backend out"
        )
    options = list(_of_the_options(layer, capability))
    if options:
        return (
            f"--attention-backend {name} cannot serve this engine: "
            f"{'; '.join(options)}. Or leave --attention-backend out"
        )
    return None


def _of_the_model(layer, capability: DeviceCapability | None) -> Iterator[str]:
    if layer.use_mla:
        yield "models with multi-head latent attention (MLA)"
    if layer.use_sparse:
        yield "models with a sparse attention of their own (indexers)"
    if layer.has_sink and not _serves_sinks(layer, capability):
        yield "models with attention sinks on this GPU (FlashAttention 3 prefills them)"
    if layer.use_rswa:
        yield "models with reference sliding windows (R-SWA)"
    if layer.use_per_head_quant_scales:
        yield "checkpoints with a scale for every head of a quantised cache"
    if layer.head_size not in HEAD_SIZES:
        yield (
            f"models with head size {layer.head_size}, which is not one of "
            f"{list(HEAD_SIZES)}"
        )
    if capability is not None and capability < LEAST_CAPABILITY:
        yield (
            f"GPUs of compute capability {capability.as_version_str()}, which is below "
            "8.0 (vLLM's FlashAttention, which prefills, needs that)"
        )


def _serves_sinks(layer, capability: DeviceCapability | None) -> bool:
    if capability is None:
        return True
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version(head_size=layer.head_size, has_sinks=True)
    return version == 3


def _of_the_options(layer, capability: DeviceCapability | None) -> Iterator[str]:
    if capability is not None and layer.dtype == torch.float32:
        yield (
            "float32 is served on the CPU only (FlashAttention prefills in 16 bits), "
            "use --dtype bfloat16 or float16"
        )
    elif layer.dtype not in DTYPES:
        yield f"{layer.dtype} is not served, use --dtype bfloat16"
    if layer.kv_cache_dtype not in (None, "auto"):
        yield (
            f"--kv-cache-dtype must be auto, not {layer.kv_cache_dtype} (for a "
            "quantised cache: --additional-config.sparse.kv_format k8v4)"
        )
    if layer.block_size is not None and layer.block_size % BLOCK_SIZE:
        yield (
            f"--block-size must be a multiple of {BLOCK_SIZE}, not {layer.block_size}"
        )
    if layer.use_mm_prefix:
        yield (
            "the tokens of an image attend to each other in both directions, which is "
            "not served: for text alone add --language-model-only"
        )
    if layer.use_non_causal:
        yield "attention must be causal, remove use_non_causal from --attention-config"
    if layer.use_pcp or layer.use_dcp:
        option = f"--{'prefill' if layer.use_pcp else 'decode'}-context-parallel-size"
        yield f"context parallelism is not served, remove {option}"
    if layer.use_batch_invariant:
        yield "batch invariance is not promised, unset VLLM_BATCH_INVARIANT"
    if layer.use_adaptive_verification:
        yield (
            "adaptive verification is not served, remove it from --speculative-config"
        )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How a builder's layers are served."""

from dataclasses import replace

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImplBase, AttentionType
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

from ..config import SparseConfig
from ..layer.impl import SparseAttentionImpl
from ..stats.counters import LayerKinds


def resolved(config: SparseConfig, builder) -> SparseConfig:
    """Options as the builder's layers take them."""
    if isinstance(builder.kv_cache_spec, ChunkedLocalAttentionSpec):
        # Rows are chunks here, and vLLM does not say which belong to prompts.
        config = replace(config, selector="dense", top_p=None)
    return config.resolve(
        builder.kv_cache_spec.head_size,
        builder.num_heads // builder.num_kv_heads,
        builder.device.type,
        normed=any(impl.normed for impl in _impls(builder)),
    )


def _impls(builder) -> list[SparseAttentionImpl]:
    layers = builder.vllm_config.compilation_config.static_forward_context
    impls = (getattr(layers.get(name), "impl", None) for name in builder.layer_names)
    return [impl for impl in impls if isinstance(impl, SparseAttentionImpl)]


def layer_kinds(builder) -> LayerKinds:
    """Numbers of layers that choose tokens, and of those that do not."""
    names, config = _served(builder), builder.config
    choosing, first = len(names), config.dense_layers
    if builder.phase in builder.method.dense_phases:
        choosing = 0
    elif first:
        choosing = sum(extract_layer_index(name) >= first for name in names)
    return LayerKinds(choosing, len(names) - choosing, _unsupported(builder))


def is_draft(vllm_config, name: str) -> bool:
    """Whether a layer is a draft model's, which the model runner or we have marked."""
    layers = vllm_config.compilation_config.static_forward_context
    return getattr(layers.get(name), "is_draft_layer", False)


def _served(builder) -> list[str]:
    """The builder's layers that its rows pass through.

    vLLM's V1 runner puts a draft model's layers among the target's, but does not run
    them in the target's steps: the drafter has builders of its own.
    """
    config = builder.vllm_config
    if builder.drafter or config.use_v2_model_runner:
        return builder.layer_names
    return [name for name in builder.layer_names if not is_draft(config, name)]


def _unsupported(builder) -> int:
    """Attention layers that vLLM's own backend serves.

    They have the same rows as ours, but no builder of ours sees them: the builder that
    has the model's first layer of ours counts them. Those of a draft model are not
    counted: the target's rows do not pass through them.
    """
    if builder.drafter:
        return 0
    layers = builder.vllm_config.compilation_config.static_forward_context
    impls = {name: getattr(layer, "impl", None) for name, layer in layers.items()}
    ours = [n for n, i in impls.items() if isinstance(i, SparseAttentionImpl)]
    if not ours or ours[0] not in builder.layer_names:
        return 0
    decoding = (AttentionType.DECODER, AttentionType.ENCODER_DECODER)
    return sum(
        isinstance(impl, AttentionImplBase)
        and name not in ours
        and not is_draft(builder.vllm_config, name)
        and getattr(layers[name], "attn_type", None) in decoding
        for name, impl in impls.items()
    )

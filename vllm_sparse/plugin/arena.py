# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Two kinds of blocks for layers whose old lines leave anchors.

To vLLM such a layer is one with a sliding window, in which new lines lie, and beside it
stands a layer with full attention that stores one state for LINE_GROUP tokens: the
anchors'. So vLLM's own managers free what old lines leave, count what a request needs,
and find what the prefix cache still has of both.
"""

from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.transformers_utils.config import get_hf_file_to_dict
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    replace_as,
)

from ..anchor_config import FILE, AnchorConfig
from ..cache.layout import BLOCK_SIZE
from ..cache.lines import LINE_GROUP, NEAR_BLOCKS
from ..config import SparseConfigError
from ..layer.impl import SparseAttentionImpl
from ..step.anchors import AnchorStep
from .line_blocks import ArenaSpec, LinesSpec

SUFFIX = ".anchors"
BACKEND = "--attention-backend anchor"


class ArenaBuilder(AttentionMetadataBuilder):
    """Passes a step's blocks of anchors on; lines' builder does the rest."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold = None

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self.step: AnchorStep = layers[layer_names[0]].step

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        self.step.give_anchors(common_attn_metadata.block_table_tensor)


class ArenaBackend(AttentionBackend):
    """Of layers that only store."""

    @staticmethod
    def get_name() -> str:
        return "ANCHOR_ARENA"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("anchors are stored and read by the lines' layer")

    @staticmethod
    def get_builder_cls():
        return ArenaBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        # Without a spec vLLM asks which size the model's blocks should have: lines'.
        # With the layer's own it asks in what pieces kernels take them.
        return [BLOCK_SIZE * (1 if kv_cache_spec is None else LINE_GROUP)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)


class AnchorCache(AttentionLayerBase):
    """Where a layer's anchors lie: blocks as the layer's own, LINE_GROUP times as many
    tokens to each."""

    def __init__(self, layer, rules: AnchorConfig, step: AnchorStep) -> None:
        self.layer, self.rules, self.step = layer, rules, step
        self.spec_of_layer = layer.get_kv_cache_spec
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ArenaBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ArenaSpec:
        # With room for marks, as the layer's own.
        backend = self.layer.get_attn_backend()
        spec = backend.customize_spec(self.spec_of_layer(vllm_config))
        size = spec.block_size * LINE_GROUP
        changes = dict(block_size=size, tokens_per_state=LINE_GROUP)
        return replace_as(spec, ArenaSpec, **changes)

    def lines_spec(self, vllm_config: VllmConfig) -> LinesSpec:
        """The layer's own."""
        spec = self.spec_of_layer(vllm_config)
        drop = ("sliding_window", "attention_chunk_size", "non_causal")
        window = (NEAR_BLOCKS + 1) * BLOCK_SIZE
        return replace_as(spec, LinesSpec, drop=drop, sliding_window=window)


def rules_of(model: str, revision: str | None) -> AnchorConfig:
    """What a model says of its anchors.

    Raises:
        SparseConfigError: it was not trained with any, or with other rules.
    """
    found = get_hf_file_to_dict(FILE, model, revision)
    if found is None:
        raise SparseConfigError(
            f"{BACKEND} serves models that were trained with anchors, and {model} has "
            f"no {FILE}: give a folder that `python -m vllm_sparse.train merge` has "
            "made of an anchor checkpoint, or choose --attention-backend sparq"
        )
    try:
        return AnchorConfig.from_json(found)
    except (KeyError, ValueError) as error:
        raise SparseConfigError(f"{Path(model) / FILE}: {error}") from error


def check_anchors(vllm_config: VllmConfig) -> None:
    """Raise where an engine cannot serve anchors; asked before models are made.

    Raises:
        SparseConfigError: saying what to change.
    """
    model = vllm_config.model_config
    if model is None:
        return
    rules_of(model.model, model.revision)
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    speculation = vllm_config.speculative_config
    problems = {
        "remove --enable-prompt-embeds, as lines end with tokens": (
            model.enable_prompt_embeds
        ),
        "remove --disable-hybrid-kv-cache-manager, as lines are given back": (
            scheduler.disable_hybrid_kv_cache_manager
        ),
        "remove --pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "remove --enable-dbo and --ubatch-size": parallel.use_ubatching,
        "choose ngram, or remove --speculative-config": (
            speculation is not None and speculation.method not in ("ngram", "suffix")
        ),
    }
    found = [change for change, wrong in problems.items() if wrong]
    if found:
        raise SparseConfigError(f"{BACKEND}: {'; '.join(found)}")


def add_arena(vllm_config: VllmConfig) -> None:
    """Give every layer a second one for its anchors. Idempotent.

    Raises:
        SparseConfigError: a layer of the model cannot leave anchors.
    """
    model = vllm_config.model_config
    rules = rules_of(model.model, model.revision)
    layers = vllm_config.compilation_config.static_forward_context
    attention = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, AttentionLayerBase)
    }
    if any(isinstance(layer, AnchorCache) for layer in attention.values()):
        return
    check_anchors(vllm_config)  # vLLM may have changed options since
    for name, layer in attention.items():
        _check(name, layer, vllm_config)
    if len({layer.get_kv_cache_spec(vllm_config) for layer in attention.values()}) > 1:
        raise SparseConfigError(
            f"{BACKEND} serves models whose layers are all alike, and KV heads of this "
            "one's differ: leave --attention-backend out"
        )
    if max(rules.line_ends, default=0) >= model.get_vocab_size():
        raise SparseConfigError(
            f"{FILE} names token {max(rules.line_ends)}, which the model has not: it "
            "belongs to another tokenizer"
        )
    by_number = {extract_layer_index(name): layer for name, layer in attention.items()}
    missing = {*rules.lower_layers, *rules.lower_layers.values()} - by_number.keys()
    if missing:
        raise SparseConfigError(
            f"{FILE} names layers {sorted(missing)}, which the model has not"
        )
    step = AnchorStep()
    for name, layer in attention.items():
        arena = AnchorCache(layer, rules, step)
        layers[name + SUFFIX] = arena
        layer.get_kv_cache_spec = arena.lines_spec
        lower = rules.lower_layers.get(extract_layer_index(name))
        if lower is not None:
            layer.impl.method_of(layer).lower = by_number[lower]


def _check(name: str, layer, vllm_config: VllmConfig) -> None:
    impl = getattr(layer, "impl", None)
    ours = isinstance(impl, SparseAttentionImpl) and impl.config.selector == "anchor"
    if not ours or type(layer.get_kv_cache_spec(vllm_config)) is not FullAttentionSpec:
        problem = "is no full attention of that backend"
    elif not impl.owns_cache:
        problem = "shares another layer's cache"
    elif impl.sinks is not None:
        problem = "has attention sinks"
    else:
        return
    raise SparseConfigError(
        f"{BACKEND} serves models whose layers all have full attention, and {name} "
        f"{problem}: leave --attention-backend out"
    )

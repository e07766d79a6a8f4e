# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the metadata builders of all devices share: options and budgets."""

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionImplBase,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import AttentionSpec

from ..cache.formats import ROWS, KvFormat
from ..config import SparseConfig, SparseConfigError
from ..selectors.base import tokens_kept
from .counters import KeptHistograms, LayerKinds
from .impl import SparseAttentionImpl
from .stats import recorder

M = TypeVar("M", bound=AttentionMetadata)


class SparseMetadataBuilder(AttentionMetadataBuilder[M], Generic[M]):
    """Runs once per step and group of layers."""

    # Options of the backend that differ from SparseConfig's defaults.
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Draft tokens under verification decode too: one row per position.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.num_kv_heads = kv_cache_spec.num_kv_heads
        self.num_heads = get_num_attention_heads_from_layers(
            vllm_config, layer_names
        ) or vllm_config.model_config.get_num_attention_heads(
            vllm_config.parallel_config
        )
        self.kept = KeptHistograms(layer_names, self.num_kv_heads, device)
        recorder.histograms.add(self.kept)
        self._unsupported_layers = self._count_unsupported()
        self.configure(
            SparseConfig.from_additional_config(
                vllm_config.additional_config, self.defaults
            )
        )

    def configure(self, config: SparseConfig) -> None:
        """Take other options: at construction, or between requests in evaluation."""
        self.config = self.resolved(config)
        self.fmt = self._format(self.config)
        self.layers = self._layer_kinds()

    def _layer_kinds(self) -> LayerKinds:
        choosing, first = len(self.layer_names), self.config.dense_layers
        if self.config.selector == "dense":
            choosing = 0
        elif first:
            choosing = sum(extract_layer_index(n) >= first for n in self.layer_names)
        return LayerKinds(
            choosing, len(self.layer_names) - choosing, self._unsupported_layers
        )

    def _count_unsupported(self) -> int:
        """Attention layers that vLLM's own backend serves.

        They have the same rows as ours, but no builder of ours sees them: the builder
        that has the model's first layer of ours counts them.
        """
        layers = self.vllm_config.compilation_config.static_forward_context
        impls = {name: getattr(layer, "impl", None) for name, layer in layers.items()}
        ours = [n for n, i in impls.items() if isinstance(i, SparseAttentionImpl)]
        if not ours or ours[0] not in self.layer_names:
            return 0
        decoding = (AttentionType.DECODER, AttentionType.ENCODER_DECODER)
        return sum(
            isinstance(impl, AttentionImplBase)
            and name not in ours
            and getattr(layers[name], "attn_type", None) in decoding
            for name, impl in impls.items()
        )

    def check(self, config: SparseConfig) -> None:
        """Raise if the running engine cannot take these options; change nothing.

        Raises:
            SparseConfigError: naming what is fixed.
        """
        new = self.resolved(config)
        fixed = ["kernels", "kv_format", "kv_group_size"]
        if self._format(new) != self.fmt:
            fixed.append("mean_value")  # means have their place in quantised blocks
        for name in fixed:
            if getattr(new, name) != getattr(self.config, name):
                raise SparseConfigError(
                    f"sparse.{name} = {getattr(new, name)!r} cannot replace "
                    f"{getattr(self.config, name)!r} in a running engine: start another"
                )

    def _format(self, config: SparseConfig) -> KvFormat:
        group = self.num_heads // self.num_kv_heads
        return config.format(self.kv_cache_spec.head_size, group)

    def resolved(self, config: SparseConfig) -> SparseConfig:
        return config.resolve(
            self.kv_cache_spec.head_size,
            self.num_heads // self.num_kv_heads,
            self.device.type,
        )


def budget_for(seq_len: int, config: SparseConfig, fmt: KvFormat = ROWS) -> int:
    """Tokens to keep of a context of ``seq_len``; -1: the row is dense.

    Args:
        config: resolved.
    """
    if config.selector == "dense" or seq_len < config.dense_below:
        return -1
    forced = (config.local_window, config.sink_tokens, fmt)
    kept = tokens_kept(seq_len, config.budget(seq_len), *forced)
    return -1 if kept >= seq_len else kept

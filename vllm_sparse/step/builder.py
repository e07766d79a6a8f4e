# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the metadata builders of all devices share: options and budgets."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionImplBase,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import AttentionSpec, ChunkedLocalAttentionSpec

from ..cache.formats import ROWS, KvFormat
from ..cache.layout import BLOCK_SIZE
from ..config import SparseConfig, SparseConfigError
from ..layer.impl import SparseAttentionImpl
from ..methods.base import tokens_kept
from ..plugin.prompts import in_prompts
from ..plugin.versions import init_logger
from ..stats.counters import KeptHistograms, LayerKinds
from ..stats.recorder import recorder

logger = init_logger(__name__)
M = TypeVar("M", bound=AttentionMetadata)


class SparseMetadataBuilder(AttentionMetadataBuilder[M], Generic[M]):
    """Runs once per step and group of layers."""

    # The backend's name, and its options that differ from SparseConfig's defaults.
    backend: ClassVar[str] = "sparq"
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
        self._report_padding()
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

    def _report_padding(self) -> None:
        spec = self.kv_cache_spec
        if spec.page_size_bytes > spec.unpadded_page_size_bytes:
            logger.warning_once(
                "Blocks of %d bytes are padded to %d, as other layers of this model "
                "have larger ones: the KV cache holds no more tokens for being small.",
                spec.unpadded_page_size_bytes,
                spec.page_size_bytes,
            )

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

    def checked(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """One step's metadata, which we understand.

        Raises:
            NotImplementedError: a request of it attends in both directions.
        """
        if common.causal is not True:
            raise NotImplementedError(
                f"--attention-backend {self.backend} serves causal attention only, and "
                "this model asks for both directions: leave --attention-backend out"
            )
        return common

    def prefilling(self, common: CommonAttentionMetadata) -> torch.Tensor:
        """Which requests are in their prompts: [num_reqs] bool on the host.

        vLLM leaves it out where it cuts a batch anew (chunked local attention, two
        halves of a batch in turns, some draft models). All of them then: dense is
        never wrong.
        """
        known = in_prompts()
        if known is None:
            known = common.is_prefilling
        if known is not None:
            return known
        if self.config.selector != "dense":
            logger.warning_once(
                "vLLM does not say which rows are prompts: %d layers, from %s on, are "
                "served densely.",
                len(self.layer_names),
                self.layer_names[0],
            )
        return torch.ones(common.num_reqs, dtype=torch.bool)

    def storing(
        self,
        common: CommonAttentionMetadata,
        num_reqs: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Block tables for storing by length: null where a request stores nothing.

        An idle step of data parallelism has live tables, and no slots.

        Args:
            out: [>= num_reqs, max_blocks] int32, written; None: a new tensor.
        """
        last = (common.query_start_loc[1 : num_reqs + 1] - 1).clamp_(min=0)
        stores = common.slot_mapping[last.long()] >= 0
        table = common.block_table_tensor[:num_reqs]
        out = torch.empty_like(table) if out is None else out[:num_reqs]
        return torch.mul(table, stores[:, None], out=out)

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
        if isinstance(self.kv_cache_spec, ChunkedLocalAttentionSpec):
            # Rows are chunks here, and vLLM does not say which belong to prompts.
            config = replace(config, selector="dense", top_p=None)
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


def budget_table(last: int, config: SparseConfig, fmt: KvFormat = ROWS) -> torch.Tensor:
    """:func:`budget_for` of the lengths 1 to ``last``, at once: [last + 1] int32.

    Entry 0 is a padding row's.
    """
    lens = torch.arange(last + 1)
    if config.selector == "dense":
        return torch.full_like(lens, -1, dtype=torch.int32)
    most = config.top_k if config.top_p is None else config.max_tokens
    if isinstance(most, float):
        floor = config.local_window + config.sink_tokens
        if config.top_p is not None:
            floor = max(floor, config.min_tokens)
        budgets = (most * lens.double()).ceil().long().clamp(min=floor)
    else:
        budgets = torch.full_like(lens, most)
    if config.top_p is not None:
        adapts = config.min_tokens < lens
        budgets = torch.where(adapts, budgets.minimum(lens - 1), budgets)
    quantised = int(fmt.quantised)
    sealed = (lens - quantised).div(BLOCK_SIZE, rounding_mode="floor") * BLOCK_SIZE
    forced = config.sink_tokens + (lens - sealed).clamp(min=config.local_window)
    dense = budgets.maximum(forced) >= lens
    dense |= (lens - config.local_window).minimum(sealed) <= config.sink_tokens
    dense |= lens < config.dense_below
    dense[0] = True
    return budgets.maximum(forced).masked_fill(dense, -1).int()

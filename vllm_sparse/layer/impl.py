# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""One attention layer on any device: store and seal, rows that decode, other rows.

Nothing depends on values, so that CUDA graphs may hold it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar
from weakref import ref

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from .. import ops
from ..config import SparseConfig, SparseConfigError
from ..methods import METHODS, LayerShape, Method
from ..methods.dense import Dense
from ..step.metadata import SparseMetadata
from .checks import check_eviction, check_format, check_sinks, refuse_unsupported
from .holders import remember_holders


class SparseAttentionImpl(AttentionImpl[SparseMetadata]):
    """Serves one decoder layer with full attention."""

    # The backend's name, and its options that differ from SparseConfig's defaults.
    backend: ClassVar[str] = "sparq"
    defaults: ClassVar[Mapping[str, Any]] = {}
    # As of SparseConfig.for_model; told when all layers are made (plugin/served.py).
    normed: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unsupported,
    ) -> None:
        unsupported |= {"alibi_slopes": alibi_slopes, "sliding_window": sliding_window}
        refuse_unsupported(self.backend, unsupported)
        # A reference to the module that holds the layer, once it does.
        self.holder: ref[torch.nn.Module] | None = None
        remember_holders()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.scale = head_size, float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        vllm_config = get_current_vllm_config()
        options = SparseConfig.from_additional_config(
            vllm_config.additional_config, self.defaults
        )
        device = torch.device(current_platform.device_type)
        if device.type == "cuda":  # tensors name their device by number
            device = torch.device("cuda", torch.cuda.current_device())
        # The model's own, of any dtype, and where the ops read them.
        self.sinks = sinks
        if sinks is not None:
            sinks = torch.zeros(num_heads, dtype=torch.float32, device=device)
        self.shape = LayerShape(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            dtype=vllm_config.model_config.dtype,
            scale=self.scale,
            soft_cap=float(logits_soft_cap or 0.0),
            fmt=options.format(head_size, num_heads // num_kv_heads),
            flash_attention=_flash_attention(
                head_size, logits_soft_cap, sinks is not None
            ),
            sinks=sinks,
        )
        self.ops = ops.bound(options.kernels, device)
        check_sinks(self)
        if self.fmt.quantised:
            check_format(self, options, vllm_config)
        # The longest context that prefills in one step, with the step's tokens.
        self.scratch_tokens = (
            vllm_config.model_config.max_model_len
            + vllm_config.scheduler_config.max_num_batched_tokens
        )
        self.configure(options)
        check_eviction(self, vllm_config)

    @property
    def fmt(self):
        return self.shape.fmt

    @property
    def eviction(self):
        return self._chosen.eviction(self.config)

    @property
    def summary(self) -> str:
        """Options and what serves them, for the log."""
        prefill = "vLLM's CPU kernel"
        if self.shape.flash_attention is not None:
            prefill = f"FlashAttention {self.shape.flash_attention}"
        kernels = self.ops.kernels
        if kernels == "cpu":
            kernels += f" ({ops.cpu_isa()})"
        return f"{self.config}, kernels: {kernels}, prefill: {prefill}"

    def configure(self, config: SparseConfig) -> None:
        """Take other options: at construction, or between requests in evaluation.

        Raises:
            SparseConfigError: when they do not fit the layer; nothing is changed then.
        """
        self.config = self.check(config)
        parts = (self.config, self.shape, self.ops)
        self._dense, self._chosen = Dense(*parts), METHODS[config.selector](*parts)
        # What serves rows that decode, once the layer's name is known.
        self.method: Method | None = None

    def check(self, config: SparseConfig) -> SparseConfig:
        """``config`` resolved for the layer.

        Raises:
            SparseConfigError: when it does not fit the layer's shape or device.
        """
        device = current_platform.device_type
        if device not in METHODS[config.selector].devices:
            raise SparseConfigError(
                f"sparse.selector = {config.selector!r} is not served on GPUs: leave "
                "it out, or choose another --attention-backend (streaming in place of "
                "window). Example: --attention-backend sparq"
            )
        if self.shape.sinks is not None:
            if config.mean_value is True:
                raise SparseConfigError(
                    "sparse.mean_value is not served for models with attention sinks: "
                    "leave it out"
                )
            config = replace(config, mean_value=False)
        group = self.shape.num_queries_per_kv
        return config.resolve(self.head_size, group, device, self.normed)

    def method_of(self, layer: torch.nn.Module) -> Method:
        """What serves the layer's rows that decode."""
        if self.method is None:
            first = self.config.dense_layers
            dense = first > 0 and extract_layer_index(layer.layer_name) < first
            # Chunked local attention: rows are chunks, some of them of prompts.
            dense |= getattr(layer, "attention_chunk_size", None) is not None
            self.method = self._dense if dense else self._chosen
        return self.method

    @property
    def owns_cache(self) -> bool:
        """False where the layer reads another layer's cache: it must not store."""
        return self.kv_sharing_target_layer_name is None

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: SparseMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step.

        Args:
            query: [num_tokens, num_heads, head_size].
            key, value: [num_tokens, num_kv_heads, head_size], stored here; None where
                the layer reads another layer's cache.
            kv_cache: [num_blocks, num_kv_heads, BLOCK_SIZE, C].
            attn_metadata: None while vLLM measures its memory.
            output: [num_tokens, num_heads, head_size], written.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                f"--attention-backend {self.backend} does not support fused output "
                "quantisation; turn it off with -cc.pass_config.fuse_attn_quant=false"
            )
        meta, shape = attn_metadata, self.shape
        if meta is None:
            if self.fmt.quantised:
                self._show_scratch(query)
            return output.fill_(0)
        if not self.owns_cache:
            key = value = None
        if self.sinks is not None:
            # In every step: weights may be changed in place at any time.
            shape.sinks.copy_(self.sinks)
        saved = [rows.save(kv_cache, shape) for rows in meta.prefill]
        if self.owns_cache:
            self.ops.store(
                key,
                value,
                kv_cache,
                meta.slot_mapping,
                meta.block_table,
                meta.seq_lens,
                meta.query_start_loc,
                self.fmt,
            )
        dense = list(zip(meta.prefill, saved))
        method = self.method_of(layer)
        if self.owns_cache:
            method.seal(layer.layer_name, kv_cache, meta, key, value)
        if meta.phase in method.dense_phases:
            method = self._dense
        if meta.together is not None and method is self._dense:
            dense.append((meta.together, None))
        else:
            first = 0
            for rows in meta.decode:
                part = slice(first, first + rows.num_rows)
                method.attend(
                    query[part], kv_cache, rows, output[part], layer.layer_name
                )
                first = part.stop
        for rows, tails in dense:
            part = rows.tokens
            new = (None, None) if key is None else (key[part], value[part])
            rows.attend(query[part], *new, tails, kv_cache, shape, output[part])
        return output

    def _show_scratch(self, like: torch.Tensor) -> None:
        """Hold what prefill will, while vLLM measures how much memory is left."""
        like.new_empty(2, self.scratch_tokens, self.num_kv_heads, self.head_size)


def _flash_attention(
    head_size: int, soft_cap: float | None, has_sinks: bool
) -> int | None:
    if not current_platform.is_cuda():
        return None
    from .prefill_fa import flash_attention_version

    return flash_attention_version(head_size, soft_cap or 0.0, has_sinks)

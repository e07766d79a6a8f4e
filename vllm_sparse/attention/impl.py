# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""One attention layer: store, seal, then sparse decode rows and dense prefill rows."""

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from .. import ops
from ..compat.vllm import init_logger
from ..config import SparseConfig
from ..selectors import SELECTORS, DecodeRows, LayerShape, Selector
from .metadata import SparseMetadata
from .prefill import prefill
from .stats import recorder

logger = init_logger(__name__)


class SparseAttentionImpl(AttentionImpl[SparseMetadata]):
    """Serves one decoder layer with full attention."""

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
        **unsupported,
    ) -> None:
        if alibi_slopes is not None:
            unsupported["alibi_slopes"] = alibi_slopes
        if sliding_window is not None:
            unsupported["sliding_window"] = sliding_window
        unsupported = {k: v for k, v in unsupported.items() if v is not None}
        if unsupported:
            raise NotImplementedError(
                f"--attention-backend sparq does not support {sorted(unsupported)} of "
                "this model's attention; leave --attention-backend out"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        vllm_config = get_current_vllm_config()
        self.shape = LayerShape(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            dtype=vllm_config.model_config.dtype,
            scale=self.scale,
            soft_cap=float(logits_soft_cap or 0.0),
        )
        ops.load()
        self.configure(
            SparseConfig.from_additional_config(vllm_config.additional_config)
        )
        logger.info_once(
            "Sparse attention: %s, CPU kernels: %s", self.config, ops.cpu_isa()
        )

    def configure(self, config: SparseConfig) -> None:
        """Take other options: at construction, or between requests in evaluation.

        Raises:
            SparseConfigError: when they do not fit the layer's shape.
        """
        self.config = config.resolve(self.head_size, self.shape.num_queries_per_kv)
        self.selector: Selector | None = None
        if self.config.selector != "dense":
            self.selector = SELECTORS[self.config.selector](self.config, self.shape)
        self._dense_layer: bool | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        ops.store_kv(key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SparseMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step.

        Args:
            query: [num_tokens, num_heads, head_size].
            key, value: [num_tokens, num_kv_heads, head_size], already stored; None
                where the layer reads another layer's cache.
            kv_cache: [num_blocks, num_kv_heads, BLOCK_SIZE, C].
            attn_metadata: None while vLLM warms up.
            output: [num_tokens, num_heads, head_size], written.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantisation is not supported")
        if attn_metadata is None:
            return output
        meta = attn_metadata
        seal = meta.seal
        if seal is not None and self.kv_sharing_target_layer_name is None:
            ops.seal_blocks(
                kv_cache,
                seal.block_ids,
                seal.prev_block_ids,
                seal.block_index,
                self.head_size,
            )
        split, end = meta.num_decode_tokens, meta.num_actual_tokens
        if meta.decode is not None:
            self._decode(layer, query[:split], kv_cache, meta.decode, output[:split])
        if meta.prefill is not None:
            owner = self.kv_sharing_target_layer_name is None
            prefill(
                query[split:end],
                key[split:end] if owner else None,
                value[split:end] if owner else None,
                kv_cache,
                meta.prefill,
                self.shape,
                output[split:end],
            )
        return output

    def _decode(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: DecodeRows,
        out: torch.Tensor,
    ) -> None:
        if self._dense_layer is None:
            first = self.config.dense_layers
            self._dense_layer = (
                first > 0 and extract_layer_index(layer.layer_name) < first
            )
        selector = None if self._dense_layer else self.selector
        if selector is not None and rows.indices is not None:
            selector.attend(query, kv_cache, rows, out, recorder.tokens_read)
        else:
            ops.attend(
                query,
                kv_cache,
                rows.block_table,
                rows.seq_lens,
                scale=self.scale,
                soft_cap=self.shape.soft_cap,
                out=out,
                tokens_read=recorder.tokens_read,
            )
        self._record(selector, rows)

    def _record(self, selector: Selector | None, rows: DecodeRows) -> None:
        sparse = []
        if selector is not None:
            sparse = [
                n for n, b in zip(rows.seq_lens_list, rows.budgets_list) if b >= 0
            ]
        recorder.add_layer(
            num_rows=rows.num_rows,
            sparse_rows=len(sparse),
            score_bytes=sum(map(selector.score_bytes, sparse)) * self.num_kv_heads
            if selector is not None
            else 0,
            row_bytes=self.shape.layout.row_bytes,
            context_tokens=sum(rows.seq_lens_list) * self.num_kv_heads,
        )

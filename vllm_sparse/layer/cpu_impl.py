# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""One attention layer on the CPU: seal, then sparse decode rows and dense prefill."""

import torch

from .. import ops
from ..methods import DecodeRows, Selector
from ..stats.recorder import recorder
from ..step.cpu_metadata import SparseMetadata
from .impl import SparseAttentionImpl
from .prefill_cpu import QuantisedRows, prefill


class CpuSparseAttentionImpl(SparseAttentionImpl[SparseMetadata]):
    """Counts what it reads in the kernels themselves."""

    def describe(self, kernels: str) -> str:
        return f"{kernels} kernels ({ops.cpu_isa()})"

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
            key, value: [num_tokens, num_kv_heads, head_size], stored here; None where
                the layer reads another layer's cache.
            kv_cache: [num_blocks, num_kv_heads, BLOCK_SIZE, C].
            attn_metadata: None while vLLM warms up.
            output: [num_tokens, num_heads, head_size], written.
        """
        self.refuse_output_scales(output_scale, output_block_scale)
        if attn_metadata is None:
            return output
        meta = attn_metadata
        split, end = meta.num_decode_tokens, meta.num_actual_tokens
        prompts = meta.prefill
        quantised = isinstance(prompts, QuantisedRows)
        if quantised:
            tails = prompts.plan.save_tails(kv_cache, self.shape)
        if self.owns_cache:
            self._store(key, value, kv_cache, meta)
        if meta.decode is not None:
            self._decode(layer, query[:split], kv_cache, meta.decode, output[:split])
        if quantised:
            new = (key[split:end], value[split:end])
            rows, out = query[split:end], output[split:end]
            prompts.attend(rows, new, tails, kv_cache, self.shape, out)
        elif prompts is not None:
            prefill(
                query[split:end],
                key[split:end] if self.owns_cache else None,
                value[split:end] if self.owns_cache else None,
                kv_cache,
                prompts,
                self.shape,
                output[split:end],
            )
        return output

    def _store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: SparseMetadata,
    ) -> None:
        """Store the step's tokens, and seal the blocks that they fill."""
        if meta.new is not None:
            new = meta.new
            rows = (new.block_table, new.seq_lens, new.query_start_loc)
            ops.store_quantised(key, value, kv_cache, *rows, self.fmt)
            return
        ops.store_kv(key, value, kv_cache, meta.slot_mapping)
        if meta.seal is not None:
            seal = meta.seal
            ops.seal_blocks(
                kv_cache,
                seal.block_ids,
                seal.prev_block_ids,
                seal.block_index,
                self.head_size,
            )

    def _decode(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: DecodeRows,
        out: torch.Tensor,
    ) -> None:
        selector = self.selector_of(layer)
        if selector is not None and rows.indices is not None:
            selector.attend(
                query,
                kv_cache,
                rows,
                out,
                recorder.tokens_read,
                rows.kept_histograms.get(layer.layer_name),
            )
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
                fmt=self.fmt,
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
            layout=self.shape.layout,
            context_tokens=sum(rows.seq_lens_list) * self.num_kv_heads,
        )

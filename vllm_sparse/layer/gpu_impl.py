# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""One attention layer on a GPU: nothing depends on values, so graphs may hold it."""

import torch

from .. import ops
from ..config import SparseConfig, SparseConfigError
from ..step.gpu_metadata import GpuMetadata
from .impl import SparseAttentionImpl
from .prefill_fa import flash_attention_version, prefill, prefill_quantised

# The others loop over rows on the host.
SELECTORS_ON_GPU = ("sparq", "dense")


class GpuSparseAttentionImpl(SparseAttentionImpl[GpuMetadata]):
    """Store and seal, then sparse decode rows, then prefill through FlashAttention."""

    def describe(self, kernels: str) -> str:
        self.flash_attention = flash_attention_version(self.shape)
        if self.flash_attention is None:
            raise ImportError(
                "vLLM has no FlashAttention for this GPU or head size "
                f"{self.head_size}, which sparse attention needs for prefill"
            )
        return f"{kernels} kernels, prefill: FlashAttention {self.flash_attention}"

    def check(self, config: SparseConfig) -> SparseConfig:
        if config.selector not in SELECTORS_ON_GPU:
            raise SparseConfigError(
                f"sparse.selector = {config.selector!r} has no GPU kernels; it must be "
                f"one of {', '.join(SELECTORS_ON_GPU)} there. Example: "
                "--additional-config.sparse.selector sparq"
            )
        return super().check(config)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: GpuMetadata | None,
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
        self.refuse_output_scales(output_scale, output_block_scale)
        if attn_metadata is None:
            if self.fmt.quantised:
                self._show_scratch(query)
            return output.fill_(0)
        meta = attn_metadata
        tails = [plan.save_tails(kv_cache, self.shape) for plan in meta.quantised]
        if self.owns_cache:
            self._store(key, value, kv_cache, meta)
        selector = self.selector_of(layer)
        first = 0
        for rows in meta.decode:
            last = first + rows.num_rows
            part, out = query[first:last], output[first:last]
            if selector is not None:
                histogram = rows.kept_histograms.get(layer.layer_name)
                selector.attend(part, kv_cache, rows, out, None, histogram)
            else:
                ops.attend(
                    part,
                    kv_cache,
                    rows.block_table,
                    rows.seq_lens,
                    scale=self.scale,
                    soft_cap=self.shape.soft_cap,
                    out=out,
                    workspace=rows.workspace,
                    fmt=self.fmt,
                )
            first = last
        end = meta.num_actual_tokens
        for plan, saved in zip(meta.quantised, tails):
            prefill_quantised(
                query[first:end],
                (key[first:end], value[first:end]),
                saved,
                kv_cache,
                plan,
                self.shape,
                self.flash_attention,
                output[first:end],
            )
        if meta.prefill is not None:
            prefill(
                query[first:end],
                kv_cache,
                meta.prefill,
                self.shape,
                self.flash_attention,
                output[first:end],
            )
        return output

    def _show_scratch(self, like: torch.Tensor) -> None:
        """Hold what prefill will, while vLLM measures how much memory is left."""
        size = (2, self.scratch_tokens, self.num_kv_heads, self.head_size)
        like.new_empty(size)

    def _store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: GpuMetadata,
    ) -> None:
        """Store the step's tokens, and seal the blocks that they fill."""
        requests, slots, first = meta.requests, meta.slot_mapping, 0
        if self.fmt.quantised:
            rows = (requests.block_table, requests.seq_lens, requests.query_start_loc)
            ops.store_quantised(key, value, kv_cache, *rows, self.fmt)
            return
        if requests is not None and requests.one_token_each:
            first = requests.seq_lens.shape[0]
            ops.store_rows(
                key,
                value,
                kv_cache,
                slots[:first],
                requests.block_table,
                requests.seq_lens,
            )
        if first < meta.num_actual_tokens:
            ops.store_kv(key[first:], value[first:], kv_cache, slots[first:])
        if requests is not None and not requests.one_token_each:
            ops.seal_rows(
                kv_cache,
                requests.block_table,
                requests.seq_lens,
                requests.query_start_loc,
                self.head_size,
            )
        if meta.seal is not None:
            seal = meta.seal
            ops.seal_blocks(
                kv_cache,
                seal.block_ids,
                seal.prev_block_ids,
                seal.block_index,
                self.head_size,
            )

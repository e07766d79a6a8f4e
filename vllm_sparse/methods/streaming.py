# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sinks and a window, all between them given back (StreamingLLM, arXiv 2309.17453)."""

import torch

from ..cache.eviction import Eviction
from ..cache.layout import BLOCK_SIZE
from ..config import SparseConfig
from ..ops import Ops
from ..ops.kept import add_counts
from .base import Compact, DecodeRows, LayerShape, Method, Phase


class Streaming(Method):
    """Attends to a compact context (:mod:`vllm_sparse.cache.eviction`)."""

    devices = ("cpu", "cuda")

    def __init__(self, config: SparseConfig, shape: LayerShape, ops: Ops) -> None:
        super().__init__(config, shape, ops)
        self.kept = self.eviction(config)
        if self.kept.prompts:
            self.dense_phases = frozenset()

    @classmethod
    def eviction(cls, config: SparseConfig) -> Eviction:
        return Eviction(
            sink_blocks=config.sink_tokens // BLOCK_SIZE,
            window_blocks=config.local_window // BLOCK_SIZE,
            prompts=config.prefill == "streaming",
        )

    def budgets(self, phase: Phase, longest: int) -> torch.Tensor:
        lens = torch.arange(longest + 1)
        skipped = self.kept.skipped_blocks(lens)
        kept = lens - skipped * BLOCK_SIZE
        return kept.masked_fill(skipped == 0, -1).int()

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: DecodeRows,
        out: torch.Tensor,
        layer_name: str,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Exact attention to the compact contexts.

        Args:
            lse: as of :meth:`vllm_sparse.ops.Ops.attend`.
        """
        if rows.compact is None:  # of the step's first layer, for all
            rows.compact = self._compact(rows)
        self.ops.attend(
            query,
            kv_cache,
            rows.compact.block_table,
            rows.compact.seq_lens,
            scale=self.shape.scale,
            soft_cap=self.shape.soft_cap,
            out=out,
            workspace=rows.workspace,
            fmt=self.shape.fmt,
            sinks=self.shape.sinks,
            lse=lse,
        )
        histogram = rows.kept_histograms.get(layer_name)
        if histogram is not None:
            heads = kv_cache.shape[1]
            add_counts(rows.compact.counts[:, None].expand(-1, heads), histogram)

    def _compact(self, rows: DecodeRows) -> Compact:
        kept = torch.where(rows.budgets < 0, rows.seq_lens, rows.budgets)
        skipped = (rows.seq_lens - kept) // BLOCK_SIZE
        table = self.kept.compact_table(rows.block_table, skipped)
        uncounted = skipped == 0
        if rows.prompts is not None:
            uncounted = uncounted | rows.prompts
        return Compact(table, kept, skipped, kept.masked_fill(uncounted, -1))

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""SparQ (arXiv 2312.04985) on the 4-bit codes of sealed blocks; with ``top_p``,
Twilight's budgets (arXiv 2502.02770)."""

import torch

from ..ops import SparqOptions
from .base import DecodeRows, ScoreBytes, SelectingMethod


class Sparq(SelectingMethod):
    """Scores every token with the ``rank`` channels where the query is largest."""

    devices = ("cpu", "cuda")

    @property
    def score_bytes(self) -> ScoreBytes:
        layout, config = self.shape.layout, self.config
        return ScoreBytes(
            per_row=2 * layout.head_size if config.mean_value else 0,
            per_sealed_block=layout.score_bytes(1, config.rank),
        )

    def select(
        self, query: torch.Tensor, kv_cache: torch.Tensor, rows: DecodeRows
    ) -> torch.Tensor | None:
        self._run(query, kv_cache, rows)
        return rows.kept_mass if self.config.mean_value else None

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: DecodeRows,
        out: torch.Tensor,
        layer_name: str,
    ) -> None:
        # One op: chosen rows are attended while another core still scores.
        histogram = rows.kept_histograms.get(layer_name)
        self._run(query, kv_cache, rows, out=out, kept_histogram=histogram)

    def _run(self, query, kv_cache, rows: DecodeRows, **outputs) -> None:
        config, shape = self.config, self.shape
        options = SparqOptions(
            rank=config.rank,
            local_window=config.local_window,
            sink_tokens=config.sink_tokens,
            scale=shape.scale,
            soft_cap=shape.soft_cap,
            top_p=1.0 if config.top_p is None else config.top_p,
            min_tokens=config.min_tokens,
        )
        self.ops.sparq_attend(
            query,
            kv_cache,
            rows.block_table,
            rows.seq_lens,
            rows.budgets,
            options,
            indices=rows.indices,
            counts=rows.counts,
            kept_mass=rows.kept_mass if config.mean_value else None,
            workspace=rows.workspace,
            fmt=shape.fmt,
            sinks=shape.sinks,
            **outputs,
        )

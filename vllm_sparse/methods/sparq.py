# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""SparQ (arXiv 2312.04985) on the 4-bit codes of sealed blocks."""

import torch

from .. import ops
from .base import DecodeRows, Selector


class SparqSelector(Selector):
    """Scores every token with the ``rank`` channels where the query is largest."""

    name = "sparq"

    def select(
        self, query: torch.Tensor, kv_cache: torch.Tensor, rows: DecodeRows
    ) -> torch.Tensor | None:
        options = self._options(query, rows)
        ops.sparq_select(
            query,
            kv_cache,
            rows.block_table,
            rows.seq_lens,
            rows.budgets,
            **options,
            fmt=self.shape.fmt,
        )
        return options["kept_mass"]

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: DecodeRows,
        out: torch.Tensor,
        tokens_read: torch.Tensor | None,
        kept_histogram: torch.Tensor | None = None,
    ) -> None:
        # One op: chosen rows are attended while another core still scores.
        ops.sparq_attend(
            query,
            kv_cache,
            rows.block_table,
            rows.seq_lens,
            rows.budgets,
            **self._options(query, rows),
            out=out,
            tokens_read=tokens_read,
            kept_histogram=kept_histogram,
            fmt=self.shape.fmt,
        )

    def _options(self, query: torch.Tensor, rows: DecodeRows) -> dict:
        config, shape = self.config, self.shape
        kept_mass = rows.kept_mass if config.mean_value else None
        if config.mean_value and kept_mass is None:
            kept_mass = torch.empty(query.shape[:2], dtype=torch.float32)
        return {
            "rank": config.rank,
            "local_window": config.local_window,
            "sink_tokens": config.sink_tokens,
            "scale": shape.scale,
            "soft_cap": shape.soft_cap,
            "top_p": 1.0 if config.top_p is None else config.top_p,
            "min_tokens": config.min_tokens,
            "indices": rows.indices,
            "counts": rows.counts,
            "kept_mass": kept_mass,
            "workspace": rows.workspace,
        }

    def score_bytes(self, seq_len: int) -> int:
        layout = self.shape.layout
        sealed = self.shape.fmt.sealed_blocks(seq_len)
        size = layout.score_bytes(sealed, self.config.rank)
        if self.config.mean_value:
            size += layout.head_size * 2
        return size

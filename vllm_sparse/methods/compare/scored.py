# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Methods for comparison, in plain PyTorch: correct, not fast.

They share the budget, the sinks, the window and the exact attention with SparQ and
differ in the score alone, so that a table of methods compares like with like.
"""

from abc import abstractmethod
from collections.abc import Iterator

import torch

from ...ops.reference import context, forced_ranges, top_k_positions, top_p_count
from ..base import DecodeRows, SelectingMethod


class ScoredMethod(SelectingMethod):
    """Keeps the tokens whose :meth:`scores` are largest."""

    @abstractmethod
    def scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Score tokens for all KV heads of one row.

        With ``top_p`` a token's share of all scores stands for its share of the mass.

        Args:
            query: [num_kv_heads, group, head_size] fp32.
            key: [num_kv_heads, seq_len, head_size] fp32.

        Returns:
            [num_kv_heads, seq_len]
        """

    def select(
        self, query: torch.Tensor, kv_cache: torch.Tensor, rows: DecodeRows
    ) -> None:
        shape, config = self.shape, self.config
        grouped = query.float().view(
            -1, shape.num_kv_heads, shape.num_queries_per_kv, shape.head_size
        )
        for row, (length, budget) in enumerate(
            zip(rows.seq_lens.tolist(), rows.budgets.tolist())
        ):
            sinks, recent = forced_ranges(
                length, config.local_window, config.sink_tokens, shape.fmt
            )
            if budget < 0 or budget >= length or recent <= config.sink_tokens:
                rows.counts[row] = -1
                continue
            blocks = rows.block_table[row]
            key = torch.stack(
                [
                    context(kv_cache, blocks, length, h, shape.head_size, shape.fmt)[0]
                    for h in range(shape.num_kv_heads)
                ]
            )
            scores = self.scores(grouped[row], key)
            position = torch.arange(length, device=scores.device)
            forced = torch.cat([position[:sinks], position[recent:]])
            most = max(0, budget - len(forced))
            for heads, wanted in self._wanted(scores, sinks, recent, most):
                best = top_k_positions(scores[heads, sinks:recent], wanted) + sinks
                kept = torch.cat([forced.expand(len(best), -1), best], 1).sort(1).values
                rows.indices[row, heads, : kept.shape[1]] = kept.int()
                rows.counts[row, heads] = kept.shape[1]

    def _wanted(
        self, scores: torch.Tensor, sinks: int, recent: int, most: int
    ) -> Iterator[tuple[slice, int]]:
        """How many tokens between ``sinks`` and ``recent`` to keep: heads, number."""
        config, length = self.config, scores.shape[1]
        if config.top_p is None:
            yield slice(None), most
            return
        share = self.shape.num_queries_per_kv / scores.sum(-1, keepdim=True)
        least = config.min_tokens - (sinks + length - recent)
        for head, found in enumerate((scores * share)[:, sinks:recent]):
            enough = top_p_count(found, config.top_p)
            yield slice(head, head + 1), min(max(enough, least), most)

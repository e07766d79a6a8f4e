# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Exact top-k: the oracle that no estimate can beat. For evaluation only."""

import torch

from .scored import ScoredSelector


class ExactSelector(ScoredSelector):
    """Scores with the true attention weights, summed over the group."""

    name = "exact"

    def scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self._logits(query, key).softmax(-1).sum(1)

    def score_bytes(self, seq_len: int) -> int:
        """Nothing: the oracle's scores are counted as free, and reports say so."""
        return 0

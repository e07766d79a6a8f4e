# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Exact top-k: the oracle that no estimate can beat. For evaluation only."""

import torch

from .scored import ScoredMethod


class Exact(ScoredMethod):
    """Scores with the true attention weights, summed over the group.

    They are counted as free, and reports say so.
    """

    def scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        logits = query @ key.transpose(1, 2) * self.shape.scale
        if self.shape.soft_cap > 0:
            logits = self.shape.soft_cap * (logits / self.shape.soft_cap).tanh()
        return logits.softmax(-1).sum(1)

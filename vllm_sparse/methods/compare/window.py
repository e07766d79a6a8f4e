# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sliding window with sinks (StreamingLLM, arXiv 2309.17453). For comparison."""

import torch

from .scored import ScoredMethod


class Window(ScoredMethod):
    """Scores a token by its position: the budget goes to the most recent."""

    def scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        position = torch.arange(key.shape[1], dtype=torch.float32, device=key.device)
        return position.expand(key.shape[0], -1)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Quest (arXiv 2406.10774): pages of 16 tokens ranked by a bound. For comparison.

The page minima and maxima are taken from the exact keys here; their bytes are counted
as Quest stores them, two model-dtype vectors a page.
"""

import torch
from torch.nn.functional import pad

from ..base import ScoreBytes
from .scored import ScoredMethod

PAGE_SIZE = 16


class Quest(ScoredMethod):
    """A page's score bounds the logits in it; a group's heads are summed."""

    def scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        length = key.shape[1]
        extra = -length % PAGE_SIZE
        low = pad(key, (0, 0, 0, extra), value=torch.inf)
        high = pad(key, (0, 0, 0, extra), value=-torch.inf)
        low = low.unflatten(1, (-1, PAGE_SIZE)).amin(2)
        high = high.unflatten(1, (-1, PAGE_SIZE)).amax(2)
        positive, negative = query.clamp(min=0), query.clamp(max=0)
        bound = positive @ high.transpose(1, 2) + negative @ low.transpose(1, 2)
        pooled = (bound * self.shape.scale).softmax(-1).sum(1)
        return pooled.repeat_interleave(PAGE_SIZE, dim=1)[:, :length]

    @property
    def score_bytes(self) -> ScoreBytes:
        page = 2 * self.shape.head_size * self.shape.dtype.itemsize
        return ScoreBytes(per_token=page / PAGE_SIZE)

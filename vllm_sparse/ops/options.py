# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How SparQ chooses tokens: the options of ``sparq_attend``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SparqOptions:
    """SparQ's options (arXiv 2312.04985), or Twilight's where ``top_p`` is below 1.

    With ``top_p`` below 1 a (row, KV head) keeps the fewest tokens that leave at most
    1 - top_p of the estimated probability mass outside, summed over its query heads, so
    that each of them keeps at least top_p of its own (Twilight, arXiv 2502.02770,
    section 3, with the mass of the whole context). Estimates then go without SparQ's
    temperature, which would make them sharper than the truth.

    Attributes:
        rank: channels that are read to estimate attention, at most the head size.
        local_window: most recent tokens that are always kept, at least 1.
        sink_tokens: first tokens that are always kept.
        scale: of the softmax.
        soft_cap: of the logits; 0: none.
        top_p: in (0, 1]; 1: keep what budgets say.
        min_tokens: the fewest to keep with ``top_p`` below 1, forced ones included.
    """

    rank: int
    local_window: int
    sink_tokens: int
    scale: float
    soft_cap: float = 0.0
    top_p: float = 1.0
    min_tokens: int = 0

    @property
    def sizes(self) -> list[int]:
        """The whole numbers, as the compiled ops take them."""
        return [self.rank, self.local_window, self.sink_tokens, self.min_tokens]

    @property
    def numbers(self) -> list[float]:
        """The others, likewise."""
        return [self.scale, self.soft_cap, self.top_p]

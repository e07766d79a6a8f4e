# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Anchors: of eight old tokens one stays, ends of lines first (cache/lines.py).

New lines lie in blocks that vLLM gives back as those of a sliding window; anchors are
stored a second time, LINE_GROUP tokens to a place, in blocks of their own
(plugin/arena.py). Both lie in the same memory, so a position attends to one list of
tokens in one compact context.
"""

from typing import Any

import torch

from ..cache.lines import attended
from ..ops.kept import add_counts
from .base import DecodeRows, Lines, Method, Phase

# Of lists that are alive at a time.
LIST_BYTES = 64 * 2**20


class Anchor(Method):
    """Attends to what is near and to the anchors before it.

    Attributes:
        lower: the lower layer whose cache's anchors join the softmax (layer-wise
            anchors); None: none. Whoever makes the layers sets it.
    """

    devices = ("cpu", "cuda")
    dense_phases = frozenset()
    prompts_as_rows = True
    lower: Any = None

    def budgets(self, phase: Phase, longest: int) -> torch.Tensor:
        return attended(torch.arange(longest + 1)).int()

    def seal(self, layer_name: str, kv_cache: torch.Tensor, meta, key, value) -> None:
        """Store the step's anchors a second time."""
        if meta.anchor_slots is None:
            raise RuntimeError("a step has lines without blocks for their anchors")
        self.ops.store(
            key,
            value,
            kv_cache,
            meta.anchor_slots,
            meta.block_table,
            meta.seq_lens,
            meta.query_start_loc,
            self.shape.fmt,
        )

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: DecodeRows,
        out: torch.Tensor,
        layer_name: str,
    ) -> None:
        lines, read = rows.lines, rows.counts
        if self.lower is None:
            self._attend(query, kv_cache, lines, lines.counts, out)
        else:
            self._attend_both(query, kv_cache, lines, out)
            read = torch.where(read > 0, read + lines.anchors[:, None], read)
        histogram = rows.kept_histograms.get(layer_name)
        if histogram is not None:
            add_counts(read, histogram)

    def _attend_both(self, query, kv_cache, lines: Lines, out) -> None:
        """The own cache's list and the anchors of the lower layer's, in one softmax."""
        own = query.new_empty(query.shape[:2], dtype=torch.float32)
        other, low = torch.empty_like(own), torch.empty_like(out)
        self._attend(query, kv_cache, lines, lines.counts, out, own)
        # Lists of the first blocks have no anchor: one token is read, and not used.
        some = lines.anchors > 0
        listed = torch.where(some, lines.anchors, lines.counts.clamp(max=1))
        self._attend(query, self.lower.kv_cache, lines, listed, low, other)
        other.masked_fill_(~some[:, None], -torch.inf)
        share = (other - torch.logaddexp(own, other)).exp()[..., None]
        out.copy_(torch.lerp(out.float(), low.float(), share).to(out.dtype))

    def _attend(self, query, kv_cache, lines: Lines, counts, out, lse=None) -> None:
        """Rows take turns, as the ops want a list for every KV head."""
        heads = kv_cache.shape[1]
        at_once = max(1, LIST_BYTES // (4 * heads * lines.indices.shape[1]))
        for first in range(0, len(counts), at_once):
            part = slice(first, first + at_once)
            self.ops.attend(
                query[part],
                kv_cache,
                lines.block_table[part],
                lines.seq_lens[part],
                indices=lines.indices[part, None].expand(-1, heads, -1).contiguous(),
                counts=counts[part, None].expand(-1, heads).contiguous(),
                scale=self.shape.scale,
                soft_cap=self.shape.soft_cap,
                out=out[part],
                fmt=self.shape.fmt,
                lse=None if lse is None else lse[part],
            )

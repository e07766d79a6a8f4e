# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What a selector is: it names the tokens each decode row attends to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .. import ops
from ..cache.formats import ROWS, KvFormat
from ..cache.layout import BLOCK_SIZE, BlockLayout
from ..config import SparseConfig
from ..ops.kept import add_counts


@dataclass(frozen=True)
class LayerShape:
    """One attention layer, as a selector sees it."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    scale: float
    # 0: no logits soft cap.
    soft_cap: float = 0.0
    fmt: KvFormat = ROWS

    @property
    def num_queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout(self.head_size, self.dtype.itemsize, self.fmt)


@dataclass
class DecodeRows:
    """Query positions that decode, one row each, and the room for their token lists.

    Attributes:
        block_table: [num_rows, max_blocks] int32.
        seq_lens: [num_rows] int32.
        budgets: [num_rows] int32 tokens to keep (the most, if budgets adapt); -1: the
            row is dense.
        indices: [num_rows, num_kv_heads, max_kept] int32, None when all rows are dense.
        counts: [num_rows, num_kv_heads] int32, likewise.
        kept_mass: [num_rows, num_heads] fp32, None where ops should allocate it.
        workspace: scratch memory of the ops, None where they should allocate it.
        seq_lens_list, budgets_list: the same as Python numbers, if the host has them.
        kept_histograms: of every layer by its name, see :meth:`Selector.attend`.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    budgets: torch.Tensor
    indices: torch.Tensor | None
    counts: torch.Tensor | None
    kept_mass: torch.Tensor | None = None
    workspace: torch.Tensor | None = None
    seq_lens_list: list[int] = field(default_factory=list)
    budgets_list: list[int] = field(default_factory=list)
    kept_histograms: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return self.seq_lens.shape[0]


class Selector(ABC):
    """One method. ``config`` is resolved for the layer: no "auto" is left in it."""

    name: str

    def __init__(self, config: SparseConfig, shape: LayerShape) -> None:
        self.config = config
        self.shape = shape

    @abstractmethod
    def select(
        self, query: torch.Tensor, kv_cache: torch.Tensor, rows: DecodeRows
    ) -> torch.Tensor | None:
        """Fill ``rows.indices`` and ``rows.counts``.

        Args:
            query: [num_rows, num_heads, head_size].

        Returns:
            kept mass [num_rows, num_heads] fp32 where the mean-value term is on.
        """

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: DecodeRows,
        out: torch.Tensor,
        tokens_read: torch.Tensor | None,
        kept_histogram: torch.Tensor | None = None,
    ) -> None:
        """:meth:`select`, then exact attention over what it chose.

        Args:
            out: [num_rows, num_heads, head_size], written.
            tokens_read: as in :func:`vllm_sparse.ops.attend`; None: not counted.
            kept_histogram: [num_kv_heads, KEPT_BINS] int64, lengths of the lists are
                added to it (:mod:`vllm_sparse.ops.kept`).
        """
        kept_mass = self.select(query, kv_cache, rows)
        ops.attend(
            query,
            kv_cache,
            rows.block_table,
            rows.seq_lens,
            indices=rows.indices,
            counts=rows.counts,
            kept_mass=kept_mass,
            scale=self.shape.scale,
            soft_cap=self.shape.soft_cap,
            out=out,
            tokens_read=tokens_read,
            workspace=rows.workspace,
            fmt=self.shape.fmt,
        )
        if kept_histogram is not None:
            add_counts(rows.counts, kept_histogram)

    @abstractmethod
    def score_bytes(self, seq_len: int) -> int:
        """Bytes read per KV head to choose tokens in a sparse row of this length."""


def keeps_all(
    seq_len: int,
    budget: int,
    local_window: int,
    sink_tokens: int,
    fmt: KvFormat = ROWS,
) -> bool:
    """Whether a row's budget and its always-kept tokens cover the context."""
    if budget < 0 or budget >= seq_len:
        return True
    sealed = fmt.sealed_blocks(seq_len) * BLOCK_SIZE
    return min(seq_len - local_window, sealed) <= sink_tokens


def tokens_kept(
    seq_len: int,
    budget: int,
    local_window: int,
    sink_tokens: int,
    fmt: KvFormat = ROWS,
) -> int:
    """Tokens a fixed-budget selector keeps, forced ones included."""
    if keeps_all(seq_len, budget, local_window, sink_tokens, fmt):
        return seq_len
    forced = sink_tokens + max(local_window, fmt.tail_tokens(seq_len))
    return max(budget, forced)

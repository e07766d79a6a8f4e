# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What a method is: it says how much of its context a query position attends to, and
which tokens."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import ClassVar

import torch

from ..cache.eviction import Eviction
from ..cache.formats import ROWS, KvFormat
from ..cache.layout import BlockLayout
from ..config import SparseConfig
from ..ops import Ops
from ..ops.kept import add_counts
from .budgets import budgets


class Phase(Enum):
    """What a query position of a step is for."""

    PREFILL = "prefill"  # a prompt's token
    DECODE = "decode"  # the one new token of a request
    DRAFT = "draft"  # a token that a later step verifies
    VERIFY = "verify"  # one of several: the last accepted token, and drafts after it


@dataclass(frozen=True)
class LayerShape:
    """One attention layer, as a method sees it."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    scale: float = 1.0
    # 0: no logits soft cap.
    soft_cap: float = 0.0
    fmt: KvFormat = ROWS
    # The version that serves dense rows on GPUs.
    flash_attention: int | None = None
    # [num_heads] fp32 logits that join the softmax (attention sinks); the layer's own.
    sinks: torch.Tensor | None = field(default=None, compare=False)

    @property
    def num_queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    @cached_property
    def layout(self) -> BlockLayout:
        return BlockLayout(self.head_size, self.dtype.itemsize, self.fmt)


@dataclass(frozen=True)
class ScoreBytes:
    """Bytes that a sparse row reads in one KV head to choose its tokens."""

    per_row: float = 0
    per_token: float = 0
    per_sealed_block: float = 0

    def of_row(self, seq_len: int, fmt: KvFormat = ROWS) -> int:
        sealed = max(0, fmt.sealed_blocks(seq_len))
        tokens = self.per_token * seq_len + self.per_sealed_block * sealed
        return int(self.per_row + tokens)


@dataclass
class Compact:
    """What rows keep of their contexts (cache/eviction.py).

    Attributes:
        block_table: [num_rows, blocks] int32.
        seq_lens: [num_rows] int32.
        skipped: [num_rows] int32 blocks between sinks and window; 0: all is kept.
        counts: [num_rows] int32 tokens that are kept; -1: all.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    skipped: torch.Tensor
    counts: torch.Tensor


@dataclass
class Lines:
    """What positions attend to, as lists over compact contexts: the blocks of anchors,
    then those near the position.

    Attributes:
        block_table: [n, blocks] int32.
        seq_lens: [n] int32; 0: padding.
        indices: [n, most] int32, of all KV heads: anchors, then what is near.
        counts: [n] int32; -1: padding.
        anchors: [n] int32, how many of the list are anchors.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    indices: torch.Tensor
    counts: torch.Tensor
    anchors: torch.Tensor


@dataclass
class DecodeRows:
    """Query positions, one row each, and the room for their token lists.

    Attributes:
        block_table: [num_rows, max_blocks] int32.
        seq_lens: [num_rows] int32.
        budgets: [num_rows] int32 tokens to keep (the most, if budgets adapt); -1: the
            row is dense.
        indices: [num_rows, num_kv_heads, max_kept] int32.
        counts: [num_rows, num_kv_heads] int32.
        kept_mass: [num_rows, num_heads] fp32.
        workspace: scratch memory of the ops, None where they should allocate it.
        kept_histograms: of every layer by its name, [num_kv_heads, KEPT_BINS] int64;
            lengths of lists are added (:mod:`vllm_sparse.ops.kept`).
        prompts: [num_rows] bool, rows of prompts, which the histograms leave out; None:
            there are none, or they are dense.
        states: counts on the host, for methods with a state on CPUs: ``state_rows``
            of a sample, and their ``state_share_ppm``, shares of the attention mass.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    budgets: torch.Tensor
    indices: torch.Tensor
    counts: torch.Tensor
    kept_mass: torch.Tensor
    workspace: torch.Tensor | None = None
    # Made by the first layer that evicts.
    compact: "Compact | None" = None
    # Of all layers alike, where old lines leave anchors (step/anchors.py).
    lines: "Lines | None" = None
    kept_histograms: Mapping[str, torch.Tensor] = field(default_factory=dict)
    prompts: torch.Tensor | None = None
    states: Counter[str] = field(default_factory=Counter)

    @property
    def num_rows(self) -> int:
        return self.seq_lens.shape[0]


class Method(ABC):
    """One method in one layer.

    Args:
        config: resolved for the layer: no "auto" is left in it.
        ops: the kernels that serve the layer.
    """

    # Where it is fast enough to serve; the others loop over rows on the host.
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    # Phases whose positions attend to everything, whatever the length.
    dense_phases: frozenset[Phase] = frozenset({Phase.PREFILL})

    def __init__(self, config: SparseConfig, shape: LayerShape, ops: Ops) -> None:
        self.config, self.shape, self.ops = config, shape, ops
        if config.lossless:
            # MagicDec (arXiv 2408.11049): drafts are sparse, what verifies them and
            # all that is answered is not.
            self.dense_phases = frozenset(Phase) - {Phase.DRAFT} | self.dense_phases

    # Whether a prompt's positions are rows as those that decode are.
    prompts_as_rows: ClassVar[bool] = False

    def seal(  # noqa: B027
        self,
        layer_name: str,
        kv_cache: torch.Tensor,
        meta,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        """Write what else is kept of a step's new tokens, once these are stored.

        Args:
            meta: the step's (:class:`vllm_sparse.step.metadata.SparseMetadata`).
            key, value: [num_tokens, num_kv_heads, head_size].
        """

    @classmethod
    def eviction(cls, config: SparseConfig) -> Eviction | None:
        """Which blocks a request gives back; None: none."""
        return None

    def budgets(self, phase: Phase, longest: int) -> torch.Tensor:
        """Tokens to keep by context length, 0 to ``longest``: int32; -1: all."""
        if phase in self.dense_phases:
            return torch.full((longest + 1,), -1, dtype=torch.int32)
        return budgets(torch.arange(longest + 1), self.config, self.shape.fmt)

    @property
    def score_bytes(self) -> ScoreBytes:
        return ScoreBytes()

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: DecodeRows,
        out: torch.Tensor,
        layer_name: str,
    ) -> None:
        """Attend to what the method keeps.

        Args:
            query: [num_rows, num_heads, head_size].
            out: [num_rows, num_heads, head_size], written.
        """


class SelectingMethod(Method):
    """Chooses tokens for every row and KV head."""

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
        layer_name: str,
    ) -> None:
        """:meth:`select`, then exact attention over what it chose."""
        kept_mass = self.select(query, kv_cache, rows)
        self.ops.attend(
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
            workspace=rows.workspace,
            fmt=self.shape.fmt,
            sinks=self.shape.sinks,
        )
        histogram = rows.kept_histograms.get(layer_name)
        if histogram is not None:
            add_counts(rows.counts, histogram)

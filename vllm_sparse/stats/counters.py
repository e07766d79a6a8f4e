# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Counters on the model's device, which nobody waits for."""

from dataclasses import dataclass

import torch

from ..cache.layout import BLOCK_SIZE, BlockLayout
from ..methods.base import ScoreBytes
from ..ops.kept import KEPT_BINS

# How a row (a query position in one layer) is served: sparse, or densely for the first
# of these reasons that applies.
SPARSE = "sparse"
DENSE_REASONS = (
    "prefill",
    "unsupported_layer",
    "dense_layer",
    "short_context",
    "budget_covers_context",
)


@dataclass
class SparseStats:
    """Totals of this process since the last reset, decode rows only.

    An engine that captures FULL CUDA graphs resets them before it serves.

    Bytes cover K and V rows, codes, parameters and means, over all layers and KV heads
    that our backend serves.
    """

    # Query positions, once per step and group of layers; in lossless engines drafted
    # and verified ones.
    decode_tokens: int = 0
    decode_rows: int = 0  # the same, counted in every layer
    sparse_rows: int = 0  # of these, the ones that read less than everything
    kv_bytes_read: int = 0
    # What dense attention reads in the model's dtype, once for all positions of a
    # request that one step verifies. Of lossless engines what dense decoding reads for
    # the same tokens: a verification's bytes, once for each token that it gives.
    kv_bytes_dense: int = 0


@dataclass(frozen=True)
class LayerKinds:
    """Numbers of layers that share one builder's rows.

    Attributes:
        choosing: layers of ours that choose tokens.
        dense: layers of ours that the options keep dense.
        unsupported: layers that vLLM's own backend serves; they are counted with one
            builder of a model.
    """

    choosing: int
    dense: int = 0
    unsupported: int = 0

    def served(
        self, sparse: int = 0, short: int = 0, covered: int = 0, prefill: int = 0
    ) -> dict[str, int]:
        """Rows of all layers, by how they are served.

        Args:
            sparse, short, covered: query positions that decode: with a budget, below
                ``dense_below``, with a budget that covers the context.
            prefill: query positions of prompts.
        """
        decoding = sparse + short + covered
        return {
            SPARSE: sparse * self.choosing,
            "short_context": short * self.choosing,
            "budget_covers_context": covered * self.choosing,
            "dense_layer": decoding * self.dense,
            "unsupported_layer": decoding * self.unsupported,
            "prefill": prefill * (self.choosing + self.dense + self.unsupported),
        }


class KeptHistograms:
    """Tokens that sparse rows keep, by layer and KV head; kernels add to them.

    Attributes:
        by_layer: [num_kv_heads, KEPT_BINS] int64 of every layer, at fixed addresses.
    """

    def __init__(
        self, layer_names: list[str], num_kv_heads: int, device: torch.device
    ) -> None:
        shape = (len(layer_names), num_kv_heads, KEPT_BINS)
        with torch.inference_mode():
            self.counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self.by_layer = dict(zip(layer_names, self.counts))

    def sum(self) -> torch.Tensor:
        """[KEPT_BINS] int64 on the device, of all layers and KV heads."""
        return self.counts.sum((0, 1))

    def total(self) -> int:
        """Tokens of all layers and KV heads; waits for the device."""
        return int(self.counts[..., -1].sum())

    @torch.inference_mode()
    def reset(self) -> None:
        self.counts.zero_()


class StepCounter:
    """Counts decode rows on their device without waiting for it.

    Which rows are sparse is known before the kernels run, so one step's rows are
    counted once, for all layers of a group; kernels count what sparse rows keep.

    Args:
        layers: what the counts are multiplied by.
        score_bytes: of a sparse row in one KV head.
        dense_below: contexts shorter than this are dense.
        together: dense layers read a request's context once for all its positions.
        drafts: rows come on top of what dense attention would do, which
            :meth:`add_accepted` counts.
    """

    # Rows of :attr:`counts`, and its columns.
    _SPARSE, _SHORT, _COVERED, _PREFILL = range(4)
    _ROWS, _TOKENS, _BLOCKS, _LAST_TOKENS, _LAST_BLOCKS = range(5)
    # Entries of :attr:`counts`, and of :meth:`values`.
    _COUNTS, SIZE = 20, 22

    def __init__(
        self,
        device: torch.device,
        layers: LayerKinds,
        num_kv_heads: int,
        layout: BlockLayout,
        score_bytes: ScoreBytes,
        dense_below: int,
        together: bool,
        kept: KeptHistograms,
        drafts: bool = False,
    ) -> None:
        self.layers, self.dense_below, self.together = layers, dense_below, together
        self.drafts = drafts
        self.num_kv_heads, self.layout = num_kv_heads, layout
        self.score_bytes = score_bytes
        self.kept, self.kept_before = kept, kept.total()
        # By kind of row: rows, tokens of their contexts, sealed blocks; and of the
        # requests' last rows, which see all that the others do, tokens and blocks.
        with torch.inference_mode():
            self.counts = torch.zeros(4, 5, dtype=torch.int64, device=device)
            # Tokens of contexts, once for each accepted draft.
            self.accepted = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def add(
        self,
        seq_lens: torch.Tensor,
        budgets: torch.Tensor,
        slots: torch.Tensor,
        prefilling: torch.Tensor | None = None,
        last: torch.Tensor | None = None,
    ) -> None:
        """Count one step's rows; rows without a slot are padding.

        Args:
            seq_lens, budgets, slots: [num_rows].
            prefilling: [num_rows] bool, rows of prompts; None: there are none.
            last: [num_rows] bool, the last rows of requests; None: all are.
        """
        real = slots >= 0
        lens = seq_lens * real
        blocks = self.layout.fmt.sealed_blocks(lens).clamp_(min=0)
        whole = (lens, blocks) if last is None else (lens * last, blocks * last)
        rows = torch.stack((real, lens, blocks, *whole), 1).long()
        # 0 with a budget, else 1 or 2.
        kinds = (budgets < 0) * ((seq_lens >= self.dense_below) + 1)
        if prefilling is not None:
            kinds.masked_fill_(prefilling, self._PREFILL)
        self.counts.index_add_(0, kinds, rows)

    @torch.inference_mode()
    def add_accepted(self, seq_lens: torch.Tensor, accepted: torch.Tensor) -> None:
        """Count the tokens that a verification gave beyond its first.

        Args:
            seq_lens: [num_reqs] context, drafts included.
            accepted: [num_reqs] drafts.
        """
        self.accepted += (seq_lens * accepted).sum()

    @torch.inference_mode()  # as the engine's steps, which share the tensor
    def reset(self) -> None:
        self.counts.zero_()
        self.accepted.zero_()
        self.kept_before = self.kept.total()

    def values(self) -> torch.Tensor:
        """[SIZE] int64 on the device: what :meth:`totals` reads."""
        parts = self.counts.flatten(), self.accepted, self.kept.sum()[-1:]
        return torch.cat(parts)

    def totals(self, values: list[int]) -> tuple[SparseStats, dict[str, int]]:
        """Totals, and rows by how they are served.

        Args:
            values: :meth:`values` of now or before.
        """
        kinds = [values[i : i + 5] for i in range(0, self._COUNTS, 5)]
        accepted, kept = values[self._COUNTS :]
        sparse = kinds[self._SPARSE]
        dense = [sum(column) for column in zip(*kinds[1:])]
        rows = [sum(column) for column in zip(*kinds)]
        kept -= self.kept_before  # of all layers and KV heads
        cost = self.score_bytes
        scores = sparse[self._ROWS] * cost.per_row + sparse[self._TOKENS] * (
            cost.per_token
        )
        scores += sparse[self._BLOCKS] * cost.per_sealed_block
        # What each of the layers and KV heads of one kind reads.
        choosing = self.layers.choosing
        num_layers = choosing + self.layers.dense
        read = choosing * (self._whole(dense[self._TOKENS], dense[self._BLOCKS]))
        read += choosing * int(scores)
        first = self._LAST_TOKENS if self.together else self._TOKENS
        read += self.layers.dense * self._whole(*rows[first : first + 2])
        items = choosing * self.num_kv_heads
        # In quantised formats all sealed blocks may hold a token that is kept.
        tail = sparse[self._TOKENS] - sparse[self._BLOCKS] * BLOCK_SIZE
        sealed = items * sparse[self._BLOCKS]
        listed = self.layout.attended_bytes(kept, kept - items * tail, sealed)
        whole = accepted if self.drafts else rows[self._LAST_TOKENS]
        whole *= self.layout.row_bytes
        stats = SparseStats(
            # A group may have a draft model's layers alone, which have other steps.
            decode_tokens=rows[self._ROWS] if num_layers else 0,
            decode_rows=rows[self._ROWS] * num_layers,
            sparse_rows=sparse[self._ROWS] * choosing,
            kv_bytes_read=listed + self.num_kv_heads * read,
            kv_bytes_dense=self.num_kv_heads * num_layers * whole,
        )
        return stats, self.layers.served(*(kind[self._ROWS] for kind in kinds))

    def _whole(self, tokens: int, blocks: int) -> int:
        """Bytes that rows read in one KV head when they attend to everything."""
        return self.layout.attended_bytes(tokens, blocks * BLOCK_SIZE, blocks)

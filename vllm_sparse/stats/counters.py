# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Counters on the model's device: a GPU adds to its own, and nobody waits for it."""

from dataclasses import dataclass

import torch

from ..cache.layout import BLOCK_SIZE, BlockLayout
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

    decode_tokens: int = 0  # query positions, once per step and group of layers
    decode_rows: int = 0  # the same, counted in every layer
    sparse_rows: int = 0  # of these, the ones that read less than everything
    kv_bytes_read: int = 0
    kv_bytes_dense: int = 0  # what dense attention reads in the model's dtype


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


class DeviceCounter:
    """Counts decode rows on a GPU without waiting for it.

    Which rows are sparse is known before the kernels run, so one step's rows are
    counted once, for all layers of a group; kernels count what sparse rows keep.
    """

    # Rows of :attr:`counts`.
    _SPARSE, _SHORT, _COVERED, _PREFILL = range(4)
    SIZE = 12

    def __init__(
        self,
        device: torch.device,
        layers: LayerKinds,
        num_kv_heads: int,
        layout: BlockLayout,
        block_score_bytes: int,
        row_score_bytes: int,
        dense_below: int,
        kept: KeptHistograms,
    ) -> None:
        """
        Args:
            block_score_bytes: bytes read to score one block in one KV head.
            row_score_bytes: further bytes of a sparse row in one KV head.
            dense_below: contexts shorter than this are dense.
        """
        self.layers, self.dense_below = layers, dense_below
        self.num_kv_heads, self.layout = num_kv_heads, layout
        self.block_score_bytes = block_score_bytes
        self.row_score_bytes = row_score_bytes
        self.kept, self.kept_before = kept, kept.total()
        # By kind of row: rows, tokens of their contexts, sealed blocks.
        with torch.inference_mode():
            self.counts = torch.zeros(4, 3, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def add(
        self,
        seq_lens: torch.Tensor,
        budgets: torch.Tensor,
        slots: torch.Tensor,
        prefilling: torch.Tensor | None = None,
    ) -> None:
        """Count one step's rows; rows without a slot are padding.

        Args:
            seq_lens, budgets, slots: [num_rows].
            prefilling: [num_rows] bool, rows of prompts; None: there are none.
        """
        real = slots >= 0
        lens = seq_lens * real
        blocks = self.layout.fmt.sealed_blocks(lens).clamp_(min=0)
        rows = torch.stack((real, lens, blocks), 1).long()
        # 0 with a budget, else 1 or 2.
        kinds = (budgets < 0) * ((seq_lens >= self.dense_below) + 1)
        if prefilling is not None:
            kinds.masked_fill_(prefilling, self._PREFILL)
        self.counts.index_add_(0, kinds, rows)

    @torch.inference_mode()  # as the engine's steps, which share the tensor
    def reset(self) -> None:
        self.counts.zero_()
        self.kept_before = self.kept.total()

    def values(self) -> torch.Tensor:
        """[SIZE + 1] int64 on the device: what :meth:`totals` reads."""
        return torch.cat((self.counts.flatten(), self.kept.sum()[-1:]))

    def totals(self, values: list[int]) -> tuple[SparseStats, dict[str, int]]:
        """Totals, and rows by how they are served.

        Args:
            values: :meth:`values` of now or before.
        """
        kinds = [values[i : i + 3] for i in range(0, self.SIZE, 3)]
        sparse = kinds[self._SPARSE]
        dense = [sum(column) for column in zip(*kinds[1:])]
        rows = [sum(column) for column in zip(*kinds)]
        kept = values[self.SIZE] - self.kept_before  # of all layers and KV heads
        scores = sparse[2] * self.block_score_bytes + sparse[0] * self.row_score_bytes
        # What each of the layers and KV heads of one kind reads.
        choosing, num_layers = self.layers.choosing, self.layers.choosing
        num_layers += self.layers.dense
        read = choosing * (self._whole(dense) + scores)
        read += self.layers.dense * self._whole(rows)
        items = choosing * self.num_kv_heads
        # In quantised formats all sealed blocks may hold a token that is kept.
        sealed = kept - items * self._tail(sparse)
        listed = self.layout.attended_bytes(kept, sealed, items * sparse[2])
        stats = SparseStats(
            decode_tokens=rows[0],
            decode_rows=rows[0] * num_layers,
            sparse_rows=sparse[0] * choosing,
            kv_bytes_read=listed + self.num_kv_heads * read,
            kv_bytes_dense=self.num_kv_heads
            * num_layers
            * rows[1]
            * self.layout.row_bytes,
        )
        served = self.layers.served(
            sparse[0],
            kinds[self._SHORT][0],
            kinds[self._COVERED][0],
            kinds[self._PREFILL][0],
        )
        return stats, served

    def _tail(self, count: list[int]) -> int:
        """Tokens of these rows that no sealed block holds."""
        return count[1] - count[2] * BLOCK_SIZE

    def _whole(self, count: list[int]) -> int:
        """Bytes that these rows read when they attend to everything."""
        sealed = count[2] * BLOCK_SIZE
        return self.layout.attended_bytes(count[1], sealed, count[2])

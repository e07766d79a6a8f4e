# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What decoding read: counted where it is read, so that inactivity cannot hide."""

import time
from dataclasses import asdict, dataclass, field
from weakref import WeakSet

import torch

from ..cache.layout import BLOCK_SIZE, BlockLayout
from ..compat.vllm import init_logger
from ..ops.kept import KEPT_BINS, summary

logger = init_logger(__name__)

LOG_INTERVAL_SECONDS = 30.0


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

    def __init__(
        self,
        device: torch.device,
        num_layers: int,
        sparse_layers: int,
        num_kv_heads: int,
        layout: BlockLayout,
        block_score_bytes: int,
        row_score_bytes: int,
        kept: "KeptHistograms",
    ) -> None:
        """
        Args:
            sparse_layers: layers of the group that choose tokens.
            block_score_bytes: bytes read to score one block in one KV head.
            row_score_bytes: further bytes of a sparse row in one KV head.
        """
        self.num_layers, self.sparse_layers = num_layers, sparse_layers
        self.num_kv_heads, self.layout = num_kv_heads, layout
        self.block_score_bytes = block_score_bytes
        self.row_score_bytes = row_score_bytes
        self.kept, self.kept_before = kept, kept.total()
        # Of sparse rows, and of all: rows, tokens of their contexts, sealed blocks.
        with torch.inference_mode():
            self.counts = torch.zeros(2, 3, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def add(
        self, seq_lens: torch.Tensor, budgets: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Count one step's rows; rows without a slot are padding."""
        real = slots >= 0
        lens = seq_lens * real
        blocks = self.layout.fmt.sealed_blocks(lens).clamp_(min=0)
        rows = torch.stack((real, lens, blocks))
        self.counts[0] += (rows * (budgets >= 0)).sum(1)
        self.counts[1] += rows.sum(1)

    @torch.inference_mode()  # as the engine's steps, which share the tensor
    def reset(self) -> None:
        self.counts.zero_()
        self.kept_before = self.kept.total()

    def totals(self) -> SparseStats:
        """Waits for the device."""
        sparse, rows = self.counts.tolist()
        dense = [count - part for count, part in zip(rows, sparse)]
        kept = self.kept.total() - self.kept_before  # of all layers and KV heads
        scores = sparse[2] * self.block_score_bytes + sparse[0] * self.row_score_bytes
        # What each of the layers and KV heads of one kind reads.
        read = self.sparse_layers * (self._whole(dense) + scores)
        read += (self.num_layers - self.sparse_layers) * self._whole(rows)
        items = self.sparse_layers * self.num_kv_heads
        # In quantised formats all sealed blocks may hold a token that is kept.
        sealed = kept - items * self._tail(sparse)
        listed = self.layout.attended_bytes(kept, sealed, items * sparse[2])
        return SparseStats(
            decode_tokens=rows[0],
            decode_rows=rows[0] * self.num_layers,
            sparse_rows=sparse[0] * self.sparse_layers,
            kv_bytes_read=listed + self.num_kv_heads * read,
            kv_bytes_dense=self.num_kv_heads
            * self.num_layers
            * rows[1]
            * self.layout.row_bytes,
        )

    def _tail(self, count: list[int]) -> int:
        """Tokens of these rows that no sealed block holds."""
        return count[1] - count[2] * BLOCK_SIZE

    def _whole(self, count: list[int]) -> int:
        """Bytes that these rows read when they attend to everything."""
        sealed = count[2] * BLOCK_SIZE
        return self.layout.attended_bytes(count[1], sealed, count[2])


@dataclass
class StatsRecorder:
    """Accumulates :class:`SparseStats`; ops add to ``tokens_read`` themselves."""

    totals: SparseStats = field(default_factory=SparseStats)
    # Of the current step and layer, summed over KV heads: tokens attended, those of
    # them in sealed blocks, and these blocks.
    tokens_read: torch.Tensor = field(
        default_factory=lambda: torch.zeros(3, dtype=torch.int64)
    )
    # Of builders that are alive: vLLM makes some to measure its memory and drops them.
    counters: WeakSet[DeviceCounter] = field(default_factory=WeakSet)
    histograms: WeakSet[KeptHistograms] = field(default_factory=WeakSet)
    _last_log: float = field(default_factory=time.monotonic)
    _logged_tokens: int = 0

    def add_layer(
        self,
        num_rows: int,
        sparse_rows: int,
        score_bytes: int,
        layout: BlockLayout,
        context_tokens: int,
    ) -> None:
        """Account for one layer of one step and clear ``tokens_read``.

        Args:
            score_bytes: bytes read to choose tokens, all KV heads.
            context_tokens: sum over rows and KV heads of the context length.
        """
        totals = self.totals
        totals.decode_rows += num_rows
        totals.sparse_rows += sparse_rows
        attended = layout.attended_bytes(*self.tokens_read.tolist())
        totals.kv_bytes_read += score_bytes + attended
        totals.kv_bytes_dense += context_tokens * layout.row_bytes
        self.tokens_read.zero_()

    def replace_counter(self, old: DeviceCounter | None, new: DeviceCounter) -> None:
        """Count with ``new`` from here on; what ``old`` counted is kept."""
        if old is not None:
            self._collect(old)
            self.counters.discard(old)
        self.counters.add(new)

    def _collect(self, counter: DeviceCounter) -> None:
        for name, count in asdict(counter.totals()).items():
            setattr(self.totals, name, getattr(self.totals, name) + count)
        counter.reset()

    def snapshot(self) -> dict[str, int]:
        for counter in self.counters:
            self._collect(counter)
        return asdict(self.totals)

    def kept_tokens(self) -> dict[str, torch.Tensor]:
        """[num_kv_heads, KEPT_BINS] int64 on the CPU, by layer."""
        result: dict[str, torch.Tensor] = {}
        for group in self.histograms:
            for name, counts in zip(group.by_layer, group.counts.cpu()):
                result[name] = result.get(name, 0) + counts
        return result

    def reset(self) -> None:
        for group in self.histograms:
            group.reset()
        for counter in self.counters:
            counter.reset()
        self.totals = SparseStats()
        self._logged_tokens = 0

    def log_now_and_then(self) -> None:
        """One line every LOG_INTERVAL_SECONDS of decoding; that one waits for GPUs."""
        now = time.monotonic()
        if now - self._last_log < LOG_INTERVAL_SECONDS:
            return
        self._last_log = now
        self.snapshot()
        totals = self.totals
        if totals.decode_tokens == self._logged_tokens or not totals.kv_bytes_dense:
            return
        self._logged_tokens = totals.decode_tokens
        # Groups of layers may differ in their KV heads.
        layers = [heads.sum(0) for heads in self.kept_tokens().values()]
        kept = summary(sum(layers, torch.zeros(KEPT_BINS, dtype=torch.int64)))
        logger.info(
            "Sparse attention: %d decode tokens, %.1f %% of decode rows sparse, "
            "%.1f %% of the KV bytes read; sparse rows keep %.0f tokens per KV head in "
            "the mean (p50 %.0f, p99 %.0f)",
            totals.decode_tokens,
            100 * totals.sparse_rows / totals.decode_rows,
            100 * totals.kv_bytes_read / totals.kv_bytes_dense,
            kept.mean,
            kept.p50,
            kept.p99,
        )


recorder = StatsRecorder()


class WorkerExtension:
    """Worker methods for ``LLM(worker_extension_cls=...)`` and ``collective_rpc``."""

    def sparse_stats(self) -> dict[str, int]:
        """Totals of this worker: the fields of :class:`SparseStats`."""
        return recorder.snapshot()

    def sparse_kept_tokens(self) -> dict[str, list[dict[str, float]]]:
        """Tokens that sparse rows kept since the last reset, per KV head, by layer:
        the fields of :class:`vllm_sparse.ops.kept.KeptTokens`."""
        return {
            name: [asdict(summary(head)) for head in heads]
            for name, heads in recorder.kept_tokens().items()
        }

    def sparse_kept_histograms(self) -> dict[str, list[list[int]]]:
        """The same as counts: [num_kv_heads][KEPT_BINS], by layer."""
        return {name: heads.tolist() for name, heads in recorder.kept_tokens().items()}

    def reset_sparse_stats(self) -> None:
        recorder.reset()

    def reconfigure_sparse(self, options: dict) -> None:
        """Switch the running engine to other options; for evaluation, between requests.

        Args:
            options: as under ``additional_config["sparse"]``.

        Raises:
            SparseConfigError: when they cannot be taken; nothing is changed then.
        """
        from ..config import NAMESPACE, SparseConfig
        from .builder import SparseMetadataBuilder
        from .impl import SparseAttentionImpl

        given = {NAMESPACE: options}
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        parts = [getattr(layer, "impl", None) for layer in layers]
        for groups in self.model_runner.attn_groups:
            for group in groups:
                parts += group.metadata_builders
        ours = (SparseAttentionImpl, SparseMetadataBuilder)
        parts = [part for part in parts if isinstance(part, ours)]
        configs = [
            SparseConfig.from_additional_config(given, part.defaults) for part in parts
        ]
        for part, config in zip(parts, configs):
            part.check(config)
        for part, config in zip(parts, configs):
            part.configure(config)

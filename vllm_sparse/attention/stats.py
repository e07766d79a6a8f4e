# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What decoding read: counted where it is read, so that inactivity cannot hide."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from weakref import WeakSet

import torch

from ..cache.layout import BlockLayout
from ..ops.kept import summary
from .counters import DeviceCounter, KeptHistograms, LayerKinds, SparseStats


@dataclass
class StatsRecorder:
    """Accumulates :class:`SparseStats`; ops add to ``tokens_read`` themselves."""

    totals: SparseStats = field(default_factory=SparseStats)
    # Rows by how they were served, see counters.DENSE_REASONS.
    served: Counter[str] = field(default_factory=Counter)
    # Of the current step and layer, summed over KV heads: tokens attended, those of
    # them in sealed blocks, and these blocks.
    tokens_read: torch.Tensor = field(
        default_factory=lambda: torch.zeros(3, dtype=torch.int64)
    )
    # Of builders that are alive: vLLM makes some to measure its memory and drops them.
    counters: WeakSet[DeviceCounter] = field(default_factory=WeakSet)
    histograms: WeakSet[KeptHistograms] = field(default_factory=WeakSet)
    resets: int = 0

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

    def add_rows(self, layers: LayerKinds, **rows: int) -> None:
        """Account for one step's rows in all layers; arguments of ``served``."""
        for name, count in layers.served(**rows).items():
            self.served[name] += count

    def replace_counter(self, old: DeviceCounter | None, new: DeviceCounter) -> None:
        """Count with ``new`` from here on; what ``old`` counted is kept."""
        if old is not None:
            (found,) = self.device_totals([old])
            self.totals = added(self.totals, found[0])
            self.served.update(found[1])
            old.reset()
            self.counters.discard(old)
        self.counters.add(new)

    @staticmethod
    def device_totals(
        counters: list[DeviceCounter],
    ) -> Iterator[tuple[SparseStats, dict[str, int]]]:
        """Totals of each counter; waits for the device."""
        with torch.inference_mode():
            for counter in counters:
                yield counter.totals(counter.values().tolist())

    def snapshot(self) -> dict[str, int]:
        totals = self.totals
        for found, _ in self.device_totals(list(self.counters)):
            totals = added(totals, found)
        return asdict(totals)

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
        self.served.clear()
        self.resets += 1


def added(totals: SparseStats, more: SparseStats) -> SparseStats:
    first, second = asdict(totals), asdict(more)
    return SparseStats(**{name: first[name] + second[name] for name in first})


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

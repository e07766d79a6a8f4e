# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What decoding read: rows counted once a step, lengths of lists by the kernels."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from weakref import WeakSet

import torch

from .counters import KeptHistograms, LayerKinds, SparseStats, StepCounter


@dataclass
class StatsRecorder:
    """Adds up what the counters of this process say."""

    # Of counters that were replaced.
    totals: SparseStats = field(default_factory=SparseStats)
    # Rows by how they were served, see counters.DENSE_REASONS.
    served: Counter[str] = field(default_factory=Counter)
    # Of builders that are alive: vLLM makes some to measure its memory and drops them.
    counters: WeakSet[StepCounter] = field(default_factory=WeakSet)
    histograms: WeakSet[KeptHistograms] = field(default_factory=WeakSet)
    # Of states, by samples: see methods.base.DecodeRows.
    states: Counter[str] = field(default_factory=Counter)
    resets: int = 0

    def add_rows(self, layers: LayerKinds, **rows: int) -> None:
        """Account for one step's rows in all layers; arguments of ``served``."""
        for name, count in layers.served(**rows).items():
            self.served[name] += count

    def replace_counter(self, old: StepCounter | None, new: StepCounter) -> None:
        """Count with ``new`` from here on; what ``old`` counted is kept."""
        if old is not None:
            (found,) = self.device_totals([old])
            self.totals = added(self.totals, found[0])
            self.served.update(found[1])
            old.reset()
            self.counters.discard(old)
            new.counts = old.counts  # graphs of drafts add to it
        self.counters.add(new)

    @staticmethod
    def device_totals(
        counters: list[StepCounter],
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
        self.states.clear()
        self.resets += 1


def added(totals: SparseStats, more: SparseStats) -> SparseStats:
    first, second = asdict(totals), asdict(more)
    return SparseStats(**{name: first[name] + second[name] for name in first})


recorder = StatsRecorder()

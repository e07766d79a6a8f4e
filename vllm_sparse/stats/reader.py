# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A worker's share of the live figures, read without making a GPU idle."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ops.kept import KEPT_BINS
from .counters import StepCounter
from .recorder import StatsRecorder, recorder


@dataclass
class LiveReader:
    """Reads a recorder; on a GPU by copies that it looks at when they have arrived."""

    recorder: StatsRecorder
    _last: dict[str, int] = field(default_factory=dict)
    # Of the copy under way: has it arrived; what it says.
    _arrived: Callable[[], bool] | None = None
    _finish: Callable[[], dict[str, int]] | None = None
    _resets: int = 0

    @torch.inference_mode()
    def read(self, wait: bool) -> dict[str, int]:
        """Counts since the last reset, by the names of ``Figures.of_counts``.

        Args:
            wait: for the device, so that they are of now; else they can be as old as
                the call before.
        """
        if self._resets != self.recorder.resets:
            self._resets, self._last, self._arrived = self.recorder.resets, {}, None
        counters = list(self.recorder.counters)
        groups = list(self.recorder.histograms)
        if not groups:
            return self._counts(counters, [])
        tensor = torch.cat(
            [*(counter.values() for counter in counters), *(g.sum() for g in groups)]
        )
        if wait or tensor.device.type == "cpu":
            self._arrived = None
            self._last = self._counts(counters, tensor.tolist())
            return self._last
        if self._arrived is not None:
            if not self._arrived():
                return self._last
            self._last = self._finish()
        with torch.cuda.device(tensor.device):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.current_stream().record_event().query
        # What the host has counted belongs to the moment of the copy.
        on_host = self._on_host()
        self._finish = lambda: self._counts(counters, host.tolist(), on_host)
        return self._last

    def _on_host(self) -> Counter[str]:
        totals = self.recorder.totals
        counts = Counter(
            kv_bytes_read=totals.kv_bytes_read, kv_bytes_dense=totals.kv_bytes_dense
        )
        counts.update({f"rows_{k}": n for k, n in self.recorder.served.items()})
        counts.update(self.recorder.states)
        return counts

    def _counts(
        self,
        counters: list[StepCounter],
        values: list[int],
        on_host: Counter[str] | None = None,
    ) -> dict[str, int]:
        counts = self._on_host() if on_host is None else on_host
        size = StepCounter.SIZE
        for i, counter in enumerate(counters):
            stats, served = counter.totals(values[i * size : (i + 1) * size])
            counts["kv_bytes_read"] += stats.kv_bytes_read
            counts["kv_bytes_dense"] += stats.kv_bytes_dense
            counts.update({f"rows_{name}": count for name, count in served.items()})
        histograms = values[len(counters) * size :]
        for i, count in enumerate(histograms):
            counts[f"kept_{i % KEPT_BINS}"] += count
        return {name: count for name, count in counts.items() if count}


_reader = LiveReader(recorder)


def report(worker, wait: bool) -> dict[str, Any]:
    """Run in a worker: its counts, under ``tp_rank`` which heads they are of, and under
    ``resets`` how often they began anew; or ``error``, what went wrong.

    Args:
        worker: the worker or vLLM's wrapper of it, as ``collective_rpc`` gives it.
        wait: as in :meth:`LiveReader.read`.
    """
    from vllm.distributed import parallel_state

    tp_rank = 0
    if parallel_state.model_parallel_is_initialized():
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
    try:
        counts = _reader.read(wait)
    except Exception as error:
        # Raised here it would leave other ranks' answers unread, and vLLM would take
        # them for answers to what it asks next.
        return {"error": f"{type(error).__name__}: {error}"}
    return counts | {"tp_rank": tp_rank, "resets": recorder.resets}

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""In the front end: the figures as Prometheus metrics beside vLLM's.

Counters add up over API servers (each report goes to one of them), so everything that
dashboards compute comes from these. Gauges say the same of the last report alone.
"""

from contextlib import suppress

from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger

from ..plugin.channel import take
from ..plugin.versions import init_logger
from .counters import DENSE_REASONS
from .figures import Figures

logger = init_logger(__name__)

# le -> bins that it is the upper end of: half octaves, from 16 tokens to 256 Ki. A bin
# ends below the next one's first count.
BUCKETS = {
    str(2**exponent * (8 + step) // 8 - 1): 8 * exponent + step
    for exponent in range(4, 19)
    for step in (0, 4)
}
COUNTERS = {
    "rows_sparse": "Decode rows (query positions, in each layer) served sparse.",
    "kv_bytes_read": "Bytes of KV cache that decode rows read, all KV heads.",
    "kv_bytes_dense": "Bytes that dense decoding reads for the same tokens.",
    "kv_bytes_saved": "The difference, where it is one.",
    "kept_tokens_sum": "Tokens that sparse rows kept, all KV heads.",
}
GAUGES = {
    "sparse_row_share": "Share of decode rows served sparse, in the last report.",
    "kv_read_fraction": "Fraction of the KV bytes read by decoding, likewise.",
    "kept_tokens_p50": "Tokens kept per sparse row and KV head: median, likewise.",
    "kept_tokens_p99": "The same: 99th percentile.",
}
# Of lossless engines alone.
LOSSLESS_COUNTERS = {
    "verifications": "Passes of one request that verified drafted tokens.",
    "drafted_tokens": "Drafted tokens that were verified.",
    "accepted_tokens": "Of these, the ones that became the answer.",
}
LOSSLESS_GAUGES = {
    "accepted_length": "Tokens per verification of drafts, in the last report.",
    "draft_acceptance": "Share of drafted tokens that were accepted, likewise.",
    "drafts_now": "Tokens that a request drafts at a time, at present.",
}
# Of engines whose requests give blocks back.
EVICTING_COUNTERS = {
    "blocks_given_back": "Blocks that requests gave back while they ran.",
    "state_rows": "Rows of the sample in which states' shares are counted (CPUs).",
    "state_share_ppm": "Shares of the mass that states carried there, in millionths.",
}
EVICTING_GAUGES = {
    "requests_holding": "Requests that hold blocks, at present.",
    "kv_bytes_held_mean": "Bytes of KV cache that a request holds, states included.",
    "kv_bytes_held_most": "The same of the request that holds most.",
    "state_share": "Share of the attention mass that states carried, last report.",
}
# Of an earlier engine of this process.
_registered: list = []


class SparseStatLogger(AggregateStatLoggerBase):
    """One of vLLM's statistics loggers; errors switch it off, no more."""

    def __init__(
        self,
        vllm_config,
        engine_indexes: list[int],
        beside: PrometheusStatLogger,
        lossless: bool = False,
        evicting: bool = False,
    ) -> None:
        """
        Args:
            engine_indexes: of the engines whose statistics come here.
            beside: vLLM's logger, whose labels and metric classes are used.
            lossless: the engines draft, and have the metrics of that.
            evicting: their requests give blocks back; likewise.
        """
        while _registered:
            with suppress(KeyError):
                REGISTRY.unregister(_registered.pop())
        self._working = True
        self._labels = beside.per_engine_labelvalues
        self._beside = beside
        counter = beside._counter_cls
        counters = COUNTERS | (LOSSLESS_COUNTERS if lossless else {})
        counters |= EVICTING_COUNTERS if evicting else {}
        gauges = GAUGES | (LOSSLESS_GAUGES if lossless else {})
        gauges |= EVICTING_GAUGES if evicting else {}
        self._counters = {n: self._make(counter, n, d) for n, d in counters.items()}
        self._dense = self._make(
            counter, "rows_dense", "Rows served dense, by reason.", "reason"
        )
        # A histogram can only be observed one value at a time; the rate of these
        # counters goes into histogram_quantile just as well.
        self._kept = self._make(
            counter,
            "kept_tokens_bucket",
            "Sparse rows, in each KV head, that kept at most `le` tokens.",
            "le",
        )
        # Gauges appear with the first report: before it there is no share.
        self._gauges = {
            name: self._make(
                beside._gauge_cls, name, text, multiprocess_mode="mostrecent"
            )
            for name, text in gauges.items()
        }
        for index in engine_indexes:
            self._count(index, Figures.of_counts({}))

    def _make(self, cls, name: str, documentation: str, *labels: str, **kwargs):
        metric = cls(
            name=f"vllm_sparse:{name}",
            documentation=documentation,
            labelnames=["model_name", "engine", *labels],
            **kwargs,
        )
        _registered.append(metric)
        return metric

    def record(
        self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is None:
            return
        try:
            counts = take(scheduler_stats)
            if counts and self._working:
                figures = Figures.of_counts(counts)
                self._count(engine_idx, figures)
                self._show(engine_idx, figures)
        except Exception:
            self._working = False
            logger.exception("vllm_sparse:* metrics end here (serving goes on).")

    def log_engine_initialized(self) -> None:
        pass

    def _count(self, engine: int, figures: Figures) -> None:
        labels = self._labels[engine]
        counts = {
            "rows_sparse": figures.rows_sparse,
            "kv_bytes_read": figures.kv_bytes_read,
            "kv_bytes_dense": figures.kv_bytes_dense,
            # Counters do not fall: codes that cost more than they save are left out.
            "kv_bytes_saved": max(0, figures.kv_bytes_saved),
            "kept_tokens_sum": figures.kept[-1],
            "verifications": figures.verifications,
            "drafted_tokens": figures.drafted_tokens,
            "accepted_tokens": figures.accepted_tokens,
            **{name: getattr(figures, name) for name in EVICTING_COUNTERS},
        }
        for name, metric in self._counters.items():
            metric.labels(*labels).inc(counts[name])
        for reason in DENSE_REASONS:
            self._dense.labels(*labels, reason).inc(figures.rows_dense[reason])
        for bound, end in BUCKETS.items():
            self._kept.labels(*labels, bound).inc(sum(figures.kept[:end]))
        self._kept.labels(*labels, "+Inf").inc(sum(figures.kept[:-1]))

    def _show(self, engine: int, figures: Figures) -> None:
        values = {
            "sparse_row_share": figures.sparse_share,
            "kv_read_fraction": figures.kv_fraction,
            "accepted_length": figures.accepted_length,
            "draft_acceptance": figures.draft_acceptance,
            "drafts_now": figures.drafts_now,
            "requests_holding": figures.requests_holding,
            # What is over would otherwise stand for ever.
            "kv_bytes_held_mean": figures.kv_bytes_held_mean or 0,
            "kv_bytes_held_most": figures.kv_bytes_held_most,
            "state_share": figures.state_share,
        }
        if figures.kept_tokens.rows:
            values["kept_tokens_p50"] = figures.kept_tokens.p50
            values["kept_tokens_p99"] = figures.kept_tokens.p99
        for name, value in values.items():
            if value is not None and name in self._gauges:
                self._gauges[name].labels(*self._labels[engine]).set(value)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Live figures without an engine: what adds up, is sent, and breaks nothing."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

import prometheus_client  # noqa: E402
from vllm.v1.engine import EngineCoreOutputs  # noqa: E402
from vllm.v1.metrics.stats import SchedulerStats  # noqa: E402
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder  # noqa: E402

from vllm_sparse import plugin  # noqa: E402
from vllm_sparse.cache.layout import BlockLayout  # noqa: E402
from vllm_sparse.methods.base import ScoreBytes
from vllm_sparse.ops.kept import KEPT_BINS, add_counts  # noqa: E402
from vllm_sparse.plugin import channel as carrier  # noqa: E402
from vllm_sparse.plugin import live
from vllm_sparse.stats import Figures, live_figures, reporter  # noqa: E402
from vllm_sparse.stats import reader as attention_live  # noqa: E402
from vllm_sparse.stats.counters import KeptHistograms, LayerKinds, StepCounter
from vllm_sparse.stats.figures import add_up  # noqa: E402
from vllm_sparse.stats.prometheus import BUCKETS, SparseStatLogger  # noqa: E402
from vllm_sparse.stats.reader import LiveReader  # noqa: E402
from vllm_sparse.stats.recorder import StatsRecorder  # noqa: E402

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana_dashboard.json"


def kept(groups: KeptHistograms, counts: list[list[int]]) -> None:
    for histogram in groups.by_layer.values():
        add_counts(torch.tensor(counts, dtype=torch.int32), histogram)


def test_a_row_has_one_reason():
    kinds = LayerKinds(choosing=10, dense=2, unsupported=3)
    assert kinds.served(sparse=4, short=1, covered=2, prefill=100) == {
        "sparse": 40,
        "short_context": 10,
        "budget_covers_context": 20,
        "dense_layer": 14,
        "unsupported_layer": 21,
        "prefill": 1500,
    }


def test_ranks_share_rows_and_divide_heads():
    rank = {"rows_sparse": 5, "rows_prefill": 2, "kv_bytes_read": 10, "kept_7": 3}
    stages = [rank | {"tp_rank": tp} for tp in (0, 1) for _ in range(2)]
    assert add_up(stages) == {
        "rows_sparse": 10,
        "rows_prefill": 4,
        "kv_bytes_read": 40,
        "kept_7": 12,
    }
    # With external launchers an engine sees one rank, whichever it is.
    assert add_up([rank | {"tp_rank": 1}]) == rank


def test_reading_covers_the_device_and_the_host():
    recorder, device = StatsRecorder(), torch.device("cpu")
    kinds, groups = LayerKinds(2, 1), KeptHistograms(["a", "b"], 3, device)
    counter = StepCounter(
        device, kinds, 3, BlockLayout(64, 2), ScoreBytes(0, 0, 100), 200, False, groups
    )
    recorder.histograms.add(groups)
    recorder.replace_counter(None, counter)
    lens = torch.tensor([500, 150, 300, 10, 0], dtype=torch.int32)
    budgets = torch.tensor([60, -1, -1, -1, -1], dtype=torch.int32)
    slots = torch.tensor([7, 8, 9, 10, -1])
    prompt = torch.tensor([False, False, False, True, False])
    counter.add(lens, budgets, slots, prompt)
    kept(groups, [[60, 61, 60], [-1, -1, -1]])
    recorder.add_rows(kinds, prefill=100)
    recorder.totals.kv_bytes_read = 1
    counts = LiveReader(recorder).read(wait=True)
    row = 2 * 64 * 2
    everything = 3 * row * (500 + 150 + 300 + 10)  # of one layer
    assert {k: n for k, n in counts.items() if not k.startswith("kept")} == {
        "rows_sparse": 2,
        "rows_short_context": 2,
        "rows_budget_covers_context": 2,
        "rows_dense_layer": 3,
        "rows_prefill": 3 * 101,
        "kv_bytes_read": 1
        + everything
        + 2 * (3 * row * (150 + 300 + 10) + row * 181 + 3 * 3 * 100),
        "kv_bytes_dense": 3 * everything,
    }
    figures = Figures.of_counts(counts)
    assert figures.kept_tokens.rows == 2 * 3 and figures.kept[-1] == 2 * 181
    assert figures.decode_rows == 9 and figures.sparse_share == 2 / 9
    assert recorder.snapshot()["decode_rows"] == 4 * 3
    recorder.reset()
    assert LiveReader(recorder).read(wait=False) == {}


class Engine:
    """Stands for scheduler and executor of an engine core."""

    def __init__(self, **settings) -> None:
        self.counts, self.idle, self.asked = Counter(), False, []
        self.asleep, self.resets = False, 0
        self.reporter = reporter.Reporter(
            make_stats=self.make_stats,
            collective_rpc=self.rpc,
            is_idle=lambda: self.idle,
            is_asleep=lambda: self.asleep,
            engine_index=3,
            **{"log_stats": True} | settings,
        )

    def make_stats(self, *args) -> SchedulerStats:
        return SchedulerStats(num_kv_fetch_reqs_by_stage={"waiting": 1})

    def rpc(self, method, args, non_block=False):
        self.asked.append(args[0])
        replies = [dict(self.counts) | {"tp_rank": 0, "resets": self.resets}]
        if not non_block:
            return replies
        return SimpleNamespace(done=lambda: True, result=lambda: replies)

    def step(self, **new: int) -> dict[str, int]:
        self.counts.update(new)
        stats = self.reporter.make_stats("outputs")
        found = carrier.take(stats)
        assert stats.num_kv_fetch_reqs_by_stage == {"waiting": 1}
        return found


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(reporter.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def lines(monkeypatch):
    lines = []
    for level in ("info", "exception"):
        add = lambda text, *args: lines.append(text % args)
        monkeypatch.setattr(reporter.logger, level, add)
    return lines


def test_workers_are_asked_at_intervals_and_when_the_engine_falls_idle(clock, lines):
    engine = Engine()
    engine.counts["rows_sparse"] = 7  # vLLM's warm-up
    engine.reporter.start()
    assert engine.step(rows_sparse=1) == {} and engine.asked == [True]
    clock.seconds += reporter.REPORT_SECONDS + 0.1
    assert engine.step(rows_sparse=1) == {}  # asked, not waited for
    assert engine.asked == [True, False]
    assert engine.step(rows_sparse=5) == {"rows_sparse": 2}
    engine.idle = True
    assert engine.step(rows_prefill=4) == {"rows_sparse": 5, "rows_prefill": 4}
    assert engine.step() == {}
    assert engine.reporter.figures() == {"rows_sparse": 7, "rows_prefill": 4}
    # Counts that were reset: from there on.
    engine.counts, engine.resets = Counter(rows_sparse=1), 1
    assert engine.step(rows_sparse=1) == {"rows_sparse": 2}
    assert engine.reporter.figures() == {"rows_sparse": 2}
    assert len(lines) == 1 and "Engine 003: sparse attention: 100.0% of 2" in lines[0]
    clock.seconds += reporter.LOG_SECONDS + 1
    engine.step(rows_short_context=8)
    assert "46.7% of 15 decode rows sparse; rows served dense: 4 pre" in lines[1]


def test_sleeping_workers_are_left_alone(clock, lines):
    engine = Engine()
    engine.reporter.start()
    engine.idle = engine.asleep = True
    clock.seconds += reporter.REPORT_SECONDS + 0.1
    assert engine.step(rows_sparse=1) == {} and engine.asked == [True]
    with pytest.raises(RuntimeError, match="wake it up first"):
        engine.reporter.figures()
    engine.asleep = False
    assert engine.step() == {"rows_sparse": 1} and "end here" not in lines[0]


def test_without_statistics_there_is_the_log_alone(clock, lines):
    engine = Engine(log_stats=False)
    engine.reporter.start()
    engine.idle = True
    engine.step(rows_sparse=1)
    assert engine.asked == [True]
    clock.seconds += reporter.LOG_SECONDS + 1
    engine.step()
    engine.step()
    assert engine.asked == [True, False] and len(lines) == 1


def test_errors_end_the_figures_and_nothing_else(clock, lines):
    engine = Engine()
    engine.reporter.start()
    engine.idle = True
    # vLLM describes an error, its workers are gone: they are not asked.
    assert engine.reporter.make_stats().num_running_reqs == 0
    assert engine.asked == [True]
    engine.counts["rows_sparse"] = "broken"
    assert engine.step() == {} and "end here" in lines[0]
    assert engine.step() == {} and len(lines) == 1


def test_a_worker_that_fails_answers_all_the_same(clock, lines, monkeypatch):
    def broken(wait):
        raise MemoryError("no room")

    monkeypatch.setattr(attention_live._reader, "read", broken)
    reply = attention_live.report(None, wait=True)
    assert reply == {"error": "MemoryError: no room"}
    engine = Engine()
    engine.reporter.start()
    engine.idle = True
    engine.counts.update(reply)
    assert engine.step() == {} and "end here" in lines[0]


def test_the_older_ray_executor_is_waited_for():
    ask = live._waiting(lambda method, args: [method, *args])
    assert ask("report", args=(True,)) == ["report", True]
    future = ask("report", args=(False,), non_block=True)
    assert future.done() and future.result() == ["report", False]


def test_counts_survive_vllms_wire_format():
    sent = SchedulerStats()
    carrier.put(sent, {"rows_sparse": 2**50, "kept_9": 1})
    parts = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=sent))
    got = MsgpackDecoder(EngineCoreOutputs).decode(parts).scheduler_stats
    assert carrier.take(got) == {"rows_sparse": 2**50, "kept_9": 1}
    assert got == SchedulerStats()


@pytest.fixture
def stat_logger(request):
    """Parametrised: of lossless engines or not."""
    lossless = getattr(request, "param", False)
    beside = SimpleNamespace(
        per_engine_labelvalues={0: ["m", "0"], 1: ["m", "1"]},
        _counter_cls=prometheus_client.Counter,
        _gauge_cls=prometheus_client.Gauge,
    )
    SparseStatLogger(None, [0, 1], beside, lossless)  # of an engine before
    return SparseStatLogger(None, [0, 1], beside, lossless)


def metric(name: str, engine: int, **labels: str) -> float | None:
    labels = {"model_name": "m", "engine": str(engine)} | labels
    return prometheus_client.REGISTRY.get_sample_value(f"vllm_sparse:{name}", labels)


def test_metrics_count_every_engine_apart(stat_logger):
    for engine in (0, 1):
        assert metric("rows_sparse_total", engine) == 0
        assert metric("rows_dense_total", engine, reason="unsupported_layer") == 0
        assert metric("sparse_row_share", engine) is None
    groups = KeptHistograms(["a"], 1, torch.device("cpu"))
    kept(groups, [[100], [1024], [1023], [20_000], [900_000]])
    counts = {f"kept_{i}": n for i, n in enumerate(groups.sum().tolist()) if n}
    counts |= {"rows_sparse": 5, "rows_short_context": 15, "rows_prefill": 99}
    counts |= {"kv_bytes_read": 30, "kv_bytes_dense": 40}
    for _ in range(2):
        stats = SchedulerStats()
        carrier.put(stats, counts)
        stat_logger.record(stats, None, engine_idx=1)
        stat_logger.record(SchedulerStats(), None, engine_idx=0)
    assert metric("rows_sparse_total", 0) == 0
    assert metric("rows_sparse_total", 1) == 10
    assert metric("rows_dense_total", 1, reason="prefill") == 198
    assert metric("kv_bytes_saved_total", 1) == 20
    assert metric("sparse_row_share", 1) == 0.25
    assert metric("kv_read_fraction", 1) == 0.75
    assert metric("kept_tokens_sum_total", 1) == 2 * (100 + 1024 + 1023 + 920_000)
    for le, rows in {"95": 0, "127": 1, "1023": 2, "1535": 3, "+Inf": 5}.items():
        assert metric("kept_tokens_bucket_total", 1, le=le) == 2 * rows
    assert metric("kept_tokens_p50", 1) == pytest.approx(1024, rel=0.07)


def test_bounds_of_buckets_are_ends_of_bins():
    for bound, end in BUCKETS.items():
        ones = torch.tensor([[int(bound)], [int(bound) + 1]], dtype=torch.int32)
        histogram = torch.zeros(1, KEPT_BINS, dtype=torch.int64)
        add_counts(ones, histogram)
        assert histogram[0, :end].sum() == 1


def test_a_broken_report_ends_the_metrics_alone(stat_logger, monkeypatch):
    lines = []
    monkeypatch.setattr("vllm_sparse.stats.prometheus.logger.exception", lines.append)
    for _ in range(2):
        stats = SchedulerStats()
        carrier.put(stats, {"rows_sparse": "broken"})
        stat_logger.record(stats, None, engine_idx=0)
    assert len(lines) == 1 and stats == SchedulerStats()


def config(backend) -> SimpleNamespace:
    attention = SimpleNamespace(backend=backend, backend_per_kind=None)
    return SimpleNamespace(attention_config=attention)


def test_only_engines_of_ours_are_changed_and_never_broken(monkeypatch):
    plugin.register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    class Core:
        def __init__(self, vllm_config, *rest):
            self.rest = rest

    seen, lines = [], []

    def then(core, vllm_config):
        seen.append(core)
        raise RuntimeError("unlike what is pinned")

    monkeypatch.setattr(live.logger, "exception", lines.append)
    live._after_init(Core, then)
    live._after_init(Core, then)
    assert Core(config(AttentionBackendEnum.CPU_ATTN), 1).rest == (1,) and not seen
    core = Core(vllm_config=config(AttentionBackendEnum["SPARQ"]))
    assert seen == [core] and len(lines) == 1


def test_the_call_says_why_there_are_no_figures():
    plugin.register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    engine = SimpleNamespace(vllm_config=config(None), engine_core=object())
    llm = SimpleNamespace(llm_engine=engine)
    with pytest.raises(ValueError, match="choose attention_backend"):
        live_figures(llm)
    engine.vllm_config = config(AttentionBackendEnum["SPARQ"])
    with pytest.raises(RuntimeError, match="the engine's log"):
        live_figures(llm)


def test_figures_of_a_part_of_the_time():
    first = Figures.of_counts({"rows_sparse": 3, "rows_prefill": 5, "kept_9": 3})
    later = Figures.of_counts({"rows_sparse": 4, "rows_prefill": 5, "kept_9": 4})
    assert later - first == Figures.of_counts({"rows_sparse": 1, "kept_9": 1})
    assert str(first).startswith("100.0% of 3 decode rows sparse, sparse rows keep")
    assert str(first).endswith("; rows served dense: 5 prefill")
    assert str(Figures.of_counts({})) == "no decode rows yet; rows served dense: none"


@pytest.mark.parametrize("stat_logger", [True], indirect=True)
def test_the_dashboard_shows_metrics_that_exist(stat_logger):
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"vllm_sparse:\w+", target["expr"])
    }
    exported = prometheus_client.generate_latest().decode()
    assert asked and asked <= set(re.findall(r"^# TYPE (\S+)", exported, re.M))

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Live figures of lossless engines: drafts, and KV bytes beside dense decoding's."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

import prometheus_client  # noqa: E402
from vllm.v1.metrics.stats import SchedulerStats  # noqa: E402

from vllm_sparse.cache.layout import BlockLayout  # noqa: E402
from vllm_sparse.methods.base import ScoreBytes  # noqa: E402
from vllm_sparse.plugin import channel  # noqa: E402
from vllm_sparse.plugin.speculation import scheduler  # noqa: E402
from vllm_sparse.stats import Figures, reporter  # noqa: E402
from vllm_sparse.stats.counters import (  # noqa: E402
    KeptHistograms,
    LayerKinds,
    StepCounter,
)
from vllm_sparse.stats.prometheus import SparseStatLogger  # noqa: E402
from vllm_sparse.stats.recorder import StatsRecorder  # noqa: E402
from vllm_sparse.worker import WorkerExtension  # noqa: E402

from .test_live_figures import Engine, metric  # noqa: E402

COUNTS = {"verifications": 10, "drafted_tokens": 40, "accepted_tokens": 30}
DRAFTS = COUNTS | {"drafts_now": 4}


def counters() -> tuple[StepCounter, StepCounter]:
    """Of verifications and of drafts: 2 layers, 3 heads."""
    device, kinds = torch.device("cpu"), LayerKinds(2)
    groups = KeptHistograms(["a", "b"], 3, device)
    layout, cost = BlockLayout(64, 2), ScoreBytes(0, 0, 100)
    verify, draft = (
        StepCounter(device, kinds, 3, layout, cost, 200, True, groups, drafts=drafts)
        for drafts in (False, True)
    )
    return verify, draft


def test_dense_bytes_are_those_of_all_tokens_that_verifications_gave():
    verify, draft = counters()
    recorder = StatsRecorder()
    for counter in (verify, draft):
        recorder.replace_counter(None, counter)
    # Two requests verify two drafts each: all of the first's are right, no other.
    lens = torch.tensor([498, 499, 500, 298, 299, 300], dtype=torch.int32)
    dense = torch.full((6,), -1, dtype=torch.int32)
    last = torch.tensor([False, False, True] * 2)
    verify.add(lens, dense, torch.arange(6), last=last)
    ends = torch.tensor([500, 300], dtype=torch.int32)
    draft.add_accepted(ends, torch.tensor([2, 0], dtype=torch.int32))
    row = 2 * 64 * 2 * 2 * 3  # K, V; channels; bytes; layers; heads
    assert recorder.snapshot()["kv_bytes_dense"] == row * (3 * 500 + 300)
    recorder.reset()
    assert recorder.snapshot()["kv_bytes_dense"] == 0


def test_a_new_counter_counts_where_graphs_add():
    (_, old), (_, new) = counters(), counters()
    recorder, counts = StatsRecorder(), old.counts
    recorder.replace_counter(None, old)
    old.add_accepted(torch.tensor([100]), torch.tensor([1]))
    before = recorder.snapshot()
    recorder.replace_counter(old, new)
    assert recorder.snapshot() == before and before["kv_bytes_dense"] > 0
    with torch.inference_mode():
        counts[0, 0] += 7  # as a graph that was captured before
    assert recorder.snapshot()["decode_tokens"] == 7


def test_the_scheduler_counts_as_vllms_metrics_do():
    class Scheduler:
        def make_spec_decoding_stats(self, *args):
            return args

    class Drafting(scheduler._Drafting, Scheduler):
        def __init__(self) -> None:
            self.rule = scheduler.DraftRule([0, 4])
            self.drafted = Counter()

    drafting = Drafting()
    for name, accepted in (("a", 4), ("b", 1)):
        arguments = dict(num_draft_tokens=4, num_accepted_tokens=accepted)
        # A grammar did not allow the last two of b's.
        more = dict(num_invalid_spec_tokens={"b": 2}, request_id=name)
        got = drafting.make_spec_decoding_stats(None, **arguments, **more)
        assert got == (None, 4, accepted, {"b": 2}, name)
    assert drafting.drafted == {
        "verifications": 2,
        "drafted_tokens": 6,
        "accepted_tokens": 5,
    }


def test_the_number_of_drafts_is_that_of_the_last_step_with_requests():
    request = SimpleNamespace(num_tokens=5000, sampling_params=None)
    drafting = scheduler.DraftScheduler.__new__(scheduler.DraftScheduler)
    drafting.above, drafting.most, drafting.adapts = 2048, 4, False
    drafting.running = [request]
    assert drafting.number_of_drafts() == drafting.drafts_now == 4
    drafting.running = []
    assert drafting.number_of_drafts() == 0 and drafting.drafts_now == 4
    request.num_tokens, drafting.running = 100, [request]
    assert drafting.number_of_drafts() == drafting.drafts_now == 0


def test_reports_have_the_schedulers_counts_once(monkeypatch):
    lines = []
    add = lambda text, *args: lines.append(text % args)
    monkeypatch.setattr(reporter.logger, "info", add)
    drafting = SimpleNamespace(drafted=Counter(), drafts_now=0)
    engine = Engine(drafting=drafting)
    engine.reporter.start()
    engine.idle = True
    assert engine.step() == {}
    drafting.drafted.update(COUNTS)
    drafting.drafts_now = 4
    assert engine.step(rows_sparse=8) == {"rows_sparse": 8} | DRAFTS
    assert "4.00 tokens per verification (75.0% of 40 drafted tokens" in lines[0]
    assert engine.step() == {}
    # Workers that count anew do not make the scheduler do so.
    engine.counts, engine.resets = Counter(), 1
    drafting.drafts_now = 0
    assert engine.step(rows_sparse=1) == {"rows_sparse": 1, "drafts_now": 0}
    assert engine.reporter.figures() == {"rows_sparse": 1} | COUNTS | {"drafts_now": 0}


def test_figures_of_drafts():
    figures = Figures.of_counts(DRAFTS)
    assert figures.accepted_length == 4.0 and figures.draft_acceptance == 0.75
    part = figures - Figures.of_counts(COUNTS | {"verifications": 5})
    assert (part.verifications, part.drafted_tokens, part.drafts_now) == (5, 0, 4)
    assert part.accepted_length == 1.0 and part.draft_acceptance is None
    other = Figures.of_counts({"rows_sparse": 1})
    assert other.drafts_now is None and other.accepted_length is None
    assert "verification" not in str(other)


@pytest.mark.parametrize("lossless", [True, False])
def test_only_lossless_engines_have_the_metrics_of_drafts(lossless):
    beside = SimpleNamespace(
        per_engine_labelvalues={0: ["m", "0"]},
        _counter_cls=prometheus_client.Counter,
        _gauge_cls=prometheus_client.Gauge,
    )
    logger = SparseStatLogger(None, [0], beside, lossless)
    stats = SchedulerStats()
    channel.put(stats, {"rows_sparse": 1} | (DRAFTS if lossless else {}))
    logger.record(stats, None, engine_idx=0)
    assert metric("rows_sparse_total", 0) == 1
    for name, value in DRAFTS.items():
        name += "" if name == "drafts_now" else "_total"
        assert metric(name, 0) == (value if lossless else None)
    assert metric("accepted_length", 0) == (4.0 if lossless else None)
    assert metric("draft_acceptance", 0) == (0.75 if lossless else None)


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_other_options_reach_the_builders_of_drafts(runner, monkeypatch):
    class Builder:
        defaults = {}

        def check(self, config) -> None:
            pass

        def configure(self, config) -> None:
            self.config = config

    monkeypatch.setattr("vllm_sparse.worker.SparseMetadataBuilder", Builder)
    group, ours = (SimpleNamespace(metadata_builders=[Builder()]) for _ in range(2))
    model_runner = SimpleNamespace(attn_groups=[[group]])
    if runner == "V1":
        model_runner.drafter = SimpleNamespace(draft_attn_groups=[ours])
    else:
        model_runner.speculator = SimpleNamespace(attn_groups=[[ours]])
    compilation = SimpleNamespace(static_forward_context={})
    worker = WorkerExtension()
    worker.vllm_config = SimpleNamespace(compilation_config=compilation)
    worker.model_runner = model_runner
    worker.reconfigure_sparse({"top_k": 77})
    for part in (group, ours):
        assert part.metadata_builders[0].config.top_k == 77

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Figures of requests that give blocks back, without an engine."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import prometheus_client  # noqa: E402
from vllm.v1.metrics.stats import SchedulerStats  # noqa: E402

from vllm_sparse.plugin import channel  # noqa: E402
from vllm_sparse.plugin.held import HeldBlocks  # noqa: E402
from vllm_sparse.stats.figures import Figures, add_up  # noqa: E402
from vllm_sparse.stats.prometheus import SparseStatLogger  # noqa: E402
from vllm_sparse.stats.reporter import Reporter  # noqa: E402


def manager(given_back: int, **held: int):
    return SimpleNamespace(given_back=given_back, held_blocks=lambda: held)


def test_groups_of_layers_add_up():
    held = HeldBlocks([(manager(3, a=2, b=1), 100), (manager(4, a=5), 10)])
    assert held.counts() == {"blocks_given_back": 7}
    assert held.now() == {
        "requests_holding": 2,
        "kv_bytes_held": 350,
        "kv_bytes_held_most": 250,
    }
    assert HeldBlocks([(manager(3), 100)]).now()["kv_bytes_held_most"] == 0


def test_shares_are_means_over_ranks():
    ranks = [
        {"tp_rank": rank, "resets": 0, "state_rows": 4, "state_share_ppm": ppm}
        for rank, ppm in enumerate((400_000, 1_200_000))
    ]
    assert Figures.of_counts(add_up(ranks)).state_share == pytest.approx(0.2)


def test_they_reach_the_front_end():
    given = manager(3, a=2, b=1)
    replies = [{"tp_rank": 0, "resets": 0, "rows_sparse": 1}]
    reporter = Reporter(
        make_stats=lambda outputs: SchedulerStats(),
        collective_rpc=lambda method, args, non_block=False: replies,
        is_idle=lambda: True,
        is_asleep=lambda: False,
        log_stats=True,
        engine_index=0,
        held=HeldBlocks([(given, 2**20)]),
    )
    reporter.start()
    replies[0] |= {"rows_sparse": 3, "state_rows": 2, "state_share_ppm": 500_000}
    counts = channel.take(stats := reporter.make_stats("outputs"))
    assert counts["blocks_given_back"] == 3 and counts["rows_sparse"] == 2
    given.given_back = 5
    replies[0]["rows_sparse"] += 1
    later = channel.take(reporter.make_stats("outputs"))
    assert later["blocks_given_back"] == 2
    whole = Figures.of_counts(reporter.figures())
    assert whole.blocks_given_back == 5 and whole.kv_bytes_held_mean == 1.5 * 2**20
    assert (
        "5 blocks given back, 2 requests hold 1.5 MiB in the mean, 2.0 at most, "
        in (text := str(whole))
    )
    assert "states carry 25.0% of the attention mass" in text
    difference = whole - Figures.of_counts(counts)
    assert (difference.blocks_given_back, difference.requests_holding) == (2, 2)
    logger = SparseStatLogger(None, [0], _beside(), evicting=True)
    channel.put(stats, counts)
    logger.record(stats, None)
    metric = prometheus_client.REGISTRY.get_sample_value
    labels = {"model_name": "m", "engine": "0"}
    expected = {
        "blocks_given_back_total": 3,
        "requests_holding": 2,
        "kv_bytes_held_mean": 1.5 * 2**20,
        "kv_bytes_held_most": 2 * 2**20,
        "state_share": 0.25,
    }
    assert expected == {n: metric(f"vllm_sparse:{n}", labels) for n in expected}
    SparseStatLogger(None, [0], _beside())
    assert metric("vllm_sparse:blocks_given_back_total", labels) is None


def _beside():
    return SimpleNamespace(
        per_engine_labelvalues={0: ["m", "0"]},
        _counter_cls=prometheus_client.Counter,
        _gauge_cls=prometheus_client.Gauge,
    )

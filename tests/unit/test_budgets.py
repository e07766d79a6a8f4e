# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How many tokens a row keeps, against the rule written out for one length."""

import math

import pytest
import torch

from vllm_sparse.cache.formats import ROWS
from vllm_sparse.config import EVICTING, SparseConfig
from vllm_sparse.methods import METHODS, LayerShape, Phase
from vllm_sparse.methods.budgets import budget, budgets
from vllm_sparse.ops.reference import forced_ranges


def resolved(**options) -> SparseConfig:
    return SparseConfig(**{"dense_below": 0} | options).resolve(64, 3)


def spelled_out(length: int, config: SparseConfig, fmt=ROWS) -> int:
    """The rule, as docs and options say it; -1: all tokens."""
    if length < max(1, config.dense_below):
        return -1
    adapts = config.top_p is not None
    most = config.max_tokens if adapts else config.top_k
    if isinstance(most, float):
        floor = config.local_window + config.sink_tokens
        if adapts:
            floor = max(floor, config.min_tokens)
        most = max(math.ceil(most * length), floor)
    if adapts and config.min_tokens < length:
        most = min(most, length - 1)
    window, sinks = config.local_window, config.sink_tokens
    if forced_ranges(length, window, sinks, fmt)[1] <= sinks:
        return -1
    kept = max(most, sinks + max(window, fmt.tail_tokens(length)))
    return -1 if kept >= length else kept


@pytest.mark.parametrize("kv_format", ["auto", "int4"])
@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=300),
        dict(top_k=0.1, local_window=40, sink_tokens=7),
        dict(top_k=0.3, dense_below=900),
        dict(top_k=0.001, local_window=100, sink_tokens=20),
        dict(top_k=1.0),
        dict(top_k=60, local_window=1, sink_tokens=0),
        dict(top_k=600, local_window=400, sink_tokens=150),
        dict(top_p=0.9),
        dict(top_p=0.9, min_tokens=400, max_tokens=700),
        dict(top_p=0.9, min_tokens=0, max_tokens=0.25),
    ],
    ids=str,
)
def test_every_length_gets_what_the_rule_says(options, kv_format):
    config = resolved(kv_format=kv_format, **options)
    fmt = config.format(64, 3)
    want = [spelled_out(n, config, fmt) for n in range(1500)]
    assert budgets(torch.arange(1500), config, fmt).tolist() == want
    assert budget(1499, config, fmt) == want[-1]


@pytest.mark.parametrize(
    ("options", "length", "kept"),
    [
        (dict(top_k=100), 300, 100),
        (dict(top_k=36), 300, 48),  # tail of 44 and 4 sinks
        (dict(top_k=104, local_window=100), 300, 104),
        (dict(top_k=299), 300, 299),
        (dict(top_k=300), 300, -1),
        (dict(top_k=36), 127, -1),  # nothing sealed
        (dict(top_k=36), 128, 36),
        (dict(top_k=130, local_window=126), 129, -1),  # forced ranges meet
        (dict(top_k=256), 5000, 256),
        (dict(top_k=0.125), 288, 36),
        (dict(top_k=0.125), 289, 37),  # 36.125, rounded up
        (dict(top_k=0.25), 4097, 1025),
        (dict(top_k=0.001, local_window=100, sink_tokens=20), 1000, 124),
        (dict(top_k=0.001, local_window=100, sink_tokens=20), 10**6, 1000),
        # A row that may keep everything is not one that has to.
        (dict(top_p=0.9), 1000, 999),
        (dict(top_p=0.9, max_tokens=0.25), 1000, 250),
        (dict(top_p=0.9, max_tokens=300), 1000, 300),
        (dict(top_p=0.9, min_tokens=200, max_tokens=0.01), 1000, 200),
        (dict(top_p=0.9, min_tokens=200, max_tokens=0.01), 100, -1),
        (dict(top_p=0.9, min_tokens=200, max_tokens=0.01), 100_000, 1000),
    ],
)
def test_budget(options, length, kept):
    assert budget(length, resolved(**options)) == kept


@pytest.mark.parametrize("name", [n for n in METHODS if n not in EVICTING])
def test_prompts_attend_to_everything(name):
    config = resolved(selector=name, top_k=100)
    method = METHODS[name](config, LayerShape(6, 2, 64, torch.float32), None)
    assert (method.budgets(Phase.PREFILL, 1024) == -1).all()
    for phase in (Phase.DECODE, Phase.DRAFT, Phase.VERIFY):
        kept = method.budgets(phase, 1024)[1024]
        assert kept == (-1 if name == "dense" else 100)

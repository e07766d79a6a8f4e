# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Builder and layer over many steps; driver.py says what each is compared with."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")


from vllm_sparse import ops  # noqa: E402
from vllm_sparse.cache.layout import BLOCK_SIZE  # noqa: E402
from vllm_sparse.config import SparseConfig, SparseConfigError  # noqa: E402
from vllm_sparse.methods.dense import Dense  # noqa: E402
from vllm_sparse.ops import dispatch  # noqa: E402
from vllm_sparse.plugin import prompts  # noqa: E402

from .driver import (  # noqa: E402
    BF16,
    DENSE,
    FP16,
    GQA,
    LAYER,
    MHA,
    MQA,
    SPARSE,
    Driver,
    Part,
    Shape,
    decode,
)

# A scenario is a list of steps; requests are numbered from 0. Decodes come first in a
# step, as vLLM orders its batches.
SCENARIOS = {
    "prefill-only": [
        [Part(0, 1), Part(1, 127), Part(2, 128), Part(3, 129), Part(4, 256)],
    ],
    "decode-only-across-block-boundaries": [
        [Part(0, 126), Part(1, 127), Part(2, 128), Part(3, 255), Part(4, 1)],
        *[[decode(i) for i in range(5)]] * 3,
    ],
    "mixed": [
        [Part(0, 200), Part(1, 130)],
        [decode(1), decode(0), Part(2, 300)],
        [decode(2), decode(0), decode(1), Part(3, 131), Part(4, 2)],
        [decode(4), decode(3), decode(2)],
    ],
    "chunked-prefill": [
        [Part(0, 100), Part(1, 140)],
        [decode(1), Part(0, 100)],
        [decode(1), Part(0, 57)],
        [decode(1), Part(0, 255)],
        [decode(1), decode(0)],
    ],
    "prompt-tail-of-one-token": [
        [Part(0, 256), Part(1, 200)],
        [decode(1), Part(0, 1)],
        [decode(0), decode(1), Part(2, 1)],
        [decode(0), decode(2)],
    ],
    "single-token-contexts": [
        [Part(0, 1), Part(1, 1)],
        [decode(0), Part(2, 1)],
    ],
}


def run_scenario(driver: Driver, steps) -> None:
    for parts in steps:
        driver.step(*parts)
    sealed = driver.check_sealed()
    assert sealed == sum(r.length // BLOCK_SIZE for r in driver.requests)
    totals = driver.recorder.snapshot()
    assert totals["sparse_rows"] == driver.sparse_rows


def num_requests(steps) -> int:
    return 1 + max(part.request for step in steps for part in step)


def scenario_cases():
    for name, steps in SCENARIOS.items():
        yield pytest.param(GQA, steps, id=f"gqa-fp32-{name}")
    for name in ("mixed", "chunked-prefill"):
        steps = SCENARIOS[name]
        yield pytest.param(replace(GQA, dtype=BF16), steps, id=f"gqa-bf16-{name}")
        yield pytest.param(MHA, steps, id=f"mha-fp32-{name}")
        yield pytest.param(replace(MQA, dtype=FP16), steps, id=f"mqa-fp16-{name}")
        yield pytest.param(replace(GQA, soft_cap=3.0), steps, id=f"gqa-soft-cap-{name}")
    yield pytest.param(
        replace(MHA, dtype=BF16, soft_cap=3.0),
        SCENARIOS["mixed"],
        id="mha-bf16-soft-cap-mixed",
    )
    yield pytest.param(
        Shape(4, 1, 256, BF16), SCENARIOS["mixed"], id="mqa-256-bf16-mixed"
    )
    # Sinks come with other logits than a model has when it is made.
    for name, shape in (("gqa", GQA), ("mha", MHA), ("mqa", replace(MQA, dtype=BF16))):
        shape = replace(shape, sinks=True)
        yield pytest.param(shape, SCENARIOS["chunked-prefill"], id=f"{name}-sinks")


@pytest.mark.parametrize(("shape", "steps"), list(scenario_cases()))
def test_budget_covering_the_context_is_dense_attention(drive, shape, steps):
    driver = drive(shape, DENSE, num_requests(steps))
    run_scenario(driver, steps)
    assert driver.sparse_rows == 0


@pytest.mark.parametrize(("shape", "steps"), list(scenario_cases()))
def test_sparse_rows_equal_the_reference_and_prompts_stay_dense(drive, shape, steps):
    driver = drive(shape, SPARSE, num_requests(steps))
    run_scenario(driver, steps)
    lengths = [request.length for request in driver.requests]
    if max(lengths) > 130 and any(not p.prompt for step in steps for p in step):
        assert driver.sparse_rows > 0


SPEC = replace(GQA, spec_tokens=3)
DRAFT_STEPS = {
    # Contexts of 140 and 254 tokens grow by one verified token and three drafts.
    "all-accepted": [
        [Part(0, 140), Part(1, 254)],
        [decode(0, 4), decode(1, 4)],
        [decode(0, 4), decode(1, 4)],
    ],
    # The block boundary at 256 is crossed by drafts that are then rejected.
    "rejected-across-a-block-boundary": [
        [Part(0, 140), Part(1, 253)],
        [decode(1, 4), decode(0, 4)],
        [decode(1, 4, rewind=3), decode(0, 1, rewind=2)],
        [decode(1, 2, rewind=1), decode(0, 4)],
    ],
    "beside-prefill-and-short-prompt-tails": [
        [Part(0, 140), Part(1, 256)],
        [decode(0, 4), Part(1, 3), Part(2, 300)],
        [decode(0, 1), decode(1, 2), Part(2, 1), Part(3, 4)],
        [decode(1, 4), decode(3, 4), decode(2, 4)],
    ],
}


@pytest.mark.parametrize("options", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("steps", DRAFT_STEPS.values(), ids=DRAFT_STEPS)
def test_drafts_are_served_one_row_per_position(drive, steps, options):
    driver = drive(SPEC, options, num_requests(steps))
    run_scenario(driver, steps)
    assert (driver.sparse_rows > 0) == (options is SPARSE)
    decoded = sum(
        part.new for step in steps for part in step if not part.prompt or part.new <= 4
    )
    assert driver.recorder.snapshot()["decode_tokens"] == decoded


@pytest.mark.parametrize("options", [{"selector": "dense"}, {"dense_layers": 2}])
@pytest.mark.parametrize("steps", DRAFT_STEPS.values(), ids=DRAFT_STEPS)
def test_dense_layers_read_a_context_once_for_all_drafts(
    drive, steps, options, monkeypatch
):
    driver = drive(SPEC, SPARSE | options, num_requests(steps))
    driver.dense_layer = True
    if driver.path != "cpu":  # no row of its own for any position
        monkeypatch.delattr(type(driver.impl.ops), "attend")
    run_scenario(driver, steps)
    totals = driver.recorder.snapshot()
    assert totals["kv_bytes_read"] == totals["kv_bytes_dense"]
    requests = sum(not p.prompt or p.new <= 4 for step in steps for p in step)
    assert totals["decode_tokens"] > requests


def test_verified_drafts_are_counted_once_in_what_dense_attention_reads(drive):
    driver = drive(SPEC, SPARSE, 1)
    driver.step(Part(0, 297))
    driver.step(decode(0, 4))
    layout, config = driver.impl.shape.layout, driver.impl.config
    totals = driver.recorder.snapshot()
    assert totals["kv_bytes_dense"] == SPEC.kv_heads * 301 * layout.row_bytes
    lists = 4 * (layout.score_bytes(2, config.rank) + 60 * layout.row_bytes)
    assert totals["kv_bytes_read"] == SPEC.kv_heads * lists


@pytest.mark.parametrize("user_first", [False, True])
@pytest.mark.parametrize("shape", [GQA, MHA], ids=["gqa", "mha"])
def test_a_block_that_one_request_fills_and_another_reads_in_one_step(
    drive, shape, user_first
):
    driver = drive(shape, SPARSE, 4)
    driver.step(Part(2, 150))
    owner, user = Part(0, 300), Part(1, 172, hit=(0, 1))
    prompts = (user, owner) if user_first else (owner, user)
    driver.step(decode(2), *prompts)
    requests = driver.requests
    assert requests[0].blocks[0] == requests[1].blocks[0]
    assert requests[0].blocks[1] != requests[1].blocks[1]
    # A later hit on two sealed blocks, as a tail of one token.
    driver.step(decode(2), decode(1), decode(0), Part(3, 1, hit=(0, 2)))
    driver.step(*[decode(i) for i in range(4)])
    assert driver.check_sealed() == 2 + 2 + 1 + 2
    assert driver.sparse_rows == 1 + 3 + 4


@pytest.mark.parametrize(("dense_layers", "sparse"), [(0, 1), (1, 1), (2, 0)])
def test_first_layers_stay_dense(drive, dense_layers, sparse):
    # The layer that is driven has index 1.
    driver = drive(GQA, SPARSE | {"dense_layers": dense_layers}, 1)
    driver.dense_layer = not sparse
    driver.step(Part(0, 300))
    driver.step(decode(0))
    assert driver.recorder.snapshot()["sparse_rows"] == driver.sparse_rows == sparse


def test_more_dense_layers_than_there_are_stop_the_engine(drive):
    with pytest.raises(ValueError, match="dense_layers = 9 is more than the 2 layers"):
        drive(GQA, SPARSE | {"dense_layers": 9}, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 8},
        {"local_window": 50},
        {"sink_tokens": 30},
        {"top_k": 0.25},
        {"dense_below": 301},
        {"mean_value": True},
        {"local_window": 1, "sink_tokens": 0, "top_k": 1},
    ],
    ids=str,
)
def test_options_reach_the_rows(drive, options):
    driver = drive(GQA, SPARSE | options, 2)
    run_scenario(driver, [[Part(0, 299), Part(1, 500)], *[[decode(0), decode(1)]] * 2])
    assert driver.sparse_rows == (3 if "dense_below" in options else 4)


def test_dense_selector_reads_everything(drive):
    driver = drive(GQA, {"selector": "dense", "dense_below": 0}, 2)
    driver.dense_layer = True
    run_scenario(driver, SCENARIOS["mixed"][:1] + [[decode(0), decode(1)]])
    totals = driver.recorder.snapshot()
    assert totals["kv_bytes_read"] == totals["kv_bytes_dense"] > 0
    assert totals["sparse_rows"] == 0


def test_reconfigured_layer_uses_the_new_options(drive):
    driver = drive(GQA, DENSE, 1)
    driver.step(Part(0, 300))
    driver.step(decode(0))
    assert driver.sparse_rows == 0
    for change in (SPARSE, SPARSE | {"rank": 8}, SPARSE | {"dense_layers": 2}, DENSE):
        config = SparseConfig.from_additional_config({"sparse": change})
        driver.impl.configure(config)
        driver.builder.configure(config)
        driver.dense_layer = "dense_layers" in change
        driver.step(decode(0))
    assert driver.recorder.snapshot()["sparse_rows"] == driver.sparse_rows == 2


def test_statistics_are_bytes_of_rows_codes_and_parameters(drive):
    driver = drive(GQA, SPARSE, 2)
    driver.step(Part(0, 299), Part(1, 100))
    assert driver.recorder.snapshot() == dict.fromkeys(driver.recorder.snapshot(), 0)
    driver.step(decode(0), decode(1))
    row_bytes = 2 * 64 * driver.shape.dtype.itemsize
    # Request 0: 300 tokens, two sealed blocks scored with 24 channels of 64 code and 4
    # parameter bytes; 60 tokens attended. Request 1: 101 tokens, dense.
    scores = 2 * 24 * (64 + 4)
    assert driver.recorder.snapshot() == {
        "decode_tokens": 2,
        "decode_rows": 2,
        "sparse_rows": 1,
        "kv_bytes_read": 2 * (scores + (60 + 101) * row_bytes),
        "kv_bytes_dense": 2 * (300 + 101) * row_bytes,
    }


@pytest.mark.parametrize("steps", [SCENARIOS["mixed"], SCENARIOS["chunked-prefill"]])
@pytest.mark.parametrize("options", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_layer_that_reads_another_layers_cache(drive, options, steps):
    """As in Gemma 3n and 4: such a layer has no K and V and must not seal."""
    driver = drive(
        GQA,
        options,
        num_requests(steps),
        kv_sharing_target_layer_name="model.layers.0.self_attn.attn",
    )
    run_scenario(driver, steps)
    assert (driver.sparse_rows > 0) == (options is SPARSE)


def test_missing_is_prefilling_means_that_all_rows_are_prompts(drive):
    """Dense is never wrong; vLLM drops the flags where it cuts a batch anew."""
    driver = drive(GQA, SPARSE, 1)
    driver.step(Part(0, 300))
    build = driver.builder.build
    driver.builder.build = lambda common_prefix_len, common_attn_metadata: build(
        common_prefix_len, replace(common_attn_metadata, is_prefilling=None)
    )
    driver.step(replace(decode(0), prompt=True))
    assert driver.recorder.snapshot()["sparse_rows"] == 0


def test_a_prompts_last_token_is_dense_where_vllm_calls_it_a_decode(drive, monkeypatch):
    """As for models with states on a GPU (plugin/prompts.py)."""
    driver = drive(GQA, SPARSE, 1)
    driver.step(Part(0, 300))
    monkeypatch.setattr(prompts, "_in_prompts", torch.tensor([True]))
    build = driver.builder.build

    def as_vllm_does(common_prefix_len, common_attn_metadata):
        flags = torch.tensor([False])
        common = replace(common_attn_metadata, is_prefilling=flags)
        return build(common_prefix_len, common)

    driver.builder.build = as_vllm_does
    driver.step(Part(0, 1))
    assert driver.recorder.snapshot()["sparse_rows"] == 0


def test_attention_in_both_directions_is_refused(drive):
    driver = drive(GQA, SPARSE, 1)
    build = driver.builder.build
    for causal in (False, torch.tensor([False])):
        driver.builder.build = lambda common_prefix_len, common_attn_metadata: build(
            common_prefix_len,
            replace(common_attn_metadata, causal=causal),  # noqa: B023
        )
        with pytest.raises(NotImplementedError, match="causal attention only"):
            driver.step(Part(0, 300))


def test_warm_up_without_metadata_and_unsupported_output_scales(drive):
    driver = drive(GQA, SPARSE, 1)
    query = torch.zeros(2, 6, 64)
    key = torch.zeros(2, 2, 64)
    output = torch.full_like(query, 7.0)
    arguments = (LAYER, query, key, key, driver.cache)
    assert driver.impl.forward(*arguments, None, output) is output
    assert (output == 0).all()
    with pytest.raises(NotImplementedError, match="output quantisation"):
        driver.impl.forward(*arguments, None, output, output_scale=torch.ones(1))


def test_rank_beyond_the_head_size_stops_the_layer(drive):
    with pytest.raises(SparseConfigError, match=r"sparse\.rank = 65 exceeds"):
        drive(GQA, {"rank": 65}, 1)


def test_gpu_layer_over_interpreted_triton_kernels():
    """Some of the above in a process of its own: Triton decides when it is imported."""
    chosen = "triton-on-cpu and sparse and (gqa-bf16-mixed or rejected)"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-x", __file__]
    command += ["-m", "interpreted", "-k", chosen]
    environment = dict(os.environ, TRITON_INTERPRET="1")
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


def test_dense_rows_use_the_engines_kernels(drive, request, monkeypatch):
    """Not what would serve their tensors by itself."""
    if "gpu]" in request.node.name:
        pytest.skip("kernels of the CPU")
    driver = drive(GQA, SPARSE | {"kernels": "cpu"}, 1)
    asked = []
    functions = dispatch.functions
    monkeypatch.setattr(
        ops, "functions", lambda name: (asked.append(name), functions(name))[1]
    )
    monkeypatch.setattr(ops, "resolve", lambda kernels, device: kernels)
    driver.step(Part(0, 300))
    driver.step(Part(0, 200))  # a chunk: the context is gathered
    driver.step(decode(0))
    assert set(asked) == {"cpu"}


def test_chunked_layers_are_dense_whatever_the_options(drive):
    driver = drive(GQA, SPARSE, 1)
    layer = SimpleNamespace(**vars(LAYER), attention_chunk_size=8192)
    assert isinstance(driver.impl.method_of(layer), Dense)


def test_a_step_that_outgrows_what_graphs_hold_is_an_error(drive):
    driver = drive(GQA, SPARSE, 1)
    driver.step(Part(0, 300))
    driver.step(decode(0))
    driver.builder._captured = True
    held = driver.builder.buffers
    held.budgets = held.budgets[:0]  # no room for any row: the step gets its own
    driver.step(decode(0))
    assert driver.builder.buffers is held
    driver.blocks += 3
    with pytest.raises(RuntimeError, match="outgrown"):
        driver.step(decode(0))


@pytest.mark.parametrize("drive", ["cpu"], indirect=True)
def test_sinks_and_the_mean_value_term_exclude_each_other(drive):
    shape = replace(MHA, sinks=True)
    assert drive(MHA, SPARSE, 1).impl.config.mean_value
    assert not drive(shape, SPARSE, 1).impl.config.mean_value
    with pytest.raises(SparseConfigError, match="mean_value is not served for models"):
        drive(shape, SPARSE | {"mean_value": True}, 1)

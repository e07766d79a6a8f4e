# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Quantised blocks through builder and layer: whatever the steps, a token sees codes of
the blocks before its own and its own block exactly (driver.py)."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from vllm_sparse.cache.formats import FORMATS  # noqa: E402
from vllm_sparse.config import SparseConfig, SparseConfigError  # noqa: E402
from vllm_sparse.layer.prefill_codes import plan_codes  # noqa: E402
from vllm_sparse.layer.prefill_fa import FlashCodes  # noqa: E402
from vllm_sparse.step import builder  # noqa: E402

from .driver import (  # noqa: E402
    BF16,
    DENSE,
    FP16,
    GQA,
    LAYER,
    MHA,
    MQA,
    SPARSE,
    Part,
    decode,
)
from .test_backend import (  # noqa: E402
    DRAFT_STEPS,
    SCENARIOS,
    num_requests,
    run_scenario,
)
from .test_graphs import padded_batch  # noqa: E402

NAMES = [name for name, fmt in FORMATS.items() if fmt.quantised]
CASES = [("cpu", name) for name in NAMES] + [("gpu-on-cpu", "int4")]
CASES += [pytest.param("gpu", name, marks=pytest.mark.gpu) for name in NAMES]
on_every_path = pytest.mark.parametrize(("drive", "name"), CASES, indirect=["drive"])
on_the_cpu = pytest.mark.parametrize("drive", ["cpu"], indirect=True)


@pytest.mark.parametrize("options", [DENSE, SPARSE], ids=["dense", "sparse"])
@on_every_path
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_steps_make_no_difference(drive, scenario, name, options):
    steps = SCENARIOS[scenario]
    driver = drive(GQA, options | {"kv_format": name}, num_requests(steps))
    run_scenario(driver, steps)


@on_the_cpu
@pytest.mark.parametrize(
    "shape",
    [
        replace(GQA, dtype=BF16),
        replace(GQA, soft_cap=3.0),
        MHA,
        replace(MQA, dtype=FP16),
    ],
    ids=["gqa-bf16", "gqa-soft-cap", "mha-80", "mqa-128-fp16"],
)
@pytest.mark.parametrize("scenario", ["mixed", "chunked-prefill"])
def test_other_shapes_and_dtypes(drive, scenario, shape):
    steps = SCENARIOS[scenario]
    driver = drive(shape, SPARSE | {"kv_format": "int4"}, num_requests(steps))
    run_scenario(driver, steps)


@pytest.mark.parametrize("options", [DENSE, SPARSE], ids=["dense", "sparse"])
@on_every_path
@pytest.mark.parametrize("steps", DRAFT_STEPS.values(), ids=DRAFT_STEPS)
def test_rejected_drafts_are_forgotten(drive, steps, name, options):
    shape = replace(GQA, spec_tokens=3)
    driver = drive(shape, options | {"kv_format": name}, num_requests(steps))
    run_scenario(driver, steps)


@pytest.mark.parametrize("user_first", [False, True])
@on_every_path
def test_a_cached_prefix_is_read_in_the_step_that_fills_it(drive, name, user_first):
    driver = drive(GQA, SPARSE | {"kv_format": name}, 4)
    driver.step(Part(2, 150))
    owner, user = Part(0, 300), Part(1, 172, hit=(0, 1))
    prompts = (user, owner) if user_first else (owner, user)
    driver.step(decode(2), *prompts)
    driver.step(decode(2), decode(1), decode(0), Part(3, 1, hit=(0, 2)))
    driver.step(*[decode(i) for i in range(4)])
    assert driver.check_sealed() == 2 + 2 + 1 + 2


@on_every_path
def test_an_idle_step_over_a_live_table_changes_nothing(drive, name):
    """Data parallelism: no slots, but lengths and tables of requests that wait."""
    driver = drive(GQA, SPARSE | {"kv_format": name}, 2)
    driver.step(Part(0, 255), Part(1, 257))
    before = driver.cache[1:].clone().view(torch.uint8)
    idle = padded_batch(driver, [256, 258], 0)
    idle.slot_mapping.fill_(-1)
    metadata = driver.builder.build(0, idle)
    tokens = [torch.randn(2, n, 64).to(driver.device) for n in (6, 2, 2)]
    tokens = [t.to(driver.shape.dtype) for t in tokens]
    output = torch.empty_like(tokens[0])
    driver.impl.forward(LAYER, *tokens, driver.cache, metadata, output)
    assert torch.equal(driver.cache[1:].view(torch.uint8), before)
    driver.step(decode(0), decode(1))


@on_the_cpu
def test_padding_that_makes_small_blocks_pointless_is_said(drive, monkeypatch):
    """Beside layers whose blocks are larger."""
    driver, said = drive(GQA, SPARSE | {"kv_format": "k8v4"}, 1), []
    monkeypatch.setattr(
        builder.logger, "warning_once", lambda s, *a: said.append(s % a)
    )
    spec = driver.builder.kv_cache_spec
    for padded, lines in ((None, 0), (spec.page_size_bytes + 512, 1)):
        driver.builder.kv_cache_spec = replace(spec, page_size_padded=padded)
        driver.builder._report_padding()
        assert len(said) == lines
    size = spec.page_size_bytes
    assert f"Blocks of {size} bytes are padded to {size + 512}" in said[0]


@pytest.mark.parametrize("drive", ["cpu", "gpu-on-cpu"], indirect=True)
@pytest.mark.parametrize("name", ["int4", "k8v4"])
def test_statistics_are_bytes_of_codes_and_rows(drive, name):
    driver = drive(GQA, SPARSE | {"kv_format": name}, 1)
    driver.step(Part(0, 299))
    driver.step(decode(0))
    layout = driver.impl.shape.layout
    totals = driver.recorder.snapshot()
    heads, config = GQA.kv_heads, driver.impl.config
    assert totals["kv_bytes_dense"] == 300 * heads * layout.row_bytes
    scores = layout.score_bytes(2, config.rank)
    rows = (300 - 256) * layout.row_bytes
    kept = 60 - (300 - 256)
    codes = kept * layout.token_bytes
    # All sealed blocks are taken for touched.
    blocks = 2 * layout.key_block_bytes
    assert totals["kv_bytes_read"] == heads * (scores + rows + codes + blocks)


def test_prefill_takes_turns_where_contexts_are_long():
    lens, starts = [300, 700, 129, 1000], [0, 300, 500, 501, 1000]
    table = torch.arange(1, 4 * 14 + 1).view(4, 14).int()
    common = SimpleNamespace(
        query_start_loc_cpu=torch.tensor(starts),
        seq_lens_cpu_upper_bound=torch.tensor(lens),
        seq_lens=torch.tensor(lens),
        block_table_tensor=table,
    )
    (whole,) = plan_codes(common, slice(0, 4), 100, partial(FlashCodes, None))
    parts = plan_codes(common, slice(0, 4), 13, partial(FlashCodes, None))
    assert len(parts) == 3
    assert sum(part.num_blocks for part in parts) == whole.num_blocks
    assert [part.tokens for part in parts] == [
        slice(0, 500),
        slice(500, 501),
        slice(501, 1000),
    ]
    for part in parts:
        places = [part.tail_place, part.new_place, part.pad_place]
        for start, count in zip(part.sealed_start, part.sealed_lens):
            places.append(torch.arange(int(start), int(start + count)))
        assert torch.cat(places).sort().values.tolist() == list(range(part.num_slots))


@on_the_cpu
def test_the_format_of_a_running_engine_is_fixed(drive):
    driver = drive(GQA, SPARSE | {"kv_format": "int4"}, 1)
    other = SparseConfig.from_additional_config({"sparse": SPARSE})
    with pytest.raises(SparseConfigError, match="kv_format = 'auto' cannot replace"):
        driver.builder.check(other)


@on_the_cpu
def test_layers_that_share_a_cache_are_refused(drive):
    with pytest.raises(NotImplementedError, match="layers share a cache"):
        drive(
            GQA,
            SPARSE | {"kv_format": "int4"},
            1,
            kv_sharing_target_layer_name="model.layers.0.self_attn.attn",
        )


@on_the_cpu
def test_too_many_drafts_are_refused(drive):
    shape = replace(GQA, spec_tokens=40)
    with pytest.raises(SparseConfigError, match="verifies at most"):
        drive(shape, SPARSE | {"kv_format": "int4"}, 1)


@on_the_cpu
def test_a_group_that_does_not_fit_the_head_size_is_refused(drive):
    options = SPARSE | {"kv_format": "int4", "kv_group_size": 48}
    with pytest.raises(SparseConfigError, match=r"one of \[16, 32, 64\]"):
        drive(GQA, options, 1)

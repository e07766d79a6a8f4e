# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What CUDA graphs ask of builder and layer, on every path."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.compilation import CUDAGraphMode  # noqa: E402
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402

from tests.ops.compare import assert_close  # noqa: E402
from vllm_sparse.cache.layout import BLOCK_SIZE  # noqa: E402
from vllm_sparse.config import SparseConfig, SparseConfigError  # noqa: E402

from .driver import GQA, LAYER, SPARSE, TOLERANCE, Driver, Part, decode  # noqa: E402


def padded_batch(driver: Driver, lengths: list[int], padding: int):
    """A decode step of one token each, as vLLM pads it to the size of a CUDA graph."""
    size = len(lengths) + padding
    table = torch.zeros(size, driver.blocks, dtype=torch.int32)
    for row in range(len(lengths)):
        blocks = driver.requests[row].blocks
        table[row, : len(blocks)] = torch.tensor(blocks)
    starts = torch.arange(size + 1, dtype=torch.int32).clamp(max=len(lengths))
    slots = [
        driver.requests[row].blocks[(n - 1) // BLOCK_SIZE] * BLOCK_SIZE
        + (n - 1) % BLOCK_SIZE
        for row, n in enumerate(lengths)
    ]
    lens = torch.tensor(lengths + [0] * padding, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(driver.device),
        query_start_loc_cpu=starts,
        seq_lens=lens.to(driver.device),
        seq_lens_cpu_upper_bound=lens,
        num_reqs=size,
        num_actual_tokens=size,
        max_query_len=1,
        max_seq_len=max(lengths),
        block_table_tensor=table.to(driver.device),
        slot_mapping=torch.tensor(slots + [-1] * padding).to(driver.device),
        is_prefilling=torch.zeros(len(lengths), dtype=torch.bool),
    )


@pytest.mark.parametrize("spec_tokens", [0, 3])
def test_steps_that_are_padded_to_a_cuda_graph(drive, spec_tokens):
    """Same addresses at every step, real rows as without padding, padding is finite."""
    driver = drive(replace(GQA, spec_tokens=spec_tokens), SPARSE, 2)
    shape, lengths = driver.shape, [300, 257]
    driver.step(Part(0, lengths[0]), Part(1, lengths[1]))
    query = driver.random_tokens(shape.heads, 5).to(driver.device, shape.dtype)
    rows = [
        torch.stack([getattr(driver.requests[i], name)[-1] for i in (0, 1, 0, 0, 0)])
        for name in ("key", "value")
    ]
    rows = [t.to(driver.device) for t in rows]

    def addresses(metadata) -> set[int]:
        (part,) = metadata.decode
        names = ("budgets", "indices", "counts", "kept_mass", "workspace")
        if spec_tokens:
            names += ("block_table", "seq_lens")
        return {getattr(part, name).data_ptr() for name in names}

    outputs, places = [], []
    for padding in (3, 0):
        metadata = driver.builder.build(0, padded_batch(driver, lengths, padding))
        places.append(addresses(metadata))
        (part,) = metadata.decode
        assert part.seq_lens.tolist() == lengths + [0] * padding
        assert part.budgets.tolist() == [60, 60] + [-1] * padding
        if padding and driver.path != "gpu":
            continue  # the CPU's kernels refuse rows without context
        size = 2 + padding
        output = torch.full_like(query[:size], torch.nan)
        given = (query[:size], *(t[:size] for t in rows))
        driver.impl.forward(LAYER, *given, driver.cache, metadata, output)
        assert output.isfinite().all()
        outputs.append(output[:2])
    if driver.path == "gpu":
        assert torch.equal(*outputs)
    else:
        given = enumerate(zip(query, lengths))
        want = [driver.sparse(row, q, n, 60, row) for row, (q, n) in given]
        assert_close(outputs[0].float(), torch.stack(want), TOLERANCE[shape.dtype])
    assert places[0] == places[1]
    totals = driver.recorder.snapshot()
    assert totals["decode_tokens"] == 4 and totals["sparse_rows"] == 4


def test_the_rows_of_vllms_warm_up_are_forgotten(drive):
    """It decodes made-up requests, with real slots, before it captures graphs."""
    driver = drive(GQA, SPARSE, 1)
    driver.step(Part(0, 300))
    driver.step(decode(0))
    assert driver.recorder.snapshot()["sparse_rows"] == 1
    driver.step(decode(0))
    dummy = padded_batch(driver, [302], 3)
    dummy.slot_mapping.fill_(-1)
    for _ in range(2):
        driver.builder.build_for_cudagraph_capture(dummy)
        assert not any(driver.recorder.snapshot().values())
    driver.step(decode(0))
    # As vLLM does for an idle rank, now and then.
    driver.builder.build_for_cudagraph_capture(dummy)
    totals = driver.recorder.snapshot()
    assert totals["decode_tokens"] == totals["sparse_rows"] == 1


def test_graphs_hold_options_that_a_running_engine_cannot_change(drive, monkeypatch):
    driver = drive(GQA, SPARSE, 1)
    driver.step(Part(0, 300))
    driver.step(decode(0))
    compilation = driver.builder.vllm_config.compilation_config
    monkeypatch.setattr(compilation, "cudagraph_mode", CUDAGraphMode.FULL)
    before = driver.builder.config
    for change, message in (
        ({"rank": 8}, "top_k, max_tokens, dense_below"),
        ({"selector": "dense"}, "top_k, max_tokens, dense_below"),
        ({"top_k": 200}, "captured for"),
        ({"kernels": "cpu"}, "sparse.kernels"),
    ):
        config = SparseConfig.from_additional_config({"sparse": SPARSE | change})
        with pytest.raises(SparseConfigError, match=message):
            driver.builder.check(config)
    assert driver.builder.config == before
    for change in ({"top_k": 50}, {"dense_below": 0}):
        config = SparseConfig.from_additional_config({"sparse": SPARSE | change})
        driver.builder.check(config)

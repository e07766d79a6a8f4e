# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Every op refuses tensors that it was not written for, and the error names them."""

import pytest
import torch

from .arguments import (
    ARGUMENTS,
    HEADS,
    ROWS,
    SIZE,
    TENSORS,
    call,
    refused,
)

READING = ["gather_kv", "sparq_attend", "attend"]


@pytest.mark.parametrize("op", ARGUMENTS)
def test_the_arguments_that_the_other_tests_break_are_good(op):
    call(op)


@pytest.mark.parametrize(("op", "name"), TENSORS, ids=lambda v: v)
def test_wrong_number_of_dimensions(op, name):
    tensor = ARGUMENTS[op]()[name]
    for wrong in (tensor.unsqueeze(0), tensor.flatten()[:1].squeeze(0)):
        message = refused(op, **{name: wrong})
        dims = f"{name} must have {tensor.dim()} dimensions, got {wrong.dim()}"
        assert dims in message


@pytest.mark.parametrize(("op", "name"), TENSORS, ids=lambda v: v)
def test_wrong_dtype(op, name):
    tensor = ARGUMENTS[op]()[name]
    others = [torch.float64, torch.int16, torch.uint8]
    others += [torch.int64 if tensor.dtype == torch.int32 else torch.int32]
    for dtype in others:
        message = refused(op, **{name: tensor.to(dtype)})
        assert f"{name} must be" in message or f"{name} must have" in message


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("store", "key"),
        ("store", "value"),
        ("gather_kv", "key"),
        ("gather_kv", "value"),
        ("sparq_attend", "query"),
        ("attend", "query"),
        ("attend", "out"),
    ],
    ids=lambda v: v,
)
def test_model_tensors_must_share_the_caches_dtype(op, name):
    half = ARGUMENTS[op]()[name].half()
    assert f"{name} must have kv_cache's dtype" in refused(op, **{name: half})


@pytest.mark.parametrize(("op", "name"), TENSORS, ids=lambda v: v)
def test_another_device(op, name):
    """Meta tensors mixed with CPU ones are refused, be it by us or the dispatcher."""
    tensor = ARGUMENTS[op]()[name]
    with pytest.raises((RuntimeError, NotImplementedError)):
        call(op, **{name: tensor.to("meta")})


@pytest.mark.parametrize(("op", "name"), TENSORS, ids=lambda v: v)
def test_last_dimension_must_be_contiguous(op, name):
    tensor = ARGUMENTS[op]()[name]
    if tensor.shape[-1] == 1:
        pytest.skip("one element has no stride")
    strided = torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
    assert torch.equal(strided.nan_to_num(), tensor.nan_to_num())
    assert strided.stride(-1) == 2
    message = refused(op, **{name: strided})
    assert f"{name} must be contiguous in its last dimension" in message


@pytest.mark.parametrize(
    ("op", "name"),
    [("sparq_attend", "query"), ("attend", "query"), ("attend", "out")],
    ids=lambda v: v,
)
def test_heads_must_be_packed_but_rows_may_be_strided(op, name):
    tensor = ARGUMENTS[op]()[name]
    apart = torch.zeros(ROWS, HEADS, 2, SIZE)[:, :, 0]
    assert f"{name} must be contiguous in its last two dimensions" in refused(
        op, **{name: apart}
    )
    rows = torch.zeros(ROWS, HEADS + 5, SIZE)[:, :HEADS].copy_(tensor)
    call(op, **{name: rows})


@pytest.mark.parametrize("op", ARGUMENTS)
def test_chunks_of_the_cache_must_be_contiguous(op):
    cache = ARGUMENTS[op]()["kv_cache"]
    rows = cache.new_zeros(*cache.shape[:3], cache.shape[3] + 4)[..., :-4]
    message = refused(op, kv_cache=rows)
    assert "kv_cache must hold each (block, head) in one contiguous chunk" in message
    # vLLM's other layout: tokens outside heads.
    token_major = cache.transpose(1, 2).contiguous().transpose(1, 2)
    message = refused(op, kv_cache=token_major)
    assert "kv_cache must hold each (block, head) in one contiguous chunk" in message


@pytest.mark.parametrize("op", ARGUMENTS)
def test_blocks_and_heads_of_the_cache_may_lie_apart(op):
    cache = ARGUMENTS[op]()["kv_cache"]
    blocks, heads, tokens, content = cache.shape
    wide = cache.new_zeros(blocks, heads + 2, tokens, content)[:, 1:-1]
    call(op, kv_cache=wide.copy_(cache))


@pytest.mark.parametrize("op", ARGUMENTS)
def test_cache_of_another_block_size_or_width(op):
    cache = ARGUMENTS[op]()["kv_cache"]
    message = refused(op, kv_cache=cache[:, :, :64].contiguous())
    assert "kv_cache has size 64 in dimension 2, expected 128 (tokens of a block)" in (
        message
    )
    message = refused(op, kv_cache=cache[..., :-1].contiguous())
    assert "kv_cache has 544 bytes per token and head, expected 548" in message


@pytest.mark.parametrize("op", ARGUMENTS)
def test_another_number_of_kv_heads(op):
    cache = ARGUMENTS[op]()["kv_cache"]
    message = refused(op, kv_cache=cache[:, :2].contiguous())
    assert "in dimension 1, expected 2 (num_kv_heads)" in message
    if op in ("attend", "sparq_attend"):
        query = torch.ones(ROWS, 7, SIZE)
        assert "query has 7 heads, not a multiple of kv_cache's 3" in refused(
            op, query=query
        )


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("store", "block_table"),
        ("store", "query_start_loc"),
        ("gather_kv", "block_table"),
        ("gather_kv", "out_start"),
        *(
            (op, name)
            for op, name in TENSORS
            if op in ("sparq_attend", "attend") and name not in ("query", "kv_cache")
        ),
    ],
    ids=lambda v: v,
)
def test_wrong_number_of_rows(op, name):
    tensor = ARGUMENTS[op]()[name]
    for wrong in (tensor[:-1], torch.cat([tensor, tensor])):
        message = refused(op, **{name: wrong.contiguous()})
        expected = (
            f"{name} has size {len(wrong)} in dimension 0, expected {len(tensor)}"
        )
        assert expected in message


@pytest.mark.parametrize(
    ("op", "name"),
    [("store", "value"), ("gather_kv", "value"), ("attend", "out")],
    ids=lambda v: v,
)
def test_wrong_head_size(op, name):
    narrow = ARGUMENTS[op]()[name][..., :48].contiguous()
    message = refused(op, **{name: narrow})
    assert f"{name} has size 48 in dimension 2, expected 64 (head_size)" in message


@pytest.mark.parametrize("head_size", [0, 8, 65, 272])
def test_head_size_out_of_range(head_size):
    message = refused("attend", query=torch.ones(ROWS, HEADS, head_size))
    assert "head_size must be a multiple of 16 from 16 to 256" in message
    assert f"got {head_size}" in message


@pytest.mark.parametrize(("op", "name"), [("attend", "out"), ("attend", "kept_mass")])
def test_wrong_number_of_query_heads(op, name):
    wide = torch.ones_like(ARGUMENTS[op]()[name].repeat(1, 2, *[1] * (name == "out")))
    assert f"{name} has size 12 in dimension 1, expected 6 (num_heads)" in refused(
        op, **{name: wide}
    )


@pytest.mark.parametrize("op", ["sparq_attend", "attend"])
def test_sinks_are_one_a_head_and_know_no_mean_of_values(op):
    sinks = torch.zeros(HEADS)
    assert "sinks cannot be had with kept_mass" in refused(op, sinks=sinks)
    message = refused(op, sinks=sinks[:-1], kept_mass=None)
    assert f"sinks has size {HEADS - 1} in dimension 0, expected {HEADS}" in message
    assert "sinks must be" in refused(op, sinks=sinks.double(), kept_mass=None)

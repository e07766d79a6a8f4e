# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Every op refuses what it was not written for, and the error names the tensor."""

import pytest
import torch

from vllm_sparse import ops
from vllm_sparse.cache.layout import BLOCK_SIZE

from .arguments import (
    ARGUMENTS,
    HEADS,
    KV_HEADS,
    ROOM,
    ROWS,
    SIZE,
    TENSORS,
    TOKENS,
    attend_arguments,
    call,
    lists,
    seal_blocks_arguments,
    sparq_select_arguments,
    store_kv_arguments,
)


def refused(op: str, **changes) -> str:
    with pytest.raises(RuntimeError) as error:
        call(op, **changes)
    return str(error.value)


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
        ("store_kv", "key"),
        ("store_kv", "value"),
        ("gather_kv", "key"),
        ("gather_kv", "value"),
        ("sparq_select", "query"),
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
    [("sparq_select", "query"), ("attend", "query"), ("attend", "out")],
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
    if op == "seal_blocks":
        pytest.skip("nothing there to compare with")
    message = refused(op, kv_cache=cache[:, :2].contiguous())
    assert "in dimension 1, expected 2 (num_kv_heads)" in message
    if op in ("attend", "sparq_select"):
        query = torch.ones(ROWS, 7, SIZE)
        assert "query has 7 heads, not a multiple of kv_cache's 3" in refused(
            op, query=query
        )


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("seal_blocks", "prev_block_ids"),
        ("seal_blocks", "block_index"),
        ("gather_kv", "block_table"),
        ("gather_kv", "out_start"),
        ("sparq_select", "seq_lens"),
        ("sparq_select", "budgets"),
        ("sparq_select", "block_table"),
        ("sparq_select", "indices"),
        ("sparq_select", "counts"),
        ("sparq_select", "kept_mass"),
        ("attend", "seq_lens"),
        ("attend", "block_table"),
        ("attend", "indices"),
        ("attend", "counts"),
        ("attend", "kept_mass"),
        ("attend", "out"),
        ("attend", "tokens_read"),
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
    [("store_kv", "value"), ("gather_kv", "value"), ("attend", "out")],
    ids=lambda v: v,
)
def test_wrong_head_size(op, name):
    narrow = ARGUMENTS[op]()[name][..., :48].contiguous()
    message = refused(op, **{name: narrow})
    assert f"{name} has size 48 in dimension 2, expected 64 (head_size)" in message


@pytest.mark.parametrize("head_size", [0, 8, 65, 272])
def test_head_size_out_of_range(head_size):
    message = refused("seal_blocks", head_size=head_size)
    assert "head_size must be a multiple of 16 from 16 to 256" in message
    assert f"got {head_size}" in message


@pytest.mark.parametrize(("op", "name"), [("attend", "out"), ("attend", "kept_mass")])
def test_wrong_number_of_query_heads(op, name):
    wide = torch.ones_like(ARGUMENTS[op]()[name].repeat(1, 2, *[1] * (name == "out")))
    assert f"{name} has size 12 in dimension 1, expected 6 (num_heads)" in refused(
        op, **{name: wide}
    )


def test_store_slots_beyond_the_cache():
    slots = store_kv_arguments()["slot_mapping"]
    blocks = len(store_kv_arguments()["kv_cache"])
    slots[7] = blocks * BLOCK_SIZE
    message = refused("store_kv", slot_mapping=slots)
    assert f"slot_mapping[7] = {blocks * BLOCK_SIZE} is beyond the cache's " in message
    slots[7] -= 1
    call("store_kv", slot_mapping=slots)


def test_store_needs_a_row_for_every_slot_and_may_have_more():
    arguments = store_kv_arguments()
    for name in ("key", "value"):
        message = refused("store_kv", **{name: arguments[name][:-1]})
        assert "key and value must hold at least 300 tokens" in message
    call("store_kv", slot_mapping=arguments["slot_mapping"][:17])


def test_a_refused_store_writes_nothing():
    arguments = store_kv_arguments()
    before = arguments["kv_cache"].clone()
    arguments["slot_mapping"][-1] = 10**9
    arguments["key"] += 1
    with pytest.raises(RuntimeError, match="slot_mapping"):
        ops.store_kv(**arguments)
    raw = torch.uint8
    assert torch.equal(arguments["kv_cache"].view(raw), before.view(raw))


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_seal_block_ids_out_of_range(wrong):
    ids = seal_blocks_arguments()["block_ids"]
    ids[1] = wrong
    assert f"block_ids[1] = {wrong} is not a block" in refused(
        "seal_blocks", block_ids=ids
    )


def test_seal_previous_block_out_of_range():
    prev = seal_blocks_arguments()["prev_block_ids"]
    prev[2] = 10**6
    assert "prev_block_ids[2] = 1000000 is not a block" in refused(
        "seal_blocks", prev_block_ids=prev
    )


def test_seal_jobs_must_be_sorted():
    index = seal_blocks_arguments()["block_index"]
    assert index.tolist() == [0, 0, 1]
    assert "block_index must be sorted" in refused(
        "seal_blocks", block_index=index.flip(0)
    )


@pytest.mark.parametrize("op", ["gather_kv", "sparq_select", "sparq_attend", "attend"])
def test_block_table_entries_out_of_range(op):
    for wrong in (-1, 10**6):
        table = ARGUMENTS[op]()["block_table"]
        table[1, 1] = wrong
        message = refused(op, block_table=table)
        assert f"block_table[1][1] = {wrong} is not one of the" in message
        # Beyond the context, anything may stand.
        table = ARGUMENTS[op]()["block_table"]
        table[1, 2:] = wrong
        call(op, block_table=table)


@pytest.mark.parametrize("op", ["gather_kv", "sparq_select", "sparq_attend", "attend"])
@pytest.mark.parametrize("wrong", [0, -5, 513, 2**31 - 1])
def test_context_lengths_out_of_range(op, wrong):
    arguments = ARGUMENTS[op]()
    assert arguments["block_table"].shape == (ROWS, 4)
    lens = arguments["seq_lens"]
    lens[0] = wrong
    message = refused(op, seq_lens=lens)
    expected = f"seq_lens[0] = {wrong} does not fit a block_table of 4 blocks"
    assert expected in message


@pytest.mark.parametrize("wrong", [-1, 301])
def test_gather_rows_must_fit_the_output(wrong):
    message = refused("gather_kv", out_start=torch.tensor([0, wrong]))
    assert f"row 1 ends at token {wrong + 131}, beyond key or value" in message


def test_gather_writes_contiguous_outputs():
    apart = torch.zeros(TOKENS, KV_HEADS + 1, SIZE)[:, :KV_HEADS]
    for name in ("key", "value"):
        assert "key and value must be contiguous" in refused(
            "gather_kv", **{name: apart}
        )


@pytest.mark.parametrize(
    ("option", "wrong", "said"),
    [
        ("rank", 0, "rank must lie between 1 and head_size = 64, got 0"),
        ("rank", 65, "rank must lie between 1 and head_size = 64, got 65"),
        ("local_window", 0, "local_window must be at least 1, got 0"),
        ("sink_tokens", -1, "sink_tokens must not be negative, got -1"),
    ],
)
@pytest.mark.parametrize("op", ["sparq_select", "sparq_attend"])
def test_select_options_out_of_range(op, option, wrong, said):
    assert said in refused(op, **{option: wrong})


@pytest.mark.parametrize("wrong", [-1, 131])
def test_listed_tokens_beyond_the_context(wrong):
    arguments = attend_arguments()
    assert arguments["seq_lens"][1] == 131
    arguments["counts"][1, 2] = 3
    arguments["indices"][1, 2, :3] = torch.tensor([0, wrong, 5])
    message = refused("attend", **arguments)
    assert f"indices[1][2][1] = {wrong} is not a token of the row's 131" in message


@pytest.mark.parametrize(
    ("budgets", "kept"),
    [
        ([81, 40], "row 0 keeps 81"),
        ([70, 100], "row 1 keeps 100"),
    ],
)
def test_select_needs_room_for_every_budget(budgets, kept):
    message = refused("sparq_select", budgets=torch.tensor(budgets, dtype=torch.int32))
    assert f"indices holds 80 tokens, {kept}" in message


def test_select_needs_room_for_the_forced_tokens():
    # Row 0: a tail of 44 and 4 sinks; row 1: a tail of 3, a window of 77 and 4 sinks.
    small = torch.tensor([1, 1], dtype=torch.int32)
    call("sparq_select", budgets=small, local_window=76)
    message = refused("sparq_select", budgets=small, local_window=77)
    assert "indices holds 80 tokens, row 0 keeps 81" in message


def test_select_needs_no_room_where_everything_is_kept():
    arguments = sparq_select_arguments()
    arguments["budgets"] = torch.tensor([-1, 131], dtype=torch.int32)
    arguments["indices"] = torch.zeros(ROWS, KV_HEADS, 1, dtype=torch.int32)
    ops.sparq_select(**arguments)
    assert (arguments["counts"] == -1).all()


@pytest.mark.parametrize("op", ["sparq_select", "attend"])
@pytest.mark.parametrize("name", ["indices", "counts", "kept_mass"])
def test_lists_must_be_contiguous(op, name):
    tensor = ARGUMENTS[op]()[name]
    wide = torch.stack([tensor, tensor], 1)[:, 0]
    assert not wide.is_contiguous()
    message = refused(op, **{name: wide})
    assert name in message
    assert "must be contiguous" in message


@pytest.mark.parametrize("wrong", [0, 81, 300])
def test_attend_counts_out_of_range(wrong):
    counts = lists()["counts"]
    counts[1, 2] = wrong
    assert f"counts[5] = {wrong} must be -1 (everything) or from 1 to" in refused(
        "attend", counts=counts
    )


def test_attend_counts_beyond_the_context():
    room = torch.zeros(ROWS, KV_HEADS, 400, dtype=torch.int32)
    counts = lists()["counts"]
    counts[1, 0] = 132
    assert "counts[3] = 132 must be" in refused("attend", indices=room, counts=counts)
    counts[1, 0] = 131
    call("attend", indices=room, counts=counts)


@pytest.mark.parametrize("missing", ["indices", "counts"])
def test_attend_takes_both_lists_or_none(missing):
    assert "indices and counts must be given together" in refused(
        "attend", **{missing: None}
    )


@pytest.mark.parametrize(
    ("op", "absent"),
    [
        ("sparq_select", {"kept_mass": None}),
        ("attend", {"kept_mass": None}),
        ("attend", {"tokens_read": None}),
        ("attend", {"indices": None, "counts": None}),
    ],
)
def test_optional_tensors_may_be_absent(op, absent):
    call(op, **absent)


def test_no_rows_is_no_error():
    nothing = torch.zeros(0, dtype=torch.int32)
    none = dict(
        query=torch.zeros(0, HEADS, SIZE),
        block_table=torch.zeros(0, 4, dtype=torch.int32),
        seq_lens=nothing,
        indices=torch.zeros(0, KV_HEADS, ROOM, dtype=torch.int32),
        counts=torch.zeros(0, KV_HEADS, dtype=torch.int32),
        kept_mass=torch.zeros(0, HEADS),
    )
    call("sparq_select", budgets=nothing, **none)
    call("attend", out=torch.zeros(0, HEADS, SIZE), **none)
    call(
        "store_kv",
        key=torch.zeros(0, KV_HEADS, SIZE),
        value=torch.zeros(0, KV_HEADS, SIZE),
        slot_mapping=torch.zeros(0, dtype=torch.int64),
    )
    call("seal_blocks", block_ids=nothing, prev_block_ids=nothing, block_index=nothing)

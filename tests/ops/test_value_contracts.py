# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""On the CPU every op refuses values that break its contract; the error says which."""

import pytest
import torch

from vllm_sparse import ops
from vllm_sparse.cache import formats
from vllm_sparse.cache.formats import KvFormat, resolve_format
from vllm_sparse.cache.layout import BLOCK_SIZE

from .arguments import (
    ARGUMENTS,
    HEADS,
    KV_HEADS,
    ROOM,
    ROWS,
    SIZE,
    TOKENS,
    attend_arguments,
    call,
    refused,
    sparq_attend_arguments,
    store_arguments,
)
from .inputs import filled, sparq_options

READING = ["gather_kv", "sparq_attend", "attend"]


def test_store_slots_beyond_the_cache():
    slots = store_arguments()["slot_mapping"]
    blocks = len(store_arguments()["kv_cache"])
    slots[7] = blocks * BLOCK_SIZE
    message = refused("store", slot_mapping=slots)
    assert f"slot_mapping[7] = {blocks * BLOCK_SIZE} is beyond the cache's " in message
    slots[7] -= 1
    call("store", slot_mapping=slots)


def test_store_needs_a_row_for_every_slot_and_may_have_more():
    arguments = store_arguments()
    for name in ("key", "value"):
        message = refused("store", **{name: arguments[name][:-1]})
        assert f"key and value must hold at least {TOKENS} tokens" in message
        call("store", **{name: torch.cat([arguments[name]] * 2)})


@pytest.mark.parametrize("starts", [[-1, 300, 431], [0, 301, 300], [0, 301, 432]])
def test_store_rows_must_bring_tokens_that_are_there(starts):
    starts = torch.tensor(starts, dtype=torch.int32)
    assert "query_start_loc gives row " in refused("store", query_start_loc=starts)


def test_store_rows_bring_no_more_than_their_context():
    starts = torch.tensor([0, 301, 431], dtype=torch.int32)
    message = refused("store", query_start_loc=starts)
    assert "row 0 the tokens 0 to 301 of 431, for a context of 300" in message


def test_a_refused_store_writes_nothing():
    arguments = store_arguments()
    before = arguments["kv_cache"].clone()
    arguments["slot_mapping"][-1] = 10**9
    arguments["key"] += 1
    with pytest.raises(RuntimeError, match="slot_mapping"):
        ops.store(**arguments)
    raw = torch.uint8
    assert torch.equal(arguments["kv_cache"].view(raw), before.view(raw))


@pytest.mark.parametrize("op", READING)
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


@pytest.mark.parametrize("op", READING)
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
        ("top_p", 0.0, "top_p must lie in (0, 1], got 0"),
        ("top_p", 1.5, "top_p must lie in (0, 1], got 1.5"),
        ("min_tokens", -1, "min_tokens must not be negative, got -1"),
    ],
)
def test_select_options_out_of_range(option, wrong, said):
    options = sparq_options(**dict(rank=16, scale=0.125) | {option: wrong})
    assert said in refused("sparq_attend", options=options)


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
    message = refused("sparq_attend", budgets=torch.tensor(budgets, dtype=torch.int32))
    assert f"indices holds 80 tokens, {kept}" in message


def test_select_needs_room_for_the_forced_tokens():
    # Row 0: a tail of 44 and 4 sinks; row 1: a tail of 3, a window of 77 and 4 sinks.
    small = torch.tensor([1, 1], dtype=torch.int32)
    windows = [sparq_options(16, 0.125, local_window=n) for n in (76, 77)]
    call("sparq_attend", budgets=small, options=windows[0])
    message = refused("sparq_attend", budgets=small, options=windows[1])
    assert "indices holds 80 tokens, row 0 keeps 81" in message


def test_select_needs_no_room_where_everything_is_kept():
    arguments = sparq_attend_arguments()
    arguments["budgets"] = torch.tensor([-1, 131], dtype=torch.int32)
    arguments["indices"] = torch.zeros(ROWS, KV_HEADS, 1, dtype=torch.int32)
    ops.sparq_attend(**arguments)
    assert (arguments["counts"] == -1).all()


@pytest.mark.parametrize("op", ["sparq_attend", "attend"])
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
    counts = attend_arguments()["counts"]
    counts[1, 2] = wrong
    assert f"counts[5] = {wrong} must be -1 (everything) or from 1 to" in refused(
        "attend", counts=counts
    )


def test_attend_counts_beyond_the_context():
    room = torch.zeros(ROWS, KV_HEADS, 400, dtype=torch.int32)
    counts = attend_arguments()["counts"]
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
        ("sparq_attend", {"kept_mass": None}),
        ("sparq_attend", {"out": None}),
        ("attend", {"kept_mass": None}),
        ("attend", {"indices": None, "counts": None}),
    ],
)
def test_optional_tensors_may_be_absent(op, absent):
    call(op, **absent)


def test_no_rows_is_no_error():
    ints, floats = torch.zeros(0, dtype=torch.int32), torch.zeros(0, HEADS, SIZE)
    table = torch.zeros(0, 4, dtype=torch.int32)
    none = dict(
        query=floats,
        block_table=table,
        seq_lens=ints,
        indices=torch.zeros(0, KV_HEADS, ROOM, dtype=torch.int32),
        counts=torch.zeros(0, KV_HEADS, dtype=torch.int32),
        kept_mass=torch.zeros(0, HEADS),
        out=floats,
    )
    call("sparq_attend", budgets=ints, **none)
    call("attend", **none)
    starts = torch.zeros(1, dtype=torch.int32)
    rows = dict(block_table=table, seq_lens=ints, query_start_loc=starts)
    call("store", **rows)
    call("store", slot_mapping=torch.zeros(0, dtype=torch.int64), **rows)


INT4 = resolve_format("int4", None, SIZE)


def test_formats_must_fit_the_cache():
    ctx = filled([300], KV_HEADS, SIZE, torch.float32, INT4)
    query = torch.ones(1, HEADS, SIZE)

    def attend(**changes):
        where = dict(kv_cache=ctx.kv_cache, block_table=ctx.block_table, fmt=INT4)
        rest = dict(seq_lens=ctx.seq_lens, scale=1.0, out=torch.empty_like(query))
        ops.attend(query, **where | rest | changes)

    attend()
    for fmt in (formats.ROWS, resolve_format("int8", None, SIZE)):
        with pytest.raises(RuntimeError, match="bytes per token and head"):
            attend(fmt=fmt)
    with pytest.raises(RuntimeError, match="not a format for head size 64"):
        attend(fmt=KvFormat("int4", 4, 4, 48))
    with pytest.raises(RuntimeError, match="hold the mean of V"):
        bare = resolve_format("int4", None, SIZE, has_mean=False)
        cache = filled([300], KV_HEADS, SIZE, torch.float32, bare).kv_cache
        attend(kv_cache=cache, fmt=bare, kept_mass=torch.ones(1, HEADS))
    with pytest.raises(RuntimeError, match="does not fit a block_table"):
        attend(block_table=ctx.block_table[:, :5].contiguous())


def test_codes_need_blocks_ahead_to_be_stored():
    ctx = filled([300], KV_HEADS, SIZE, torch.float32, INT4)
    step = dict(kv_cache=ctx.kv_cache, fmt=INT4, **ctx.new_tokens())
    with pytest.raises(RuntimeError, match="beyond its tokens"):
        short = ctx.block_table[:, :5].contiguous()
        ops.store(**step | dict(block_table=short))
    with pytest.raises(RuntimeError, match="is not one of the"):
        broken = ctx.block_table.clone()
        broken[0, 4] = 10**6
        ops.store(**step | dict(block_table=broken))

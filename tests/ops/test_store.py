# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Storing and sealing, against the reference: ragged, random, NaN-poisoned, padded."""

import random
from collections.abc import Iterator

import pytest
import torch

from vllm_sparse.cache.formats import ROWS, KvFormat, resolve_format
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout
from vllm_sparse.ops import reference

from .compare import assert_close
from .generate import PagedContext, paged_context
from .inputs import (
    BF16,
    F16,
    F32,
    INPUTS,
    INTERPRETED,
    QUANTISED,
    generator,
    raw,
    stored_parts,
)

SEQ_LENS = [400, 257, 128, 129, 700]
STARTED = [253, 250, 125, 0, 381]  # a few tokens before a block's end, mostly


def context(shape, dtype, fmt=ROWS, seq_lens=SEQ_LENS, heads_apart=False):
    size = (seq_lens, shape[1], shape[2], dtype, generator())
    return paged_context(*size, fmt=fmt, heads_apart=heads_apart)


def padded(step: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A step with requests that bring nothing, one of them at the end of a live block,
    and with tokens of no request whose slots are live. There are as many slots as rows
    where each brings one token at most, and only there."""
    table, starts = step["block_table"], step["query_start_loc"]
    more = len(table) + 2 - len(step["key"])
    if starts.diff().max() > 1:
        more = max(more + 1, 2)
    nothing = torch.ones(more, *step["key"].shape[1:]).to(step["key"].dtype)
    live = table[3:4]  # starts late: its first block is not full
    slots = int(live[0, 0]) * BLOCK_SIZE + BLOCK_SIZE - 1 - torch.arange(more)
    return dict(
        key=torch.cat([step["key"], nothing]),
        value=torch.cat([step["value"], nothing]),
        slot_mapping=torch.cat([step["slot_mapping"], slots]),
        block_table=torch.cat([table, torch.zeros_like(live), live]),
        seq_lens=torch.cat([step["seq_lens"], torch.tensor([0, 256]).int()]),
        query_start_loc=torch.cat([starts, starts[-1:].expand(2)]),
    )


def random_steps(ctx: PagedContext, seed: int) -> Iterator[tuple[dict, list[int]]]:
    """Arguments of ``store`` and the contexts then: prompts in chunks, decoding rows,
    wrong drafts that cross a block's end and are replaced, steps without slots."""
    dice, ends = random.Random(seed), ctx.seq_lens.tolist()
    done = [0] * len(ends)
    kinds = ["start"] + 4 * ["decode", "drafts", "idle"] + 6 * ["chunk"] + ["rest"]
    for kind in kinds:
        most = {
            "start": STARTED,
            "decode": [1] * len(ends),
            "drafts": [5] + [dice.choice([0, 2, 5]) for _ in ends[1:]],
            "idle": [dice.choice([1, 130]) for _ in ends],
            "chunk": [dice.choice([0, 1, 50, 129, 260]) for _ in ends],
            "rest": ends,
        }[kind]
        last = [min(n + new, end) for n, new, end in zip(done, most, ends)]
        step = ctx.new_tokens(done, last)
        if kind == "drafts":
            first = step["query_start_loc"]
            wrong = ~torch.isin(torch.arange(len(step["key"])), first)
            step["key"][wrong] += 1
        if kind == "idle":
            step["slot_mapping"].fill_(-1)
            last = done
        yield padded(step), last
        if kind == "drafts":
            last = [min(n + 1, end) for n, end in zip(done, last)]
        done = last


def assert_same_rows(got: torch.Tensor, want: torch.Tensor, head_size: int) -> None:
    """Whole caches: means as close as fp16 allows, the rest to the bit."""
    end = BlockLayout(head_size, want.element_size()).prefix_mean_offset
    places = (slice(end), slice(end, end + 2 * head_size), slice(end + 2 * head_size))
    before, means, _ = ([raw(t)[..., place] for t in (got, want)] for place in places)
    assert torch.equal(*before)
    mean, expected = (t.contiguous().view(torch.float16) for t in means)
    known = expected.isfinite()
    assert torch.equal(mean.isfinite(), known) and known.any()
    assert_close(mean[known], expected[known])


@pytest.mark.parametrize(("shape", "dtype"), INPUTS, ids=str)
def test_rows_of_random_steps(kernels, shape, dtype):
    kernels.skip_unless_served(dtype)
    ctx = context(shape, dtype, heads_apart=True)
    got, want = ctx.kv_cache.clone(), ctx.kv_cache.clone()
    sealed_again = 0
    for step, lens in random_steps(ctx, seed=shape[2]):
        before = raw(got.clone())
        kernels.store(kv_cache=got, **step)
        reference.store(kv_cache=want, **step)
        idle = (step["slot_mapping"][: step["query_start_loc"][-1]] < 0).all()
        assert not idle or torch.equal(raw(got), before)
        assert_same_rows(got, want, shape[2])
        block = int(ctx.block_table[0, 1])  # filled by drafts
        codes = slice(BlockLayout(shape[2], got.element_size()).codes_offset, None)
        known = not (before[block][:, codes] == 255).all()
        sealed_again += known and not torch.equal(before[block], raw(got)[block])
    assert sealed_again
    assert (raw(got)[0] == 255).all()  # vLLM's null block


def assert_same_parts(got: tuple, want: tuple) -> None:
    """Codes and rows to the bit, means as close as fp16 allows."""
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    if want[1].numel():
        assert_close(got[1], want[1])


@pytest.mark.skipif(INTERPRETED, reason="quantised formats have no Triton kernels")
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize(("shape", "dtype"), INPUTS, ids=str)
def test_codes_and_tails_of_random_steps(kernels, shape, dtype, name):
    fmt = resolve_format(name, None, shape[2], has_mean=shape[0] % 2 == 0)
    kernels.skip_unless_served(dtype, fmt)
    ctx = context(shape, dtype, fmt)
    got, want = ctx.kv_cache.clone(), ctx.kv_cache.clone()
    for step, lens in random_steps(ctx, seed=shape[2]):
        before = raw(got.clone())
        kernels.store(kv_cache=got, **step, fmt=fmt)
        reference.store(kv_cache=want, **step, fmt=fmt)
        idle = (step["slot_mapping"][: step["query_start_loc"][-1]] < 0).all()
        assert not idle or torch.equal(raw(got), before)
        assert_same_parts(*(stored_parts(ctx, t, lens, fmt) for t in (got, want)))
    assert (raw(got)[0] == 255).all()


def store_in_steps(ctx: PagedContext, steps: list[list[int]], by, fmt: KvFormat):
    """The cache after contexts have had these lengths; shorter: rejected drafts."""
    cache, done = ctx.kv_cache.clone(), [0] * len(ctx.keys)
    for lens in steps:
        first = [min(n, length) for n, length in zip(done, lens)]
        by.store(kv_cache=cache, **ctx.new_tokens(first, lens), fmt=fmt)
        done = lens
    return cache


@pytest.mark.skipif(INTERPRETED, reason="quantised formats have no Triton kernels")
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_blocks_depend_on_tokens_alone_not_on_steps(dtype, name, kernels):
    """One prompt, chunks of any size, tokens one by one, drafts that are rejected."""
    fmt = resolve_format(name, None, 64, has_mean=dtype == F32)
    kernels.skip_unless_served(dtype, fmt)
    lens = [700, 257, 128, 129]
    ctx = context((6, 2, 64), dtype, fmt, lens)
    want = stored_parts(ctx, store_in_steps(ctx, [lens], kernels, fmt), lens, fmt)
    most = BlockLayout(64, dtype.itemsize, fmt).rows_per_block
    drafts = []
    for at in range(0, 700, 7):
        # Up to `most` tokens are tried, 7 of them are kept.
        drafts.append([min(at + most, n) for n in lens])
        drafts.append([min(at + 7, n) for n in lens])
    ways = [
        [[min(at, n) for n in lens] for at in range(size, 700 + size, size)]
        for size in (100, 300, 1)
    ]
    for steps in [*ways, [*drafts, lens]]:
        cache = store_in_steps(ctx, steps, kernels, fmt)
        assert_same_parts(stored_parts(ctx, cache, lens, fmt), want)


@pytest.mark.parametrize("name", ["auto"] if INTERPRETED else ["auto", "int4"])
def test_a_shared_prefix_is_sealed_before_means_are_taken_of_it(kernels, name):
    """The second request's new tokens follow blocks that the first one stores."""
    fmt = resolve_format(name, None, 64)
    kernels.skip_unless_served(F16, fmt)
    ctx = context((6, 2, 64), F16, fmt, [384, 384])
    # The request whose blocks come later in the context comes first.
    ctx.block_table[0, :2] = ctx.block_table[1, :2]
    ctx.keys[0][:256], ctx.values[0][:256] = ctx.keys[1][:256], ctx.values[1][:256]
    cache = ctx.kv_cache.clone()
    kernels.store(kv_cache=cache, **ctx.new_tokens([256, 0]), fmt=fmt)
    lay = BlockLayout(64, 2, fmt)
    for row in range(2):
        last = cache[int(ctx.block_table[row, 2]), 1]
        mean = ctx.values[row][:, 1].float().mean(0)
        assert_close(reference.prefix_mean(last, lay), mean, 1e-2)


@pytest.mark.parametrize("stored", [127, 128])
def test_a_block_is_sealed_when_its_last_token_has_a_slot(kernels, stored):
    """As where a draft model leaves tokens without one."""
    ctx = context((6, 2, 64), BF16, seq_lens=[130, 300])
    step = ctx.new_tokens()
    step["slot_mapping"][stored:130] = -1
    cache, want = ctx.kv_cache.clone(), ctx.kv_cache.clone()
    kernels.store(kv_cache=cache, **step)
    reference.store(kv_cache=want, **step)
    assert_same_rows(cache, want, 64)
    lay = BlockLayout(64, 2)
    codes = raw(cache)[int(ctx.block_table[0, 0]), :, lay.codes_offset :]
    assert (codes == 255).all() == (stored == 127)


def test_tokens_inside_a_fused_projection(kernels):
    """Aligned to 16 bytes and not; on GPUs, slots beyond the cache are skipped."""
    ctx = paged_context([200], 3, 64, BF16, generator())
    step = ctx.new_tokens()
    step["slot_mapping"][150] = -1
    for columns in (15 * 64, 15 * 64 + 1):
        qkv = torch.randn(200, columns, generator=generator(1)).bfloat16()
        want = ctx.kv_cache.clone()
        cache = want.to(kernels.device, copy=True)
        for place, store in ((cache, kernels.ops.store), (want, reference.store)):
            given = {name: t.to(place.device) for name, t in step.items()}
            rows = qkv.to(place.device)
            given["key"] = rows[:, 9 * 64 : 12 * 64].unflatten(1, (3, 64))
            given["value"] = rows[:, 12 * 64 : 15 * 64].unflatten(1, (3, 64))
            if kernels.name != "cpu":
                given["slot_mapping"][151] = -1 if place is want else 10**9
            store(kv_cache=place, **given)
        assert_same_rows(cache.cpu(), want, 64)


@pytest.mark.parametrize("name", ["auto"] if INTERPRETED else ["auto", *QUANTISED])
def test_constant_and_extreme_channels_stay_finite(kernels, name):
    fmt, dtype = resolve_format(name, None, 64), F16 if kernels.name == "cuda" else F32
    kernels.skip_unless_served(dtype, fmt)
    ctx = context((1, 1, 64), dtype, fmt, [129])
    large = 6e4 if dtype == F16 else 1e6
    ctx.keys[0][:, 0, 0] = 3.25
    ctx.keys[0][:, 0, 1] = torch.linspace(-large, large, 129)
    ctx.values[0][5] = 2.5
    ctx.values[0][6, 0, :2] = torch.tensor([-large, large])
    got, want = (store_in_steps(ctx, [[129]], by, fmt) for by in (kernels, reference))
    lay, block = BlockLayout(64, dtype.itemsize, fmt), int(ctx.block_table[0, 0])
    end = lay.prefix_mean_offset
    assert torch.equal(raw(got)[block, :, :end], raw(want)[block, :, :end])
    key = reference.dequantise_k(got[block, 0], lay)
    assert key.isfinite().all() and (fmt.key_bits == 8 or (key[:, 0] == 3.25).all())
    if fmt.quantised:
        key, value = reference.read_block(got[block, 0], lay)
        assert key.isfinite().all() and value.isfinite().all()
        assert torch.equal(value[5], torch.full((64,), 2.5))


@pytest.mark.skipif(INTERPRETED, reason="quantised formats have no Triton kernels")
@pytest.mark.parametrize("name", QUANTISED)
def test_codes_are_as_near_as_their_bits_allow(name, kernels):
    fmt = resolve_format(name, None, 64)
    kernels.skip_unless_served(F16, fmt)
    ctx = context((1, 1, 64), F16, fmt, [129])
    cache = store_in_steps(ctx, [[129]], kernels, fmt)
    chunk = cache[int(ctx.block_table[0, 0]), 0]
    key, value = reference.read_block(chunk, BlockLayout(64, 2, fmt))
    exact_key, exact_value = (t[0][:128, 0].float() for t in (ctx.keys, ctx.values))
    if fmt.key_rows:
        groups, bits = [(key, exact_key)], 8
    else:
        tokens = (-1, fmt.key_group)
        groups = [tuple(t.T.unflatten(1, tokens) for t in (key, exact_key))]
        bits = fmt.key_bits
    channels = (-1, fmt.value_group)
    groups.append(tuple(t.unflatten(1, channels) for t in (value, exact_value)))
    for (got, exact), width in zip(groups, (bits, fmt.value_bits)):
        step = (exact.amax(-1) - exact.amin(-1)) / (2**width - 1)
        assert ((got - exact).abs().amax(-1) <= 0.52 * step + 2e-3).all()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What every implementation of the ops must do, on any device.

Each check prepares ragged, permuted, NaN-poisoned inputs on the CPU, runs
``vllm_sparse.ops`` on ``device`` with the kernels chosen there, and compares with the
fp32 reference.
"""

import torch

from .. import ops
from ..cache.layout import BLOCK_SIZE, BlockLayout
from ..ops import reference
from ..ops.kept import KEPT_BINS, add_counts
from .compare import assert_close
from .generate import paged_context
from .op_inputs import (
    Shape,
    assert_same_lists,
    filled,
    generator,
    list_buffers,
    moved,
    moved_cache,
    random_query,
    raw,
    select_both,
    sparq_options,
    store_and_seal,
)


def check_store_and_seal(
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
    seq_lens: list[int],
    heads_apart: bool = True,
) -> None:
    """Rows, codes and parameters to the bit, means of V as close as fp16 allows."""
    _, num_kv_heads, head_size = shape
    want = filled(seq_lens, num_kv_heads, head_size, dtype)
    ctx = paged_context(seq_lens, num_kv_heads, head_size, dtype, generator())
    cache = moved_cache(ctx.kv_cache, device, heads_apart)
    for row in range(len(seq_lens)):
        given = (ctx.keys[row], ctx.values[row], cache, ctx.slots(row))
        ops.store_kv(*(t.to(device) for t in given[:2]), cache, given[3].to(device))
    jobs = [t.to(device) for t in ctx.seal_jobs()]
    ops.seal_blocks(cache, *jobs, head_size)
    got, expected = raw(cache), raw(want.kv_cache)
    end = BlockLayout(head_size, dtype.itemsize).prefix_mean_offset
    assert torch.equal(got[..., :end], expected[..., :end])
    means = [
        t[..., end : end + 2 * head_size].contiguous().view(torch.float16)
        for t in (got, expected)
    ]
    assert_close(*means)


def check_strided_store(device: torch.device) -> None:
    """Keys and values inside a fused projection, aligned to 16 bytes and not; slots
    that are negative or beyond the cache are skipped."""
    ctx = paged_context([200], 3, 64, torch.bfloat16, generator())
    want = ctx.kv_cache.clone()
    for columns in (15 * 64, 15 * 64 + 1):
        qkv = torch.randn(200, columns, generator=generator(1)).bfloat16()
        slots = ctx.slots(0)
        slots[5], slots[6] = -1, 10**9
        cache = moved_cache(ctx.kv_cache, device)
        for place, to, where in (
            (torch.device("cpu"), want, slots.where(slots < 10**9, -1)),
            (device, cache, slots.to(device)),
        ):
            rows = qkv.to(place)
            key = rows[:, 9 * 64 : 12 * 64].unflatten(1, (3, 64))
            value = rows[:, 12 * 64 : 15 * 64].unflatten(1, (3, 64))
            store = reference.store_kv if to is want else ops.store_kv
            store(key, value, to, where)
        assert torch.equal(raw(cache), raw(want))


def check_rows(
    device: torch.device, shape: Shape, dtype: torch.dtype, drafts: int
) -> None:
    """What decode requests store and fill: one token each, or several with drafts."""
    _, num_kv_heads, head_size = shape
    lens = [1, 127, 128, 129, 256, 384, 130]
    ctx = paged_context(lens, num_kv_heads, head_size, dtype, generator())
    for row in range(len(lens)):
        reference.store_kv(ctx.keys[row], ctx.values[row], ctx.kv_cache, ctx.slots(row))
    block, prev, index = ctx.seal_jobs()
    before = torch.isin(block, prev)  # earlier steps sealed all but the last ones
    jobs = (block[before], prev[before], index[before])
    reference.seal_blocks(ctx.kv_cache, *jobs, head_size)
    # Requests that only pad the batch: no tokens, and vLLM's null block, or a live one
    # that is not full, at length 0 and where a block would end.
    unfilled = int(ctx.block_table[6, 1])
    seq_lens = torch.cat([ctx.seq_lens, torch.tensor([0, 0, 256])]).int()
    table = torch.cat([ctx.block_table, torch.zeros_like(ctx.block_table[:3])])
    table[-2:] = unfilled
    untouched = raw(ctx.kv_cache)[unfilled].clone()
    cache, want = moved_cache(ctx.kv_cache, device), ctx.kv_cache
    if drafts:
        new = torch.minimum(seq_lens, torch.tensor(1 + drafts))
        new[-1] = 0
        rest = (table, seq_lens, torch.cat([torch.zeros(1), new.cumsum(0)]).int())
        ops.seal_rows(cache, *(t.to(device) for t in rest), head_size)
        reference.seal_rows(want, *rest, head_size)
    else:
        key, value = (
            torch.stack([t[-1] for t in ts] + 3 * [ts[0][-1]]) + 1
            for ts in (ctx.keys, ctx.values)
        )
        slots = [int(ctx.slots(row)[-1]) for row in range(len(lens))]
        rest = (torch.tensor([*slots, -1, -1, -1]), table, seq_lens)
        there = (t.to(device) for t in (key, value))
        ops.store_rows(*there, cache, *(t.to(device) for t in rest))
        reference.store_rows(key, value, want, *rest)
    lay = BlockLayout(head_size, dtype.itemsize)
    end = lay.prefix_mean_offset
    got, expected = raw(cache), raw(want)
    sidecar = (..., slice(lay.codes_offset, None))
    assert torch.equal(expected[unfilled][sidecar], untouched[sidecar])
    assert torch.equal(got[..., :end], expected[..., :end])
    means = [
        t[..., end : end + 2 * head_size].contiguous().view(torch.float16)
        for t in (got, expected)
    ]
    sealed = means[1].isfinite()
    assert torch.equal(means[0].isfinite(), sealed)
    assert_close(*(t[sealed] for t in means))


def check_seal_order(device: torch.device) -> None:
    """A shared prefix sealed in the same call is read after it is written, and jobs
    with a negative block id are skipped."""
    ctx = paged_context([384, 384], 2, 64, torch.float32, generator())
    ctx.block_table[1, :2] = ctx.block_table[0, :2]
    ctx.keys[1][:256], ctx.values[1][:256] = ctx.keys[0][:256], ctx.values[0][:256]
    for row in range(2):
        reference.store_kv(ctx.keys[row], ctx.values[row], ctx.kv_cache, ctx.slots(row))
    block_ids, prev_block_ids, block_index = ctx.seal_jobs()
    nothing = torch.full((1,), -1, dtype=torch.int32)
    jobs = [
        torch.cat([nothing, block_ids[:3], nothing, block_ids[3:]]),
        torch.cat([nothing, prev_block_ids[:3], nothing, prev_block_ids[3:]]),
        torch.cat([nothing, block_index[:3], nothing, block_index[3:]]),
    ]
    cache = moved_cache(ctx.kv_cache, device)
    ops.seal_blocks(cache, *(t.to(device) for t in jobs), 64)
    lay = BlockLayout(64, 4)
    for row in range(2):
        last = cache[int(ctx.block_table[row, 2]), 1].cpu()
        mean = ctx.values[row][:, 1].mean(0)
        assert_close(reference.prefix_mean(last, lay), mean, 1e-2)
    untouched = set(range(len(cache))) - set(block_ids.tolist())
    for block in untouched:
        assert torch.equal(raw(cache)[block], raw(ctx.kv_cache)[block])


def check_seal_rows(device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    """Rows that have just filled a block, that filled none, whose draft tokens pass its
    end, and that are padding: sealed to the bit as by the reference."""
    _, num_kv_heads, head_size = shape
    lens, new = [128, 300, 258, 384, 256, 0], [1, 1, 4, 1, 1, 0]
    ctx = paged_context(lens[:-1], num_kv_heads, head_size, dtype, generator())
    for row in range(len(ctx.keys)):
        reference.store_kv(ctx.keys[row], ctx.values[row], ctx.kv_cache, ctx.slots(row))
    block_ids, prev_block_ids, block_index = ctx.seal_jobs()
    earlier = block_index == 0
    jobs = (block_ids[earlier], prev_block_ids[earlier], block_index[earlier])
    reference.seal_blocks(ctx.kv_cache, *jobs, head_size)
    # The row of three blocks sealed its second one in an earlier step.
    second = [[int(ctx.block_table[3, i])] for i in (1, 0)] + [[1]]
    reference.seal_blocks(ctx.kv_cache, *torch.tensor(second), head_size)
    table = torch.cat([ctx.block_table, torch.zeros_like(ctx.block_table[:1])])
    table[4, 1] = 0  # the null block, which is never sealed
    starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0).int()
    rows = (table, torch.tensor(lens, dtype=torch.int32), starts)
    cache = moved_cache(ctx.kv_cache, device)
    ops.seal_rows(cache, *(t.to(device) for t in rows), head_size)
    want = ctx.kv_cache.clone()
    reference.seal_rows(want, *rows, head_size)
    assert not torch.equal(raw(want), raw(ctx.kv_cache))
    got, expected = raw(cache), raw(want)
    end = BlockLayout(head_size, dtype.itemsize).prefix_mean_offset
    assert torch.equal(got[..., :end], expected[..., :end])
    means = [
        t[..., end : end + 2 * head_size].contiguous().view(torch.float16)
        for t in (got, expected)
    ]
    assert_close(*means)


def check_gather(device: torch.device) -> None:
    ctx = filled([300, 128, 5], 3, 64, torch.bfloat16)
    key = torch.full((433, 3, 64), torch.nan, dtype=torch.bfloat16, device=device)
    value = torch.full_like(key, torch.nan)
    rest = (ctx.block_table, ctx.seq_lens, torch.tensor([0, 300, 428]))
    cache = moved_cache(ctx.kv_cache, device)
    ops.gather_kv(cache, *(t.to(device) for t in rest), key, value)
    assert torch.equal(key.cpu(), torch.cat(ctx.keys))
    assert torch.equal(value.cpu(), torch.cat(ctx.values))


def check_select(
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
    contexts: list[tuple[int, int]],
    rank: int,
    soft_cap: float,
    with_mass: bool,
    tolerance: float,
) -> None:
    """``contexts`` are (length, budget) pairs."""
    num_heads, num_kv_heads, head_size = shape
    seq_lens = [length for length, _ in contexts]
    ctx = filled(seq_lens, num_kv_heads, head_size, dtype)
    query = random_query(ctx, num_heads, dtype)
    budgets = torch.tensor([budget for _, budget in contexts], dtype=torch.int32)
    options = sparq_options(rank=rank, scale=head_size**-0.5, soft_cap=soft_cap)
    max_kept = int(budgets.max()) + BLOCK_SIZE
    got, want = select_both(ctx, query, budgets, options, device, max_kept, with_mass)
    assert (want["counts"] >= 0).any()
    assert_same_lists(got, want, ctx, query, options, tolerance)
    if with_mass:
        assert (got["kept_mass"][got["counts"][:, 0] == -1] == 1).all()


def check_budget_edges(
    device: torch.device, budgets: list[int], num_blocks: int, tolerance: float
) -> None:
    """Every budget with a context that ends a block, and on both sides of that end."""
    end = num_blocks * BLOCK_SIZE
    lens = [length for length in (end - 1, end, end + 1) for _ in budgets]
    ctx = filled(lens, 1, 64, torch.float32)
    query = random_query(ctx, 2, torch.float32)
    options = sparq_options(rank=64, local_window=40, scale=0.125)
    given = torch.tensor(budgets * 3, dtype=torch.int32)
    got, want = select_both(ctx, query, given, options, device, end)
    assert_same_lists(got, want, ctx, query, options, tolerance)


def check_ties(device: torch.device, lengths: list[int], dtype: torch.dtype) -> None:
    """Where every token scores the same, the lower positions win."""
    ctx = paged_context(lengths, 1, 64, dtype, generator())
    for keys in ctx.keys:
        keys[:] = 1.0
    store_and_seal(ctx)
    query = random_query(ctx, 1, dtype)
    budgets = torch.full((len(lengths),), 100, dtype=torch.int32)
    options = sparq_options(rank=16, local_window=10, sink_tokens=0, scale=0.125)
    given = (ctx, query, budgets, options, device, 228)
    results = [select_both(*given, with_mass)[0] for with_mass in (True, False)]
    lists = list_buffers(ctx, 1, 228, with_mass=False)
    lists = {name: moved(t, device) for name, t in lists.items()}
    inputs = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    inputs = [t.to(device) for t in inputs]
    ops.sparq_attend(*inputs, **options, **lists, out=torch.empty_like(inputs[0]))
    for got in (*results, lists):
        for row, length in enumerate(lengths):
            tail = max(10, length % BLOCK_SIZE)
            expected = [*range(100 - tail), *range(length - tail, length)]
            assert got["indices"][row, 0, :100].tolist() == expected


def check_attend(
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
    contexts: list[tuple[int, int]],
    soft_cap: float,
    listed: bool,
    with_mass: bool,
    heads_apart: bool = True,
    workspace: torch.Tensor | None = None,
) -> None:
    """``contexts`` are (length, listed tokens) pairs; -1: the whole context."""
    num_heads, num_kv_heads, head_size = shape
    ctx = filled([n for n, _ in contexts], num_kv_heads, head_size, dtype)
    query = random_query(ctx, num_heads, dtype)
    max_kept = max(count for _, count in contexts) + 3
    lists = list_buffers(ctx, num_heads, max_kept)
    lists["indices"].fill_(10**9)
    for row, (length, count) in enumerate(contexts):
        lists["counts"][row] = count
        for head in range(num_kv_heads):
            order = torch.randperm(length, generator=generator(head))[: max(count, 0)]
            lists["indices"][row, head, : len(order)] = order.sort().values.int()
    given = dict(
        indices=lists["indices"] if listed else None,
        counts=lists["counts"] if listed else None,
        kept_mass=None,
    )
    if with_mass:
        shape = (len(contexts), num_heads)
        given["kept_mass"] = torch.rand(shape, generator=generator(3))
    rest = (ctx.block_table, ctx.seq_lens)
    options = dict(scale=head_size**-0.5, soft_cap=soft_cap)
    want, want_read = torch.full_like(query, torch.nan), torch.zeros(1).long()
    got, got_read = (t.clone().to(device) for t in (want, want_read))
    ops.attend(
        query.to(device),
        moved_cache(ctx.kv_cache, device, heads_apart),
        *(t.to(device) for t in rest),
        **{name: moved(t, device) for name, t in given.items()},
        **options,
        out=got,
        tokens_read=got_read,
        workspace=workspace,
    )
    reference.attend(
        query,
        ctx.kv_cache,
        *rest,
        **given,
        **options,
        out=want,
        tokens_read=want_read,
    )
    assert_close(got.cpu(), want)
    assert got_read.item() == want_read.item() > 0


class Step:
    """Both steps of SparQ over one batch, on a device."""

    options = sparq_options(rank=24, scale=0.2)

    def __init__(
        self,
        device: torch.device,
        contexts: list[tuple[int, int]],
        dtype: torch.dtype = torch.bfloat16,
        with_mass: bool = True,
    ) -> None:
        self.ctx = filled([n for n, _ in contexts], 2, 64, dtype)
        budgets = torch.tensor([b for _, b in contexts], dtype=torch.int32)
        query = random_query(self.ctx, 6, dtype)
        inputs = (query, self.ctx.block_table, self.ctx.seq_lens, budgets)
        self.inputs = [t.to(device) for t in inputs]
        self.cache = self.ctx.kv_cache.to(device)
        self.device = device
        self.max_kept = int(budgets.max()) + BLOCK_SIZE
        self.with_mass = with_mass
        self.more: dict[str, torch.Tensor] = {}
        self.reset()

    def reset(self) -> None:
        lists = list_buffers(self.ctx, 6, self.max_kept, self.with_mass)
        self.lists = {name: moved(t, self.device) for name, t in lists.items()}
        self.out = torch.full_like(self.inputs[0], torch.nan)

    def run(self, rows: list[int] | None = None) -> None:
        """Both in one op; ``rows``: only these, as a batch of their own."""
        part = slice(None) if rows is None else rows
        query, table, lens, budgets = (t[part] for t in self.inputs)
        lists = {k: None if t is None else t[part] for k, t in self.lists.items()}
        out = self.out[part]
        given = (query, self.cache, table, lens, budgets)
        ops.sparq_attend(*given, **self.options, **lists, out=out, **self.more)
        if rows is not None:
            self.out[part] = out

    @property
    def context(self) -> tuple[torch.Tensor, ...]:
        query, table, lens, _ = self.inputs
        return query, self.cache, table, lens

    def run_apart(self) -> None:
        budgets = self.inputs[3]
        ops.sparq_select(*self.context, budgets, **self.options, **self.lists)
        ops.attend(*self.context, **self.lists, scale=0.2, out=self.out)


def check_both_steps(
    device: torch.device, contexts: list[tuple[int, int]], with_mass: bool
) -> None:
    """One op gives what the two give, also when a CUDA graph replays it."""
    step = Step(device, contexts, with_mass=with_mass)
    step.run_apart()
    lists, out = step.lists, step.out
    step.reset()
    step.run()
    if device.type == "cuda" and not with_mass:
        # May be another kernel, with other sums: it has to agree with itself.
        lists, out, apart = step.lists, step.out, torch.empty_like(step.out)
        ops.attend(*step.context, **lists, scale=0.2, out=apart)
        assert_close(out, apart)
        step.reset()
        step.run()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.run()
        for t in (step.out, step.lists["indices"], step.lists["counts"]):
            t.fill_(-7)
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(out, step.out)
    for name, t in lists.items():
        assert t is None or torch.equal(t, step.lists[name])


def check_kept_histogram(device: torch.device, contexts: list[tuple[int, int]]) -> None:
    """The op counts what its lists hold, and adds to what is there."""
    step = Step(device, [*contexts, (200, -1)], with_mass=False)
    histogram = torch.ones(2, KEPT_BINS, dtype=torch.int64, device=device)
    step.options = step.options | dict(top_p=0.9)
    step.more = dict(kept_histogram=histogram)
    step.run()
    expected = torch.ones(2, KEPT_BINS, dtype=torch.int64)
    counts = step.lists["counts"].cpu()
    add_counts(counts, expected)
    assert torch.equal(histogram.cpu(), expected)
    assert (counts[-1] == -1).all() and (counts[:-1] > 0).any()


def check_batch_invariance(
    device: torch.device, contexts: list[tuple[int, int]]
) -> None:
    """A row alone gives to the bit what it gives in a batch."""
    step = Step(device, contexts, torch.float32)
    step.run()
    together = step.out.clone()
    step.reset()
    for row in range(len(contexts)):
        step.run([row])
    assert torch.equal(together, step.out)


def check_values_out_of_range(device: torch.device, length: int) -> None:
    """Bad block ids and empty contexts harm no other row; a NaN query keeps valid
    positions."""
    results = []
    for broken in (False, True):
        step = Step(device, [(length, 200)] * 4)
        query, table, lens, _ = step.inputs
        if broken:
            table[1, 3], table[1, 4], lens[2], query[3] = -5, 10**9, 0, torch.nan
        step.run()
        results.append(step)
    good, bad = results
    assert torch.equal(good.out[0], bad.out[0])
    assert torch.equal(good.lists["indices"][0], bad.lists["indices"][0])
    assert (bad.out[2] == 0).all()
    for head in range(2):
        kept = bad.lists["indices"][3, head, : int(bad.lists["counts"][3, head])]
        assert len(kept) == 200 and kept[0] >= 0 and kept[-1] < length
        assert (kept[1:] > kept[:-1]).all()

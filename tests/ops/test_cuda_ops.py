# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What depends on how the CUDA kernels split their work: dtypes, groups, ranks, batch
sizes, long rows, workspaces, graphs. What all kernels must do: test_triton_ops.py.
"""

import pytest
import torch

from vllm_sparse import ops
from vllm_sparse.ops import reference
from vllm_sparse.testing import op_checks, op_inputs, top_p_checks
from vllm_sparse.testing.compare import assert_close
from vllm_sparse.testing.generate import paged_context
from vllm_sparse.testing.op_inputs import filled, generator, list_buffers, random_query

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# num_heads, num_kv_heads, head_size: GQA, MHA, MQA, odd sizes, wide groups.
SHAPES = [
    (9, 3, 64),
    (4, 4, 80),
    (6, 1, 96),
    (8, 2, 128),
    (4, 1, 256),
    (16, 2, 64),
    (7, 1, 64),
    (12, 1, 128),
]
SEQ_LENS = [1, 127, 128, 129, 700, 2175, 9000]
MAX_KEPT = 2048
# Lists as good as the reference's: token by token, and by the mass that they lose.
AS_GOOD = dict(tolerance=op_inputs.SCORE_TOLERANCE["cuda"], lost=0.002)

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)


@pytest.fixture(scope="module")
def workspace():
    """One for all tests: calls of any shape leave it fit for the next."""
    return torch.zeros(2**28, dtype=torch.uint8, device=CUDA)


@pytest.fixture(autouse=True)
def cuda_kernels():
    """Not what a GPU would get by itself."""
    ops.use("cuda", torch.device("cuda", torch.cuda.current_device()))
    yield
    ops.use("auto")


def on_gpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(CUDA) for t in tensors]


def lists_on_gpu(ctx, num_heads, max_kept=MAX_KEPT, with_mass=True):
    lists = list_buffers(ctx, num_heads, max_kept, with_mass)
    return {name: op_inputs.moved(t, CUDA) for name, t in lists.items()}


def on_cpu(lists) -> dict[str, torch.Tensor]:
    return {name: t.cpu() for name, t in lists.items() if t is not None}


@every_dtype
@every_shape
def test_store_and_seal_equal_the_cpu(shape, dtype):
    op_checks.check_store_and_seal(CUDA, shape, dtype, SEQ_LENS, heads_apart=False)


def check_decode(ctx, query, budgets, options, want, workspace):
    """Both steps in one op, which may be another kernel than the two, with its own
    lists: those are compared with the reference's, the result with its attention.
    """
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
    lists = lists_on_gpu(ctx, query.shape[1], with_mass=False)
    out = torch.full_like(query, torch.nan, device=CUDA)
    read = torch.zeros(1, dtype=torch.int64, device=CUDA)
    given = dict(out=out, tokens_read=read, workspace=workspace)
    ops.sparq_attend(*on_gpu(*args, budgets), **options, **lists, **given)
    got = on_cpu(lists)
    op_inputs.assert_same_lists(got, want, ctx, query, options, **AS_GOOD)
    expected, expected_read = torch.empty_like(query), torch.zeros(1, dtype=torch.int64)
    scales = dict(scale=options["scale"], soft_cap=options["soft_cap"])
    reference.attend(
        *args, **got, kept_mass=None, **scales, out=expected, tokens_read=expected_read
    )
    assert_close(out.cpu(), expected)
    assert read.item() == expected_read.item()


def check_select(ctx, num_heads, budgets, options, workspace=None, with_mass=True):
    """Selection alone, then both steps in one op."""
    query = random_query(ctx, num_heads, ctx.kv_cache.dtype)
    budgets = torch.tensor(budgets, dtype=torch.int32)
    given = (ctx, query, budgets, options, CUDA, MAX_KEPT, with_mass)
    got, want = op_inputs.select_both(*given, heads_apart=False, workspace=workspace)
    op_inputs.assert_same_lists(got, want, ctx, query, options, **AS_GOOD)
    if with_mass:
        assert (got["kept_mass"][got["counts"][:, 0] == -1] == 1).all()
    check_decode(ctx, query, budgets, options, want, workspace)
    return got


@pytest.mark.parametrize("with_mass", [True, False], ids=["mass", "no-mass"])
@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
@every_dtype
@every_shape
def test_select_keeps_what_the_reference_keeps(shape, dtype, soft_cap, with_mass):
    num_heads, num_kv_heads, head_size = shape
    ctx = filled(SEQ_LENS, num_kv_heads, head_size, dtype)
    budgets = [64, 64, 64, -1, 200, 300, 1000]
    options = dict(
        rank=3 * head_size // 8 if soft_cap else head_size // 4,
        local_window=16,
        sink_tokens=4,
        scale=head_size**-0.5,
        soft_cap=soft_cap,
    )
    got = check_select(ctx, num_heads, budgets, options, with_mass=with_mass)
    dense = (got["counts"] == -1).all(1).tolist()
    assert dense == [True, True, False, True, False, False, False]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("budget", [-1, 0, 1, 130, 131, 1999, 2000, 2001])
def test_select_at_the_edges_of_a_budget(budget, dtype, workspace):
    ctx = filled([2000, 2048, 2049], 2, 64, dtype)
    options = dict(rank=64, local_window=40, sink_tokens=4, scale=0.125, soft_cap=0.0)
    check_select(ctx, 4, [budget] * 3, options, workspace)


@pytest.mark.parametrize("group", range(1, 13))
def test_select_for_every_group(group, workspace):
    ctx = filled([1000, 255, 256, 257, 5000], 2, 128, BF16)
    options = dict(rank=32, local_window=40, sink_tokens=4, scale=0.1, soft_cap=0.0)
    check_select(ctx, 2 * group, [150, 150, 150, 180, 400], options, workspace)


@pytest.mark.parametrize("rank", [1, 16, 31, 48, 100, 128])
def test_select_for_every_rank(rank, workspace):
    ctx = filled([1000, 3333], 2, 128, BF16)
    options = dict(rank=rank, local_window=40, sink_tokens=4, scale=0.1, soft_cap=0.0)
    check_select(ctx, 8, [200, 300], options, workspace)


# Clusters shrink from 8 thread blocks to 2 as the batch grows.
@pytest.mark.parametrize("rows", [1, 12, 25, 36, 50, 60, 80, 100, 200, 400])
def test_select_for_every_batch(rows, workspace):
    lens = [(700, 130, 1111, 385, 384, 2049, 383)[i % 7] for i in range(rows)]
    ctx = filled(lens, 1, 64, BF16)
    budgets = [(-1, 129, 200)[i % 3] for i in range(rows)]
    options = dict(rank=16, local_window=16, sink_tokens=4, scale=0.2, soft_cap=0.0)
    check_select(ctx, 4, budgets, options, workspace)


# Alone a very long row gets a cluster of 16; among many its scores, and with 80,000
# tokens its keys, too, do not fit into the shared memory of two thread blocks.
@pytest.mark.parametrize(
    ("place", "rows", "length"),
    [(0, 1, 70000), (0, 31, 60000), (30, 31, 60000), (7, 200, 30000), (3, 70, 80000)],
)
def test_select_one_long_row_beside_short_ones(place, rows, length, workspace):
    lens = [1000 + i for i in range(rows - 1)]
    lens.insert(place, length)
    ctx = filled(lens, 1, 128, BF16)
    budgets = [512] * rows
    for i in range(0, rows, 2):
        budgets[i] = -1 if lens[i] < 2000 else 512
    options = dict(rank=32, local_window=64, sink_tokens=4, scale=0.1, soft_cap=0.0)
    check_select(ctx, 4, budgets, options, workspace)


# The same clusters, of one kernel and of the chain.
@pytest.mark.parametrize(
    ("rows", "length"), [(1, 2000), (9, 1300), (20, 900), (70, 600), (200, 400)]
)
@pytest.mark.parametrize("soft_cap", [0.0, 30.0], ids=["one kernel", "chain"])
def test_top_p_for_every_batch(rows, length, soft_cap, workspace):
    contexts = [(length - 37 * (i % 7), length - 40) for i in range(rows)]
    contexts[-1] = (length, -1) if rows > 1 else contexts[-1]
    args = ((4, 1, 64), BF16, contexts, 24, soft_cap, 0.8, AS_GOOD["tolerance"])
    top_p_checks.check_top_p(CUDA, *args, workspace=workspace)


# Flat heads have long lists, which thread blocks of other rows share.
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
@pytest.mark.parametrize(
    ("rows", "length"), [(1, 70000), (3, 30000), (70, 9000), (300, 6000)]
)
def test_top_p_of_long_contexts(rows, length, sharpness, workspace):
    contexts = [(length, length - 1)] + [(700, 699)] * (rows - 1)
    contexts[rows // 2] = (length // 2, length // 2 - 1)
    args = ((4, 1, 128), BF16, contexts, 32, 0.0, 0.95, AS_GOOD["tolerance"])
    top_p_checks.check_top_p(CUDA, *args, sharpness=sharpness, workspace=workspace)


def test_sharp_and_biased_keys(workspace):
    """Channels with large means and logits over a wide range."""
    ctx = paged_context([3000], 1, 128, BF16, generator())
    bias = torch.randn(128, generator=generator(5)) * 8
    ctx.keys[0][:] = (ctx.keys[0].float() * 4 + bias).bfloat16()
    options = dict(rank=32, local_window=64, sink_tokens=4, scale=0.09, soft_cap=0.0)
    check_select(op_inputs.store_and_seal(ctx), 4, [400], options, workspace)


@pytest.mark.parametrize(
    ("listed", "with_mass"),
    [(False, False), (True, False), (True, True)],
    ids=["whole", "lists", "mean-value"],
)
@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
@every_dtype
@every_shape
def test_attend_equals_the_reference(
    shape, dtype, soft_cap, listed, with_mass, workspace
):
    contexts = list(zip(SEQ_LENS, [-1, -1, 1, -1, 37, 300, 900]))
    given = (shape, dtype, contexts, soft_cap, listed, with_mass)
    op_checks.check_attend(CUDA, *given, heads_apart=False, workspace=workspace)


def check_whole(shape, dtype, lens, workspace):
    """Without lists; the workspace's counters are zero again after a call."""
    contexts = [(n, -1) for n in lens]
    given = (shape, dtype, contexts, 0.0, False, False)
    op_checks.check_attend(CUDA, *given, heads_apart=False, workspace=workspace)
    assert not workspace[:4096].any()


@pytest.mark.parametrize("group", [*range(1, 13), 16, 20])
def test_attend_for_every_group(group, workspace):
    for _ in range(3):
        lens = [1, 15, 16, 17, 3000, 5, 700]
        check_whole((2 * group, 2, 128), BF16, lens, workspace)


def test_attend_one_long_row_beside_short_ones(workspace):
    lens = [20000] + [1 + 37 * i for i in range(40)]
    check_whole((4, 1, 64), F16, lens, workspace)


@pytest.mark.parametrize("with_workspace", [False, True])
@pytest.mark.parametrize("with_mass", [False, True])
def test_both_steps_in_one_op_also_in_a_graph(with_mass, with_workspace, workspace):
    ctx = filled(SEQ_LENS, 3, 64, BF16)
    query = random_query(ctx, 9, BF16)
    budgets = torch.tensor([-1, 64, 64, 200, -1, 300, 500], dtype=torch.int32)
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    options = dict(rank=24, local_window=16, sink_tokens=4, scale=0.2, soft_cap=0.0)
    want = list_buffers(ctx, 9, MAX_KEPT)
    reference.sparq_select(*args, **op_inputs.sparq_options(**options), **want)
    args = on_gpu(*args)
    lists = lists_on_gpu(ctx, 9, with_mass=with_mass)
    out = torch.full_like(args[0], torch.nan)
    given = dict(out=out, workspace=workspace if with_workspace else None)

    def call():
        ops.sparq_attend(*args, **options, **lists, **given)

    call()
    eager, eager_indices = out.clone(), lists["indices"].clone()
    got = on_cpu(lists)
    op_inputs.assert_same_lists(got, want, ctx, query, options, **AS_GOOD)
    attended = torch.empty_like(out)
    ops.attend(*args[:4], **lists, scale=0.2, out=attended)
    assert_close(eager, attended)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):
            call()
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, eager)
        assert torch.equal(lists["indices"], eager_indices)


def test_workspace_bytes_are_enough_and_checked():
    ctx = filled([3000, 400], 2, 64, BF16)
    query = random_query(ctx, 8, BF16)
    budgets = torch.tensor([200, 200], dtype=torch.int32)
    args = on_gpu(query, ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    options = dict(rank=16, local_window=16, sink_tokens=4, scale=0.2, soft_cap=0.0)
    shape = (2, 4, ctx.block_table.shape[1], 64, args[0].device)
    rows = (1, 2, 100, 128, 129, 300, 4096, 5000)
    for adapts in (False, True):  # and never less for more
        sizes = [ops.workspace_bytes(n, 32, 1, 32, 128, CUDA, adapts) for n in rows]
        assert sizes == sorted(sizes)
    size = ops.workspace_bytes(2, *shape)
    assert ops.workspace_bytes(1, *shape) <= size
    exact = torch.zeros(size, dtype=torch.uint8, device=CUDA)
    given = options | lists_on_gpu(ctx, 8, 320) | dict(out=torch.empty_like(args[0]))
    ops.sparq_attend(*args, **given, workspace=exact)
    assert not exact[:4096].any()
    with pytest.raises(RuntimeError, match="workspace has"):
        ops.sparq_attend(*args, **given, workspace=exact[:-1])


def test_a_context_beyond_shared_memory_and_a_nan_query():
    """Long contexts keep their scores in global memory when there are many rows."""
    ctx = filled([40000] + [2000] * 17, 1, 64, BF16)
    query = random_query(ctx, 12, BF16)
    query[3] = torch.nan
    budgets = torch.full((18,), 256, dtype=torch.int32)
    options = dict(rank=16, local_window=32, sink_tokens=4, scale=0.125, soft_cap=0.0)
    given = (ctx, query, budgets, options, CUDA, MAX_KEPT)
    got, want = op_inputs.select_both(*given, heads_apart=False)
    kept = got["indices"][3, 0, : int(got["counts"][3, 0])]
    assert len(kept) > 0 and (kept >= 0).all() and (kept < 2000).all()
    for lists in (got, want):
        lists["counts"][3] = -1  # what a NaN query keeps is not compared
    op_inputs.assert_same_lists(got, want, ctx, query, options, **AS_GOOD)
    query[3] = 1
    want = list_buffers(ctx, 12, MAX_KEPT)
    args = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens, budgets)
    reference.sparq_select(*args, **op_inputs.sparq_options(**options), **want)
    check_decode(ctx, query, budgets, options, want, None)

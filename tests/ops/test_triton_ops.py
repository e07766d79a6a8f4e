# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The ops in Triton against the fp32 reference, and the compiled CUDA ops likewise.

On a GPU (``-m gpu``) with ragged contexts; without one under Triton's interpreter, with
short ones, in a process of its own: Triton decides when it is imported. The interpreter
is no compiler, so that kernels are also compiled, for GPUs that are not there.
"""

import os
import subprocess
import sys

import pytest
import torch

from vllm_sparse.ops import dispatch
from vllm_sparse.testing import op_checks, op_inputs, top_p_checks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_GPU = [
    pytest.param(name, marks=[pytest.mark.gpu, needs_gpu])
    for name in ("triton", "cuda")
]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# (num_heads, num_kv_heads, head_size), dtype: GQA, MHA, MQA, odd sizes, wide groups.
INPUTS = [
    ((9, 3, 64), BF16),
    ((4, 4, 80), F32),
    ((6, 1, 96), F16),
    ((8, 2, 128), BF16),
    ((4, 1, 256), BF16),
    ((16, 2, 64), F32),
    ((34, 2, 64), F16),
    ((12, 1, 128), F32),
]
# (length, tokens to keep or -1): shorter than a block, at its ends, several spans.
CONTEXTS = [(1, 64), (127, 64), (128, 64), (129, -1), (700, 200), (2175, 300)]
LONG = (9000, 1000)
if INTERPRETED:
    INPUTS = [((4, 2, 64), BF16), ((3, 3, 80), F16), ((17, 1, 96), F32)]
    CONTEXTS = [(1, 64), (128, 64), (300, -1), (700, 150)]
    LONG = (4500, 150)

TOLERANCE = op_inputs.SCORE_TOLERANCE


@pytest.fixture(params=["triton"] if INTERPRETED else ON_GPU)
def kernels(request):
    """The kernels under test, chosen; "auto" again afterwards."""
    dispatch.use(request.param, device())
    yield request.param
    dispatch.use("auto")


def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


inputs = pytest.mark.parametrize(("shape", "dtype"), INPUTS, ids=str)


@inputs
def test_store_and_seal(kernels, shape, dtype):
    lens = [1, 128, 300] if INTERPRETED else [length for length, _ in CONTEXTS]
    op_checks.check_store_and_seal(device(), shape, dtype, lens)


def test_store_reads_strided_tokens_and_skips_slots_out_of_range(kernels):
    op_checks.check_strided_store(device())


@inputs
@pytest.mark.parametrize("drafts", [0, 3])
def test_rows_that_decode_store_and_seal(kernels, shape, dtype, drafts):
    op_checks.check_rows(device(), shape, dtype, drafts)


def test_blocks_are_sealed_in_order(kernels):
    op_checks.check_seal_order(device())


@inputs
def test_rows_that_filled_a_block_are_sealed(kernels, shape, dtype):
    op_checks.check_seal_rows(device(), shape, dtype)


def test_gather_returns_the_stored_context(kernels):
    op_checks.check_gather(device())


@pytest.mark.parametrize(("with_mass", "soft_cap"), [(True, 20.0), (False, 0.0)])
@inputs
def test_select_keeps_what_the_reference_keeps(
    kernels, shape, dtype, with_mass, soft_cap
):
    head_size = shape[2]
    op_checks.check_select(
        device(),
        shape,
        dtype,
        CONTEXTS,
        3 * head_size // 8 if soft_cap else head_size // 4 + 1,
        soft_cap,
        with_mass,
        TOLERANCE[kernels],
    )


def test_select_of_a_long_context(kernels):
    shape, dtype = INPUTS[0]
    op_checks.check_select(
        device(), shape, dtype, [LONG], 24, 0.0, True, TOLERANCE[kernels]
    )


@pytest.mark.parametrize(
    ("top_p", "soft_cap"),
    [(0.95, 20.0), (0.5, 0.0), (0.95, 0.0)][: 1 if INTERPRETED else 3],
)
@pytest.mark.parametrize(("shape", "dtype"), INPUTS[: 1 if INTERPRETED else None])
def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass(
    kernels, shape, dtype, top_p, soft_cap
):
    contexts = [(n, -1 if most < 0 else n - 1) for n, most in CONTEXTS]
    args = (shape, dtype, contexts, shape[2] // 4, soft_cap, top_p, TOLERANCE[kernels])
    top_p_checks.check_top_p(device(), *args)


@pytest.mark.parametrize("sharpness", [0.0, 8.0, 1.0][: 2 if INTERPRETED else 3])
def test_top_p_of_flat_and_sharp_heads_has_floors_and_ceilings(kernels, sharpness):
    shape, dtype = INPUTS[0]
    args = (shape, dtype, [(LONG[0], LONG[0] - 1), (LONG[0] - 300, LONG[0] // 6)])
    top_p_checks.check_top_p(
        device(), *args, 24, 0.0, 0.95, TOLERANCE[kernels], 200, sharpness
    )


def test_kept_tokens_are_counted(kernels):
    op_checks.check_kept_histogram(device(), CONTEXTS[-2:])


def test_select_at_the_edges_of_a_budget(kernels):
    if INTERPRETED:
        budgets, num_blocks = [0, 130, 511, 512], 4
    else:
        budgets, num_blocks = [-1, 0, 1, 130, 131, 1983, 1984, 1985], 15
    op_checks.check_budget_edges(device(), budgets, num_blocks, TOLERANCE[kernels])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_ties_go_to_lower_positions(kernels, dtype):
    # No unsealed tail, one longer than the local window, a shorter one.
    op_checks.check_ties(device(), [1280, 1300, 4360], dtype)


@pytest.mark.parametrize(
    ("listed", "with_mass", "soft_cap"),
    [(False, False, 0.0), (True, False, 20.0), (True, True, 0.0)],
    ids=["whole", "lists", "mean-value"],
)
@inputs
def test_attend_equals_the_reference(
    kernels, shape, dtype, listed, with_mass, soft_cap
):
    contexts = [(n, min(n // 2, count)) for n, count in CONTEXTS]
    op_checks.check_attend(
        device(), shape, dtype, contexts, soft_cap, listed, with_mass
    )


@pytest.mark.parametrize("with_mass", [False, True])
def test_both_steps_in_one_op(kernels, with_mass):
    op_checks.check_both_steps(device(), CONTEXTS[-2:], with_mass)


def test_results_do_not_depend_on_the_batch(kernels):
    if kernels == "cuda":
        pytest.skip("thread blocks of a row depend on the batch (docs/performance.md)")
    op_checks.check_batch_invariance(device(), CONTEXTS[-2:])


def test_values_out_of_range_harm_nothing(kernels):
    op_checks.check_values_out_of_range(device(), 520 if INTERPRETED else 3000)


def run_python(*arguments: str, **environment: str) -> None:
    """In a process of its own."""
    command = [sys.executable, "-m", *arguments]
    environment = dict(os.environ, **environment)
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_everything_above_under_the_interpreter():
    options = ("-q", "--tb=short", "-x", "-p", "no:cacheprovider")
    run_python("pytest", *options, __file__, TRITON_INTERPRET="1")


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
def test_kernels_compile_without_a_gpu():
    run_python("vllm_sparse.testing.compile_triton", "90", "--quick")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
def test_kernels_compile_for_every_architecture():
    run_python("vllm_sparse.testing.compile_triton", "80", "89", "90", "100")

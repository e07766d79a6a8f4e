# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The kernels of every instruction set, in processes that force one.

The other tests run on the best set that the processor has; about half of those of
stores, selection and attention run here on each of the others.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_sparse import ops

ROOT = Path(__file__).parents[2]
TESTS = [
    Path(__file__).with_name(f"test_{n}.py") for n in ("store", "select", "attend")
]
# The shapes in bf16, the odd head size 80, and what has no dtype.
SUBSET = "bfloat16 or 80 or not torch"
SUBSET_SIZE = 150
SETS = ["avx512", "avx2", "portable"]  # best first


def run(isa: str, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"VLLM_SPARSE_CPU_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )


def ask(isa: str) -> subprocess.CompletedProcess:
    return run(isa, "-c", "from vllm_sparse import ops; print('isa', ops.cpu_isa())")


@pytest.mark.parametrize("isa", SETS)
def test_kernels_of_every_instruction_set(isa):
    if "VLLM_SPARSE_CPU_ISA" in os.environ:
        pytest.skip("an instruction set is forced already")
    if isa == ops.cpu_isa():
        pytest.skip("the other tests run on this one")
    chosen = ask(isa)
    if "is not available on this CPU" in chosen.stderr:
        assert SETS.index(isa) < SETS.index(ops.cpu_isa()), chosen.stderr
        pytest.skip(f"this processor has no {isa}")
    assert chosen.stdout.split() == ["isa", isa], chosen.stderr
    tests = run(
        isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", SUBSET
    )
    assert tests.returncode == 0, tests.stdout[-6000:]
    assert int(tests.stdout.splitlines()[-1].split()[0]) >= SUBSET_SIZE, tests.stdout


@pytest.mark.parametrize("bogus", ["sse9", "AVX2", ""])
def test_unknown_instruction_set_is_an_error_with_the_choices(bogus):
    result = ask(bogus)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert f"VLLM_SPARSE_CPU_ISA={bogus} is not available on this CPU" in last
    assert "choose one of: " in last
    assert last.endswith("portable")

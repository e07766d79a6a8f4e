# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Triton's ops without a GPU: under its interpreter, in a process of its own, and
compiled for GPUs that are not there, as the interpreter is no compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .inputs import INTERPRETED

HERE = Path(__file__).parent
TESTS = [HERE / f"test_{name}.py" for name in ("store", "select", "attend", "states")]

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the process that these start")


def run_python(*arguments, **environment: str) -> None:
    """In a process of its own."""
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = dict(os.environ, **environment)
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.parametrize("tests", TESTS, ids=lambda path: path.stem)
def test_under_the_interpreter(tests):
    options = ("-q", "--tb=short", "-x", "-p", "no:cacheprovider")
    run_python("pytest", *options, tests, TRITON_INTERPRET="1")


def test_kernels_compile_without_a_gpu():
    run_python("scripts.compile_triton", "90", "--quick")


@pytest.mark.slow
def test_kernels_compile_for_every_architecture():
    run_python("scripts.compile_triton", "80", "89", "90", "100")

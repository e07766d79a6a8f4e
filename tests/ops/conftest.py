# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""All kernels take the same tests: the CPU's here, Triton's here under its interpreter
(test_triton_ops.py starts it), both GPU kinds with ``-m gpu``."""

import pytest
import torch

from .inputs import GPU, INTERPRETED, Kernels

ALL = ["cpu", *(pytest.param(name, marks=GPU) for name in ("triton", "cuda"))]


@pytest.fixture(params=["triton"] if INTERPRETED else ALL)
def kernels(request) -> Kernels:
    return Kernels(request.param)


@pytest.fixture(scope="session")
def workspace() -> torch.Tensor:
    """One for all tests: CUDA calls of any shape leave it fit for the next."""
    return torch.zeros(2**28, dtype=torch.uint8, device="cuda")

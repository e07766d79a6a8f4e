# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How csrc/cuda is compiled, for setup.py and the compile gate. Needs no torch."""

import os
import shutil
from pathlib import Path

# Compute capabilities that the sources must compile for, and those where the result
# was tested and timed: TUNED of vllm_sparse/ops/dispatch.py.
CUDA_ARCHS = ("80", "89", "90a", "100")
TUNED_ARCHS = "90a"
CSRC = Path(__file__).resolve().parent.parent / "csrc"
NVCC_FLAGS = (
    "-O3",
    "-std=c++20",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    f"-I{CSRC}",
    f"-I{CSRC / 'cuda'}",
)


def gencode(arch: str) -> str:
    """The flag that adds machine code for one architecture."""
    return f"-gencode=arch=compute_{arch},code=sm_{arch}"


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of the PATH or of the usual place."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    found = [f"{home}/bin/nvcc" for home in homes if home]
    for path in (found[0], shutil.which("nvcc"), found[-1]):
        if path and os.access(path, os.X_OK):
            return path
    return None

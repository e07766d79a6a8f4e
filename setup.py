# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Builds the C++ and CUDA ops against torch's stable ABI; see also pyproject.toml.

``VLLM_SPARSE_CUDA`` = auto (default: build the CUDA ops where torch is a CUDA build and
nvcc is found), on or off;
``VLLM_SPARSE_CUDA_ARCHS`` = compute capabilities, for example "80;89;90a;100"; default:
those on which the CUDA ops are used without being asked for (ops/dispatch.py).
"""

import os
import subprocess
import sys
from glob import glob
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import (
    BuildExtension,
    CppExtension,
    include_paths,
    library_paths,
)

# Build front ends do not put the project's folder on the path.
sys.path.insert(0, str(Path(__file__).parent))
from scripts.nvcc import CSRC, NVCC_FLAGS, TUNED_ARCHS, find_nvcc, gencode  # noqa: E402

# Lowest torch whose stable ABI is used; one build serves all later ones.
TORCH_TARGET = "0x020b000000000000"
# Lowest CPython of the limited API (3.11).
PY_LIMITED_API = "0x030b0000"
# Without this the linker drops libtorch, which the stable shims live in.
LINK_TORCH = ["--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
CUDA_NAME = "vllm_sparse._C_cuda"
CUDA = CSRC / "cuda"


def wants_cuda() -> bool:
    """Whether to build the CUDA ops; never depends on a GPU being there."""
    switch = os.environ.get("VLLM_SPARSE_CUDA", "auto")
    if switch not in ("auto", "on", "off"):
        raise SystemExit(f"VLLM_SPARSE_CUDA must be auto, on or off, not {switch!r}")
    if switch == "on" and find_nvcc() is None:
        raise SystemExit(
            "VLLM_SPARSE_CUDA=on, but there is no nvcc: set CUDA_HOME or put it on PATH"
        )
    return switch == "on" or (
        switch == "auto" and torch.version.cuda is not None and find_nvcc() is not None
    )


class Build(BuildExtension):
    """Calls nvcc itself for the CUDA library: torch may be a build without CUDA."""

    def build_extension(self, ext) -> None:
        if ext.name == CUDA_NAME:
            self.build_cuda(ext)
        else:
            super().build_extension(ext)

    def build_cuda(self, ext) -> None:
        archs = os.environ.get("VLLM_SPARSE_CUDA_ARCHS", TUNED_ARCHS).split(";")
        flags = [
            *NVCC_FLAGS,
            "--threads=0",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            *map(gencode, archs),
            *(f"-I{path}" for path in include_paths()),
        ]
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        objects = []
        for source in sorted([*CUDA.rglob("*.cu"), *CUDA.rglob("*.cpp")]):
            name = "-".join(source.relative_to(CUDA).parts) + ".o"
            objects.append(str(folder / name))
            command = [find_nvcc(), *flags, "-c", str(source), "-o", objects[-1]]
            subprocess.run(command, check=True)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{path}" for path in library_paths()]
        link = ["-Xlinker=" + LINK_TORCH[0], *LINK_TORCH[1:]]
        shared = ["-shared", "-cudart=static", *libraries, *link]
        command = [find_nvcc(), *shared, *objects, "-o", str(output)]
        subprocess.run(command, check=True)


extensions = [
    CppExtension(
        "vllm_sparse._C",
        ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/cpu/*.inc"),
        extra_compile_args={
            "cxx": [
                "-O2",
                "-std=c++20",
                "-fvisibility=hidden",
                f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
                f"-DPy_LIMITED_API={PY_LIMITED_API}",
            ]
        },
        extra_link_args=[f"-Wl,{LINK_TORCH[0]}", *LINK_TORCH[1:]],
        py_limited_api=True,
    )
]
if wants_cuda():
    # No sources here: torch's BuildExtension refuses .cu files beside a CPU torch.
    extensions.append(Extension(CUDA_NAME, [], py_limited_api=True))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

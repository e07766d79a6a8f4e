# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Builds the C++ ops against torch's stable ABI; the rest is in pyproject.toml."""

from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# Lowest torch whose stable ABI is used; one build serves all later ones.
TORCH_TARGET = "0x020b000000000000"
# Lowest CPython of the limited API (3.11).
PY_LIMITED_API = "0x030b0000"

setup(
    ext_modules=[
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
            # Without this the linker drops libtorch, which the stable shims live in.
            extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which kernels serve a device: the compiled ones or Triton's.

| device                                   | ``auto`` | explicit choices  |
|------------------------------------------|----------|-------------------|
| CPU                                      | cpu      | cpu, triton (1)   |
| GPU in TUNED, with the CUDA library      | cuda     | cuda, triton      |
| any other GPU, or without the library    | triton   | cuda (2), triton  |

(1) under TRITON_INTERPRET=1, for tests. (2) where the library holds code for the GPU.
An explicit choice that cannot be honoured is an error; only ``auto`` chooses another.
"""

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

from ..cache.layout import BLOCK_SIZE, BlockLayout
from ..option_rules import KERNEL_NAMES
from .library import has_cuda_library, load
from .options import SparqOptions

# Below "vllm", the only name that vLLM attaches its handler to.
logger = logging.getLogger(f"vllm.{__name__}")

# Compute capabilities on which the CUDA kernels were tested and measured
# (docs/performance.md). The library also holds code for others, which is unproven.
TUNED = frozenset({(9, 0)})


class KernelsError(RuntimeError):
    """The chosen kernels cannot serve a device; the message names what to change."""


@cache
def resolve(kernels: str, device: torch.device) -> str:
    """Kernels for a device: "cpu", "cuda" or "triton".

    Raises:
        KernelsError: when ``kernels`` is unknown or cannot serve ``device``.
    """
    if kernels not in KERNEL_NAMES:
        raise KernelsError(
            f"kernels must be one of {', '.join(KERNEL_NAMES)}, got {kernels!r}"
        )
    if device.type not in ("cpu", "cuda"):
        raise KernelsError(f"sparse attention runs on CPUs and GPUs, not on {device}")
    on_gpu = device.type == "cuda"
    if kernels == "auto":
        kernels = _automatic(device) if on_gpu else "cpu"
    if kernels == "cpu" and on_gpu:
        raise KernelsError(_message("cpu", f"cannot serve {device}", "auto"))
    if kernels == "cuda":
        _require_cuda_library(device)
    if kernels == "triton":
        _require_triton(device)
    return kernels


def _message(kernels: str, problem: str, instead: str) -> str:
    return f"sparse.kernels = {kernels!r} {problem}; set sparse.kernels to {instead!r}"


def _automatic(device: torch.device) -> str:
    """The kernels of a GPU, and one log line where they are not the fastest."""
    capability = torch.cuda.get_device_capability(device)
    if not has_cuda_library():
        reason = "vllm_sparse's CUDA library was not built (VLLM_SPARSE_CUDA=on)"
    elif capability not in TUNED:
        name = ".".join(map(str, capability))
        reason = f"the CUDA kernels are unproven on compute capability {name}"
    else:
        return "cuda"
    logger.warning("Sparse attention uses its Triton kernels on %s: %s", device, reason)
    return "triton"


def _require_cuda_library(device: torch.device) -> None:
    if device.type != "cuda":
        raise KernelsError(_message("cuda", f"cannot serve {device}", "auto"))
    if not has_cuda_library():
        raise KernelsError(
            "sparse.kernels = 'cuda' needs the CUDA library, which was not built; "
            "build it where nvcc is found with "
            "`VLLM_SPARSE_CUDA=on pip install --no-build-isolation -e .`, or set "
            "sparse.kernels to 'triton'"
        )
    if torch.cuda.get_device_capability(device) not in TUNED:
        _probe(device)


def _probe(device: torch.device) -> None:
    """Run the ops on two blocks of zeros: does the library serve the GPU?"""
    try:
        try_ops(load(), device)
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(device)
        raise KernelsError(
            f"sparse.kernels = 'cuda': the CUDA library does not run on {device} "
            f"({error}); build it with VLLM_SPARSE_CUDA_ARCHS={major}{minor}, or set "
            "sparse.kernels to 'triton'"
        ) from error


def try_ops(kernels, device: torch.device) -> torch.Tensor:
    """One decode row over a context of 300 zeros, 200 of them kept: [1, 4, 64]."""
    content = BlockLayout(64, 2).content_bytes // 2
    make = dict(dtype=torch.float16, device=device)
    kv_cache = torch.zeros(4, 1, BLOCK_SIZE, content, **make)
    query, out = torch.zeros(1, 4, 64, **make), torch.empty(1, 4, 64, **make)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    context = (kv_cache, ints(1, 2, 3)[None], ints(300), ints(200))
    lists = (torch.zeros(1, 1, 200, dtype=torch.int32, device=device), ints(0)[None])
    options = SparqOptions(24, 32, 4, 0.125)
    given = (options.sizes, options.numbers, *lists, None, out)
    kernels.sparq_attend(query, *context, *given)
    return out.cpu()  # waits: a launch alone may succeed


def _require_triton(device: torch.device) -> None:
    if find_spec("triton") is None:
        raise KernelsError(
            "sparse.kernels = 'triton' needs Triton, which is not installed: "
            "`pip install triton`"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelsError(
            _message(
                "triton", "serves CPU tensors only under TRITON_INTERPRET=1", "auto"
            )
        )


@cache
def functions(kernels: str):
    """The functions of resolved kernels, with the arguments of the compiled ops."""
    if kernels != "triton":
        return load()
    from ..kernels import triton

    return triton

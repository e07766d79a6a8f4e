# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The compiled ops: the only module that touches ``torch.ops.vllm_sparse``."""

from functools import cache
from importlib.util import find_spec

import torch


def _load(name: str) -> bool:
    """Load one compiled library; False when it was not built."""
    spec = find_spec(f"vllm_sparse.{name}")
    if spec is None or spec.origin is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise ImportError(
            f"vllm_sparse's compiled ops do not load under torch {torch.__version__} "
            f"(2.11 or newer is needed): {error}"
        ) from error
    return True


@cache
def load():
    """Load the compiled libraries and return their op namespace.

    Raises:
        ImportError: when the library is missing or does not fit this torch.
    """
    if not _load("_C"):
        raise ImportError(
            "vllm_sparse's compiled ops are missing; build them with "
            "`pip install --no-build-isolation -e .` in the project's folder"
        )
    if torch.cuda.is_available():
        _load("_C_cuda")
    return torch.ops.vllm_sparse


def has_cuda_library() -> bool:
    """Whether the ops for CUDA tensors were built."""
    return find_spec("vllm_sparse._C_cuda") is not None

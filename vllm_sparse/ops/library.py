# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The compiled ops: the only module that touches ``torch.ops.vllm_sparse``."""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def load():
    """Load the compiled library and return its op namespace.

    Raises:
        ImportError: when the library is missing or does not fit this torch.
    """
    spec = find_spec("vllm_sparse._C")
    if spec is None or spec.origin is None:
        raise ImportError(
            "vllm_sparse's compiled ops are missing; build them with "
            "`pip install --no-build-isolation -e .` in the project's folder"
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise ImportError(
            f"vllm_sparse's compiled ops do not load under torch {torch.__version__} "
            f"(2.11 or newer is needed): {error}"
        ) from error
    return torch.ops.vllm_sparse

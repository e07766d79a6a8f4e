# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What every op means: plain fp32 PyTorch, the functions of :mod:`vllm_sparse.ops` with
the same arguments.

Kernels are tested against these functions. They loop over rows and heads and are meant
to be read, not to be fast.
"""

from .attend import attend
from .codes import dequantise_k, prefix_mean, quantise, read_block, unpack_codes
from .context import context, context_rows, gather_kv, kv_rows
from .sparq import (
    forced_ranges,
    sparq_attend,
    sparq_probabilities,
    top_k_positions,
    top_p_count,
)
from .store import filled_blocks, store

__all__ = [
    "attend",
    "context",
    "context_rows",
    "dequantise_k",
    "filled_blocks",
    "forced_ranges",
    "gather_kv",
    "kv_rows",
    "prefix_mean",
    "quantise",
    "read_block",
    "sparq_attend",
    "sparq_probabilities",
    "store",
    "top_k_positions",
    "top_p_count",
    "unpack_codes",
]

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The ops in Triton, for GPUs that the CUDA library does not serve.

Same meaning and argument order as :mod:`vllm_sparse.ops.reference`. Grids depend on
shapes alone and nothing waits for the device, so every op can be captured in a CUDA
graph. Under TRITON_INTERPRET=1 they run on CPU tensors, for tests.
"""

from .attend import attend
from .gather_kv import gather_kv
from .seal_blocks import seal_blocks
from .seal_rows import seal_rows, store_rows
from .sparq import sparq_attend, sparq_select
from .store_kv import store_kv

__all__ = [
    "attend",
    "gather_kv",
    "seal_blocks",
    "seal_rows",
    "sparq_attend",
    "sparq_select",
    "store_kv",
    "store_rows",
]

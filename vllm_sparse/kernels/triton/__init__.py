# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The ops in Triton, for GPUs that the CUDA library does not serve.

The compiled ops' arguments, and the meaning of :mod:`vllm_sparse.ops.reference`. Grids
depend on shapes alone and nothing waits for the device, so every op can be captured in
a CUDA graph. Under TRITON_INTERPRET=1 they run on CPU tensors, for tests.
"""

from .attend import attend
from .gather_kv import gather_kv
from .sparq import sparq_attend
from .store import store

__all__ = ["attend", "gather_kv", "sparq_attend", "store"]

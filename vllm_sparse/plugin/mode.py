# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How our blocks are told from those of other layers in the same cache.

vLLM gives a block that one kind of layer has left to another kind. What we kept there
can read as NaN, and a masked NaN is still NaN. vLLM clears blocks before they are used
again where its caches differ in ``(dtype, kv_quant_mode)``
(``KVCacheConfig.needs_kv_cache_zeroing``): so ours have a mode of their own. A model
all of whose layers are ours has one mode, and nothing is cleared.
"""

from enum import IntEnum


class BlockMode(IntEnum):
    """Stands where vLLM has a ``KVQuantMode``; none of vLLM's values."""

    SPARSE = 64

    # Questions that vLLM asks a mode.
    is_per_token_head = property(lambda self: False)
    is_nvfp4 = property(lambda self: False)
    is_turboquant = property(lambda self: False)
    is_ultraquant = property(lambda self: False)

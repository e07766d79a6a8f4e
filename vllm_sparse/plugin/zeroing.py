# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Clearing new KV blocks on the CPU, where vLLM 0.32 and 0.33 clear others' instead.

vLLM's ``CPUModelRunner._zero_block_ids`` takes the scheduler's block numbers for
indices of a layer's cache. Where a block is larger than the backend's kernel block
(ours is 128; hybrid models have 256 and more), the cache is viewed in kernel blocks,
and so the numbers hit blocks of other requests: wrong tokens, silently.
``KVBlockZeroer``, which clears blocks on GPUs, multiplies by the ratio.

Upstream: ``CPUModelRunner._zero_block_ids(block_ids)``, which reads ``kv_cache_config``
and ``compilation_config.static_forward_context``. To go when vLLM's clears by ratio.
"""

from collections.abc import Callable, Iterable

import torch

# The method that was replaced: a test asks whether it is still wrong.
vllms: Callable | None = None


def install() -> None:
    """Let CPU workers of this process clear whole blocks. Idempotent.

    Engines whose blocks are not split are cleared as before.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    global vllms
    if CPUModelRunner._zero_block_ids is not _zero_block_ids:
        vllms = CPUModelRunner._zero_block_ids
        CPUModelRunner._zero_block_ids = _zero_block_ids


def _zero_block_ids(runner, block_ids: list[int]) -> None:
    ids = torch.tensor(block_ids)
    for cache in _whole_pages(runner):
        kernel_blocks = cache.shape[0] // runner.kv_cache_config.num_blocks
        cache.unflatten(0, (-1, kernel_blocks)).index_fill_(0, ids, 0)


def _whole_pages(runner) -> Iterable[torch.Tensor]:
    """The caches of attention layers; of those that share memory, the widest."""
    layers = runner.compilation_config.static_forward_context
    widest: dict[int, torch.Tensor] = {}
    for group in runner.kv_cache_config.kv_cache_groups:
        for name in group.layer_names:
            cache = getattr(layers.get(name), "kv_cache", None)
            if not isinstance(cache, torch.Tensor):  # a state: vLLM resets it itself
                continue
            known = widest.get(cache.data_ptr())
            if known is None or known.nbytes < cache.nbytes:
                widest[cache.data_ptr()] = cache
    return widest.values()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What tests ask of engines (in this process) that offload their blocks."""

import torch
from vllm import LLM

from .engines import add, scheduled, step_until_done
from .lossless import runner


def counts(llm: LLM) -> dict[str, int]:
    """Tokens found in host memory, and bytes moved, as vLLM counts them."""
    found = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    names = "external_prefix_cache_hits kv_offload_load_bytes kv_offload_store_bytes"
    # Absent before the first.
    return {name: found.get(f"vllm:{name}", 0) for name in names.split()}


def page_bytes(llm: LLM) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    (group,) = scheduler.kv_cache_config.kv_cache_groups
    return group.kv_cache_spec.page_size_bytes


def pages(llm: LLM, prompt: list[int], params) -> tuple[torch.Tensor, list[int]]:
    """Bytes of the prompt's full blocks while a request has them, and its tokens.

    Returns:
        [layers, full blocks, page_size_bytes] uint8, and the answer.
    """
    add(llm, "pages", prompt, params)
    found = []

    def look() -> None:
        request = scheduled(llm).get("pages")
        if request is None or request.num_computed_tokens < len(prompt):
            return
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        (blocks,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        blocks = blocks[: (len(prompt) - 1) // 128]
        caches = runner(llm).kv_caches
        rows = [c[blocks].contiguous().view(torch.uint8).flatten(1) for c in caches]
        found.append(torch.stack(rows))

    (answer,) = step_until_done(llm, look).values()
    assert torch.equal(found[0], found[-1])
    return found[0], answer

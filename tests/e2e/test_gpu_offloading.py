# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Blocks that leave a GPU for host memory by vLLM's own copies, and come back."""

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from .engines import assert_same_but_for_ties  # noqa: E402
from .offloading import counts, page_bytes, pages  # noqa: E402
from .test_gpu_engine import (  # noqa: E402
    NUM_LAYERS,
    SPARSE,
    generate,
    greedy,
    ours,
)
from .test_gpu_lossless import LOSSLESS  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BLOCK, NUM_BLOCKS = 128, 40
LENGTHS = [1024, 1025, 1536, 1300, 1151, 768, 1026, 1700, 1280, 1100]


@pytest.mark.parametrize(
    "sparse",
    [SPARSE, SPARSE | {"kv_format": "k8v4"}, LOSSLESS],
    ids=["auto", "k8v4", "lossless"],
)
def test_twice_the_cache_comes_back_from_host_memory(sparse):
    """With FULL graphs: pages bit for bit, texts but for ties, all hits counted."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 4000, (n,), generator=generator) for n in LENGTHS]
    prompts = [prompt.tolist() for prompt in prompts]
    blocks = sum(n // BLOCK for n in LENGTHS)
    assert blocks >= 2 * NUM_BLOCKS
    options = dict(
        additional_config={"sparse": sparse},
        num_gpu_blocks_override=NUM_BLOCKS,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        max_num_seqs=2,
        disable_log_stats=False,
    )
    with ours(**options) as llm:
        want = generate(llm, prompts, greedy())
    with ours(kv_offloading_size=1, **options) as llm:
        size = NUM_LAYERS * page_bytes(llm)
        before, _ = pages(llm, prompts[1], greedy())
        assert before.shape == (NUM_LAYERS, 8, page_bytes(llm))
        assert_same_but_for_ties(generate(llm, prompts, greedy()), want, gap=0.4)
        first = counts(llm)
        assert first["external_prefix_cache_hits"] == 0
        assert first["kv_offload_store_bytes"] == blocks * size
        second = generate(llm, prompts, greedy())
        assert_same_but_for_ties(second, want, gap=0.4)
        cached = [output.num_cached_tokens for output in second]
        assert cached == [(n - 1) // BLOCK * BLOCK for n in LENGTHS]
        later = counts(llm)
        hits = later["external_prefix_cache_hits"]
        assert hits >= sum(cached) - NUM_BLOCKS * BLOCK
        assert later["kv_offload_load_bytes"] == hits // BLOCK * size
        after, _ = pages(llm, prompts[1], greedy())
        assert torch.equal(before, after)

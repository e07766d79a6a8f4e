# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sinks and a window on a GPU, blocks given back: V2 runner, FULL graphs, asynchronous
scheduling. 16 bits round otherwise in other company: texts may part at near ties."""

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from vllm_sparse.methods.streaming import Streaming  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    add,
    assert_same_but_for_ties,
    few_free_blocks,
    generate,
    greedy,
    stats,
    step_until_done,
)
from .test_streaming import ANSWERS, PREFILLS, PROMPTS, pool, streaming  # noqa: E402
from .tiny import save_llama  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GRAPHS = dict(
    enforce_eager=False,
    compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
)
PARAMS = [greedy(n, logprobs=4, detokenize=False) for n in ANSWERS]
# Random weights have many near ties.
GAP = 0.3


@pytest.fixture(autouse=True)
def served(monkeypatch):
    # Until this file has passed on a GPU, engines there are refused.
    monkeypatch.setattr(Streaming, "devices", ("cpu", "cuda"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("prefill", PREFILLS)
def test_answers_and_memory(folder, prefill):
    """A window as long as contexts: FLASH_ATTN's texts. A short one: the same in
    company, from the cache and in eager steps; held blocks do not grow."""
    options = dict(dtype="bfloat16", async_scheduling=True, **GRAPHS)
    plain = dict(attention_backend="FLASH_ATTN", additional_config={})
    with streaming(folder, prefill, **options | plain) as llm:
        dense = generate(llm, PROMPTS, PARAMS)
    wide = {"sparse": {"local_window": 2048, "prefill": prefill}}
    with streaming(folder, prefill, **options, additional_config=wide) as llm:
        for _ in range(2):
            got = generate(llm, PROMPTS, PARAMS)
            assert_same_but_for_ties(got, dense, GAP, most=7)
    with streaming(
        folder, prefill, **options | {"enforce_eager": True, "compilation_config": {}}
    ) as llm:
        eager = generate(llm, PROMPTS, PARAMS)
        assert stats(llm)["sparse_rows"] > 0
    with streaming(folder, prefill, **options) as llm:
        for cache in (COLD, {}, {}):
            params = [greedy(n, logprobs=4, detokenize=False, **cache) for n in ANSWERS]
            got = generate(llm, PROMPTS, params)
            assert_same_but_for_ties(got, eager, GAP, most=7)
        held, blocks = [], pool(llm)
        with few_free_blocks(llm, 12):
            add(llm, "long", PROMPTS[3], greedy(1500, detokenize=False))
            done = step_until_done(
                llm, lambda: held.append(blocks.get_num_free_blocks())
            )
    assert len(done["long"]) == 1500
    assert 12 - min(held[600:]) <= 1 + 2 + 1 + 2

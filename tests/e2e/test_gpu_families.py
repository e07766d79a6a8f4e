# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Families whose layers share blocks of several kinds, on a GPU, with CUDA graphs.

vLLM clears blocks there by its own kernel; we only say that it must (cache/mode.py).
"""

import math
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402
from vllm.v1.kv_cache_interface import KVQuantMode  # noqa: E402

from vllm_sparse.attention import backend  # noqa: E402

from .engines import COLD, assert_same_but_for_ties, greedy, stats  # noqa: E402
from .family_runs import FULL, answers, family, poison  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GRAPHS = dict(
    device="cuda",
    enforce_eager=False,
    compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
)
SPARSE = {"top_k": 0.25, "dense_below": 64}
# Windows (with a soft cap, with 8 heads), chunks, states beside attention, cross.
NAMES = [
    "Qwen3",
    "Gemma 2",
    "Gemma 3, 8 KV heads",
    "Ministral",
    "OLMo 3",
    "Llama 4",
    "Falcon-H1",
    "Nemotron-H",
    "Granite hybrid",
    "Whisper",
]
# 16-bit sums of random weights: stock vLLM's own texts part at gaps up to this.
GAP = 0.3


def has_nan(outputs) -> bool:
    steps = [step for o in outputs for step in o.outputs[0].logprobs]
    return any(math.isnan(entry.logprob) for step in steps for entry in step.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_full_budget_gives_stock_vllms_tokens_but_for_ties(name):
    with family(name, None, **GRAPHS) as llm:
        expected = answers(llm, name, logprobs=4, **COLD)
    with family(name, FULL, **GRAPHS) as llm:
        poison_shared(llm)
        for options in (COLD, {}, {}):
            got = answers(llm, name, logprobs=4, **options)
            assert not has_nan(got)
            assert_same_but_for_ties(got, expected, GAP)


@pytest.mark.parametrize("kv_format", ["auto", "k8v4", "int4"])
@pytest.mark.parametrize("name", ["Gemma 3, 8 KV heads", "Ministral", "Falcon-H1"])
def test_sparse_and_quantised_blocks_beside_others(name, kv_format):
    with family(name, SPARSE | {"kv_format": kv_format}, **GRAPHS) as llm:
        poison_shared(llm)
        first = answers(llm, name, logprobs=4, **COLD)
        assert stats(llm)["sparse_rows"] > 0
        for options in (COLD, {}, {}):
            got = answers(llm, name, logprobs=4, **options)
            assert not has_nan(got)
            assert_same_but_for_ties(got, first, GAP)


def poison_shared(llm) -> None:
    """NaN everywhere; where all layers are ours, nothing clears a block before use."""
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    if config.needs_kv_cache_zeroing:
        poison(llm)


def test_without_a_mode_of_ours_blocks_are_not_cleared(monkeypatch):
    """The control: NaN, as the layers with windows read what we left there."""
    name = "Gemma 3, 8 KV heads"
    monkeypatch.setattr(backend, "BlockMode", SimpleNamespace(SPARSE=KVQuantMode.NONE))
    with family(name, FULL, **GRAPHS) as llm:
        config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        assert not config.needs_kv_cache_zeroing
        poison(llm)
        assert has_nan(answers(llm, name, logprobs=4, **COLD))


@pytest.mark.parametrize("name", ["Falcon-H1", "Qwen3"])
def test_the_last_token_of_a_prompt_is_dense_where_it_comes_alone(name):
    """Also where vLLM calls it a decode (models with states)."""
    prompt = {"prompt_token_ids": list(range(3, 260))}  # 257 tokens
    options = dict(max_num_batched_tokens=256, enable_prefix_caching=False)
    sparse = {"top_k": 64, "dense_below": 0}
    with family(name, sparse, **GRAPHS | options) as llm:
        llm.generate(prompt, greedy(1, detokenize=False), use_tqdm=False)
        assert stats(llm)["sparse_rows"] == 0
        llm.generate(prompt, greedy(3, detokenize=False), use_tqdm=False)
        assert stats(llm)["sparse_rows"] > 0

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Families whose layers share blocks of several kinds, on a GPU, with CUDA graphs.

vLLM clears blocks there by its own kernel; we only say that it must (plugin/mode.py).
"""

import math
import sys

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from .engines import COLD, NGRAM, assert_same_but_for_ties, configure, greedy, stats  # noqa: E402
from .family_runs import ANSWERS, FULL, answers, family, needs_clearing, poison  # noqa: E402

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
DENSE = {"selector": "dense"}
SPARSE = {"top_k": 0.25, "dense_below": 64}
# Windows (with a soft cap, with 8 heads), chunks, states beside attention, cross, and
# sinks.
NAMES = [
    "Qwen3",
    "Gemma 2",
    "Gemma 3, 8 KV heads",
    "Ministral",
    "Llama 4",
    "Falcon-H1",
    "Whisper",
    "gpt-oss",
]
# Random weights have many near ties: any text may part, but only there.
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
            assert_same_but_for_ties(got, expected, GAP, most=8)


@pytest.mark.parametrize(
    ("name", "kv_format"),
    [
        ("Gemma 3, 8 KV heads", "auto"),
        ("Gemma 3, 8 KV heads", "int4"),
        ("Ministral", "k8v4"),
        ("Falcon-H1", "k8v4"),
        ("gpt-oss", "auto"),
        ("gpt-oss", "k8v4"),
    ],
)
def test_sparse_and_quantised_blocks_beside_others(name, kv_format):
    fmt = {"kv_format": kv_format}
    with family(name, SPARSE | fmt, **GRAPHS) as llm:
        poison_shared(llm)
        for options in (COLD, {}, {}):
            assert not has_nan(answers(llm, name, logprobs=4, **options))
        assert stats(llm)["sparse_rows"] > 0
        # Rounding moves a choice of tokens by more than ties; attending to all, not.
        configure(llm, FULL | fmt)
        first = answers(llm, name, logprobs=4, **COLD)
        for options in (COLD, {}, {}):
            got = answers(llm, name, logprobs=4, **options)
            assert_same_but_for_ties(got, first, GAP, most=8)


def poison_shared(llm) -> None:
    """NaN everywhere; where all layers are ours, nothing clears a block before use."""
    if needs_clearing(llm):
        poison(llm)


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


@pytest.mark.parametrize("options", [FULL | {"dense_layers": 1}, DENSE], ids=str)
def test_verified_drafts_change_no_token_but_for_ties(options):
    """In one call for all of a request where a layer is dense, else row by row."""
    if "numba" in sys.modules:
        pytest.skip("vLLM starts no engine after ngram drafting: run each alone")
    with family("Qwen3", None, **GRAPHS) as llm:
        expected = answers(llm, "Qwen3", logprobs=4, **COLD)
    with family("Qwen3", options, speculative_config=NGRAM, **GRAPHS) as llm:
        for cache in (COLD, {}):
            got = answers(llm, "Qwen3", logprobs=4, **cache)
            assert_same_but_for_ties(got, expected, GAP, most=8)
        totals = stats(llm)
    assert totals["decode_tokens"] > 2 * (sum(ANSWERS) - len(ANSWERS))
    if options is DENSE:
        assert totals["kv_bytes_read"] == totals["kv_bytes_dense"]

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Lossless engines on a GPU: V2 runner, FULL CUDA graphs, asynchronous scheduling.

16 bits round a verification of several tokens otherwise than a decoded one: texts may
part where two tokens are nearly equal, and only there.
"""

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from .engines import COLD, assert_same_but_for_ties, generate, running, tokens  # noqa: E402
from .family_runs import answers, family  # noqa: E402
from .lossless import runner  # noqa: E402
from .test_gpu_engine import SETTINGS, dense, greedy, ours, prompts  # noqa: E402, F401
from .test_gpu_families import GAP, GRAPHS  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LOSSLESS = {
    "lossless": True,
    "draft_above": 0,
    "draft_adapt": False,
    "top_k": 64,
    "dense_below": 0,
}
STATS = {"disable_log_stats": False}


def speculated(llm) -> dict[str, int]:
    prefix = "vllm:spec_decode_num_"
    found = [m for m in llm.get_metrics() if m.name.startswith(prefix)]
    return {m.name.removeprefix(prefix): m.value for m in found if hasattr(m, "value")}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"draft_adapt": True},
        {"kv_format": "k8v4"},
        {"draft_sample_method": "greedy"},
    ],
    ids=str,
)
def test_answers_are_those_of_dense_attention_but_for_ties(more):
    """Random weights: most drafts of a small budget are wrong."""
    reference = {"selector": "dense"} | more if "kv_format" in more else None
    # vLLM extends a worker's class for good: not the parent of the next engine's.
    with family("Qwen3", reference, **GRAPHS, worker_extension_cls="") as llm:
        expected = answers(llm, "Qwen3", logprobs=4, **COLD)
    with family("Qwen3", LOSSLESS | more, **GRAPHS | STATS) as llm:
        for cache in (COLD, {}, {}):
            got = answers(llm, "Qwen3", logprobs=4, **cache)
            assert_same_but_for_ties(got, expected, GAP, most=8)
        counts = speculated(llm)
    assert counts["draft_tokens"] > 0
    assert counts["accepted_tokens"] < counts["draft_tokens"]


def test_a_full_budget_accepts_nearly_all_drafts():
    with family("Qwen3", LOSSLESS | {"top_k": 1.0}, **GRAPHS | STATS) as llm:
        answers(llm, "Qwen3", **COLD)
        counts = speculated(llm)
    assert counts["accepted_tokens"] > 0.9 * counts["draft_tokens"]


@pytest.mark.parametrize("compiled", [False, True])
def test_drafts_compute_with_copies_of_the_weights(prompts, dense, compiled):  # noqa: F811
    """Drafts that keep all tokens differ by the copies alone: a few are wrong."""
    sparse = LOSSLESS | {"top_k": 1.0, "draft_weights": "fp8"}
    how = {"compilation_config": {}} if compiled else {}
    with ours(additional_config={"sparse": sparse}, **STATS | how) as llm:

        def accepted() -> float:
            before = speculated(llm)
            assert_same_but_for_ties(generate(llm, prompts, greedy(**COLD)), dense)
            counts = {k: v - before[k] for k, v in speculated(llm).items()}
            return counts["accepted_tokens"] / counts["draft_tokens"]

        share = accepted()
        print(f"accepted {share:.3f}")
        assert 0.7 < share < 0.995
        for layer in runner(llm).speculator.weights.layers:
            layer.draft_codes.zero_()
        assert accepted() < 0.5
        llm.collective_rpc("reload_weights")
        assert accepted() == pytest.approx(share, abs=0.05)


def test_real_weights(prompts, dense):  # noqa: F811
    """Answers of FLASH_ATTN, most drafts accepted; hits, follow-ups, seeds."""
    sparse = LOSSLESS | {"top_k": 0.125}
    with ours(additional_config={"sparse": sparse}, **STATS) as llm:
        for cache in (COLD, {}, {}):
            got = generate(llm, prompts, greedy(**cache))
            assert_same_but_for_ties(got, dense)
        counts = speculated(llm)
        # Of four: .78 is .90 where all before were accepted.
        assert counts["accepted_tokens"] > 0.7 * counts["draft_tokens"]
        turns = [p + t for p, t in zip(prompts, tokens(got), strict=True)]
        follow_ups = generate(llm, turns, greedy())
        seeded = greedy(seed=7, **COLD)
        seeded.temperature = 0.8
        first = tokens(generate(llm, prompts, seeded))
        assert tokens(generate(llm, prompts, seeded)) == first
        assert speculated(llm)["accepted_tokens"] > counts["accepted_tokens"]
    with running(**SETTINGS, attention_backend="FLASH_ATTN") as llm:
        assert_same_but_for_ties(follow_ups, generate(llm, turns, greedy(**COLD)))

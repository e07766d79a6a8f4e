# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Engines of models that norm queries and keys: budgets adapt unless they are given."""

import pytest

pytest.importorskip("vllm")

from vllm_sparse.layer.impl import SparseAttentionImpl  # noqa: E402

from .drafters import DRAFTERS, drafting  # noqa: E402
from .engines import configure, generate, greedy, tokens  # noqa: E402
from .family_runs import alone, family, layers  # noqa: E402
from .tiny import random_prompts  # noqa: E402

pytestmark = pytest.mark.engine
OPEN = {"dense_below": 64}
FIXED = OPEN | {"top_k": 0.125}
ADAPTIVE = OPEN | {"top_p": 0.9}


def top_p(llm) -> set[float | None]:
    """Of all layers and builders."""
    impls = [getattr(layer, "impl", None) for layer in layers(llm)]
    parts = [impl for impl in impls if isinstance(impl, SparseAttentionImpl)]
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner = worker.model_runner
    groups = [g for groups in runner.attn_groups for g in groups]
    groups += getattr(getattr(runner, "drafter", None), "draft_attn_groups", [])
    for group in groups:
        parts += group.metadata_builders
    assert len(parts) >= len(impls) + len(groups)
    return {part.config.top_p for part in parts}


def run(llm, name: str):
    """Answers, and the tokens kept."""
    llm.collective_rpc("reset_sparse_stats")
    return alone(llm, name), llm.collective_rpc("sparse_kept_tokens")


def test_budgets_adapt_until_they_are_fixed():
    with family("Qwen3", OPEN) as llm:
        assert top_p(llm) == {0.9}
        answers, kept = run(llm, "Qwen3")
        configure(llm, FIXED)
        assert top_p(llm) == {None}
        fixed, fewer = run(llm, "Qwen3")
        assert fewer != kept and fixed != answers
        configure(llm, ADAPTIVE)
        assert run(llm, "Qwen3") == (answers, kept)
        configure(llm, OPEN)
        assert top_p(llm) == {0.9}
    with family("Qwen3", FIXED) as llm:
        assert top_p(llm) == {None}
        assert run(llm, "Qwen3") == (fixed, fewer)


def test_a_llama_keeps_fixed_budgets():
    with family("Llama", OPEN) as llm:
        assert top_p(llm) == {None}
        got = run(llm, "Llama")
        configure(llm, FIXED)
        assert run(llm, "Llama") == got


def test_a_draft_models_budgets_are_the_targets(monkeypatch):
    """A draft model without norms, whose layers may share a builder with the target's;
    drafts change nothing."""
    llama = DRAFTERS["draft_model"][1]
    monkeypatch.setitem(DRAFTERS, "draft_model", ("Qwen3", llama))
    prompts, params = random_prompts(5, 129, 300, 450), greedy(24)
    with drafting(None, OPEN, "Qwen3") as llm:
        expected = tokens(generate(llm, prompts, params))
    with drafting("draft_model", OPEN, draft_backend="sparq") as llm:
        assert top_p(llm) == {0.9}
        assert tokens(generate(llm, prompts, params)) == expected
        (kept,) = llm.collective_rpc("sparse_kept_tokens")
        drafts = [heads for n, heads in kept.items() if n.startswith("draft_model.")]
        assert drafts and all(head["rows"] for heads in drafts for head in heads)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Live figures of a lossless engine with a real model."""

import pytest
from prometheus_client import REGISTRY

from vllm_sparse.stats import live_figures

from .engines import (
    EXTENSION,
    HEAD_SIZE,
    KV_HEADS,
    NUM_LAYERS,
    SPARSE,
    greedy,
    running,
)

pytestmark = pytest.mark.engine
LENGTHS, ANSWER = (600, 900), 32


def exported(name: str) -> float:
    """A metric of the one engine in this process."""
    samples = (s for m in REGISTRY.collect() for s in m.samples)
    (value,) = (s.value for s in samples if s.name == f"vllm_sparse:{name}")
    return value


def test_figures_are_those_of_vllm_and_of_the_tokens_given():
    options = SPARSE | {"lossless": True, "draft_above": 0, "draft_adapt": False}
    settings = dict(
        dtype="float32",
        attention_backend="sparq",
        additional_config={"sparse": options},
        worker_extension_cls=EXTENSION,
        disable_log_stats=False,
    )
    with running(**settings) as llm:
        llm.collective_rpc("reset_sparse_stats")  # what engines before it counted
        words = llm.get_tokenizer().encode("The quick brown fox, the lazy dog. " * 120)
        prompts = [{"prompt_token_ids": words[:n]} for n in LENGTHS]
        llm.generate(prompts, greedy(ANSWER), use_tqdm=False)
        figures = live_figures(llm)
        (stats,) = llm.collective_rpc("sparse_stats")
        theirs = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
        drafts = {
            name: theirs[f"vllm:spec_decode_num_{other}"]
            for name, other in (
                ("verifications", "drafts"),
                ("drafted_tokens", "draft_tokens"),
                ("accepted_tokens", "accepted_tokens"),
            )
        }
        for name, count in drafts.items():
            assert getattr(figures, name) == count > 0
            assert exported(f"{name}_total") == count
        assert figures.drafts_now == exported("drafts_now") == 4
        assert figures.kv_bytes_dense == exported("kv_bytes_dense_total")
        assert 1 < figures.accepted_length <= 5
        # Dense decoding of the same tokens, the first of which a prompt's pass gave. A
        # request's last verification may give up to four more, and counts whole
        # contexts for all its tokens.
        row = NUM_LAYERS * KV_HEADS * 2 * HEAD_SIZE * 4
        dense = sum(row * (n + i) for n in LENGTHS for i in range(1, ANSWER))
        assert figures.kv_bytes_dense == stats["kv_bytes_dense"]
        most = dense * (ANSWER + 4) / (ANSWER - 1) * 1.01
        assert dense < figures.kv_bytes_dense < most
        assert figures.kv_bytes_read == stats["kv_bytes_read"]
        # A fifth of the tokens for each draft, and codes; one verification for them.
        assert 0.2 < figures.kv_fraction < 0.9
        llm.collective_rpc("reset_sparse_stats")
        assert live_figures(llm).kv_fraction is None
        # Options reach the drafts: with all tokens they are never wrong.
        llm.collective_rpc("reconfigure_sparse", args=(options | {"top_k": 1.0},))
        before = live_figures(llm)
        llm.generate(prompts, greedy(ANSWER), use_tqdm=False)
        later = live_figures(llm) - before
        assert later.draft_acceptance == 1.0
        assert later.rows_sparse == 0 and later.kv_fraction > 1

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Gated delta nets with prefix caching, where our blocks are smaller than stock vLLM's.

States are cached at ends of blocks, and prompts are computed up to there: other blocks
are other chunks, which round differently in bfloat16.
"""

import pytest

pytest.importorskip("vllm")

from . import delta_rule  # noqa: E402
from .engines import (  # noqa: E402
    COLD,
    assert_same_but_for_ties,
    generate,
    greedy,
    tokens,
)
from .families import DELTA, FAMILIES  # noqa: E402
from .family_runs import FULL, family  # noqa: E402
from .tiny import random_prompts  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.slow]
# Proportions of Qwen3.5: a state is larger than 128 tokens' K and V.
NAME = "Qwen3.5, head size 256"
SIZES = dict(head_dim=256, linear_num_key_heads=4, linear_num_value_heads=8)
GAP = 0.15  # of logits around 10, where bfloat16 has steps of 0.06


def rounds(sparse: dict | None, dtype: str, **options) -> tuple[int, dict[str, list]]:
    """(block size, outputs): cold, and each prompt sent twice, one at a time."""
    shared, *ends = random_prompts(400, 60, 130, 290)
    prompts = [shared + end for end in ends]
    params = dict(logprobs=5, detokenize=False)
    with family(NAME, sparse, dtype=dtype, **options) as llm:

        def ask(**options):
            params_ = greedy(24, **params, **options)
            return [generate(llm, [prompt], params_)[0] for prompt in prompts]

        found = {"cold": ask(**COLD)}
        assert llm.reset_prefix_cache()
        found |= {"first": ask(), "second": ask()}
        block = llm.llm_engine.vllm_config.cache_config.block_size
    cached = [output.num_cached_tokens for output in found["second"]]
    assert cached == [(len(p) - 1) // block * block for p in prompts]
    return block, found


@pytest.fixture(autouse=True)
def proportions(monkeypatch):
    monkeypatch.setitem(
        FAMILIES, NAME, ("Qwen3_5ForCausalLM", "qwen3_5_text", DELTA | SIZES)
    )


def test_without_rounding_all_rounds_give_stock_vllms_tokens(monkeypatch):
    delta_rule.install(monkeypatch)
    block, expected = rounds(None, "float32")
    ours, got = rounds(FULL, "float32")
    assert ours < block
    for outputs in (*expected.values(), *got.values()):
        assert tokens(outputs) == tokens(expected["cold"])


def test_in_16_bits_texts_part_only_at_ties():
    """And where blocks are equal, a cached round gives what the first one gave."""
    block, expected = rounds(None, "bfloat16")
    ours, got = rounds(FULL, "bfloat16")
    assert (ours, block) == (256, 384)
    for outputs in got.values():
        assert_same_but_for_ties(outputs, expected["cold"], GAP, most=3)
    _, same = rounds(FULL, "bfloat16", block_size=block)
    for outputs in same.values():
        assert tokens(outputs) == tokens(same["cold"])
        assert_same_but_for_ties(outputs, expected["cold"], GAP)

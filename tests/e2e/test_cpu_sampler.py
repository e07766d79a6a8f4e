# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Requests that sample while n-gram drafts are verified, in one engine on the CPU.

What each answer must be is known without a second engine: with top_k 1, greedy's; with
a seed, the same in any company.
"""

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from vllm_sparse.cache.layout import BLOCK_SIZE  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    EXTENSION,
    NGRAM,
    SPARSE,
    generate,
    greedy,
    running,
    stats,
    tokens,
)
from .tiny import random_prompts, save_llama  # noqa: E402

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="the sampler of CPUs"),
]
NEW_TOKENS = 24
# The prompts below come in pieces of this.
MOST_TOKENS_PER_STEP = 64


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """In a process of its own, as vLLM's n-gram drafts import numba."""
    with running(
        in_process=False,
        model=str(save_llama(tmp_path_factory.mktemp("llama"))),
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_batched_tokens=MOST_TOKENS_PER_STEP,
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": SPARSE},
        speculative_config=NGRAM,
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts():
    """That repeat themselves."""
    return [prompt * 2 for prompt in random_prompts(40, 90, 5)]


def sampled(**options) -> SamplingParams:
    return SamplingParams(
        temperature=0.8, max_tokens=NEW_TOKENS, ignore_eos=True, **options
    )


def assert_the_best_token_is_greedys(llm, prompts, **options):
    best = tokens(generate(llm, prompts, greedy(NEW_TOKENS, **options)))
    for alone in (dict(top_k=1), dict(top_p=1e-6)):
        got = tokens(generate(llm, prompts, sampled(**alone, **options)))
        assert got == best


def test_the_best_token_is_greedys(drafting, prompts):
    drafting.collective_rpc("reset_sparse_stats")
    assert_the_best_token_is_greedys(drafting, prompts, **COLD)
    # More positions were decoded than tokens came out: drafts were among them.
    least = 3 * len(prompts) * (NEW_TOKENS - 1)
    assert stats(drafting)["decode_tokens"] > least


def test_a_request_that_vllm_pads_with_drafts(drafting):
    """One token is left when the prefix cache has given a block."""
    prompts = random_prompts(BLOCK_SIZE + 1)
    generate(drafting, prompts, greedy(1))
    assert_the_best_token_is_greedys(drafting, prompts)


def test_drafts_that_are_certain_are_accepted(drafting, prompts):
    drafting.collective_rpc("reset_sparse_stats")
    params = sampled(allowed_token_ids=[7], **COLD)
    answers = tokens(generate(drafting, prompts, params))
    assert answers == [[7] * NEW_TOKENS] * len(prompts)
    # A step of 1 + 3 positions for each token, were all drafts rejected.
    assert stats(drafting)["decode_tokens"] < 1.5 * len(prompts) * NEW_TOKENS


def test_seeds_give_the_same_tokens_in_any_company(drafting, prompts):
    """Prompts come in other chunks then, and each chunk throws a token away."""
    params = [sampled(seed=seed, **COLD) for seed in range(len(prompts))]
    together = tokens(generate(drafting, prompts, params))
    for prompt, its, got in zip(prompts, params, together, strict=True):
        assert tokens(generate(drafting, [prompt], its)) == [got]
    for other in (sampled(seed=99, **COLD), greedy(NEW_TOKENS, **COLD)):
        others = tokens(generate(drafting, prompts, other))
        assert all(a != b for a, b in zip(together, others, strict=True))

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Two hundred answers of 512 tokens: a lossless engine's are a dense engine's."""

import random

import pytest

pytest.importorskip("vllm")

from .engines import COLD, generate, greedy, running, tokens  # noqa: E402
from .lossless import DENSE_ENGINE, LOSSLESS, Drafts, lossless  # noqa: E402
from .tiny import random_prompts, save_llama  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]
REQUESTS, ANSWER, LONGEST = 200, 512, 1400
# Between a pass over one token and a pass over five, in fp32.
TIE = 2e-4


def test_every_token_of_two_hundred_answers(tmp_path):
    settings = dict(
        model=str(save_llama(tmp_path)),
        skip_tokenizer_init=True,
        max_num_seqs=48,
        max_model_len=LONGEST + ANSWER,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=2**30,
    )
    rng = random.Random(0)
    prompts = random_prompts(*(rng.randint(1, LONGEST) for _ in range(REQUESTS)))
    params = dict(detokenize=False, **COLD)
    with running(**DENSE_ENGINE | settings) as llm:
        dense = generate(llm, prompts, greedy(ANSWER, logprobs=2, **params))
    options = LOSSLESS | {"dense_below": 0, "top_k": 0.3}
    with lossless(options, **settings) as llm:
        drafts = Drafts(llm)
        got = generate(llm, prompts, greedy(ANSWER, **params))
        print(f"{drafts.drafted} tokens drafted, {drafts.rate:.3f} accepted")
        assert 0 < drafts.rate < 0.9
    margins = {}
    for i, (ours, theirs) in enumerate(zip(tokens(got), tokens(dense), strict=True)):
        assert len(ours) == len(theirs) == ANSWER
        if ours != theirs:
            first = next(j for j in range(ANSWER) if ours[j] != theirs[j])
            likeliest = dense[i].outputs[0].logprobs[first].values()
            best, second = sorted((x.logprob for x in likeliest), reverse=True)[:2]
            margins[i, first] = best - second
    print(f"of {REQUESTS} answers {len(margins)} part, at margins of {margins}")
    assert all(margin < TIE for margin in margins.values())

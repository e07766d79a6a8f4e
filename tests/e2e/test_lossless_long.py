# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Many long answers of a real model, all of a lossless engine's tokens dense ones."""

import random

import pytest

pytest.importorskip("vllm")

from .engines import COLD, generate, greedy, running, tokens  # noqa: E402
from .lossless import DENSE_ENGINE, LOSSLESS, Drafts, lossless, text  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.slow]
REQUESTS, ANSWER, LONGEST = 200, 512, 1024
SETTINGS = dict(
    max_num_seqs=64, max_model_len=LONGEST + ANSWER, max_num_batched_tokens=2048
)
# Between a pass over one token and a pass over five, in fp32.
TIE = 2e-4


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    lengths = [rng.randint(1, LONGEST) for _ in range(REQUESTS)]
    last = len(text(12_000)) - LONGEST
    return [text(n, rng.randrange(last)) for n in lengths]


def test_every_token_of_two_hundred_answers():
    asked, params = prompts(), greedy(ANSWER, logprobs=2, **COLD)
    with running(**DENSE_ENGINE | SETTINGS) as llm:
        dense = generate(llm, asked, params)
    with lossless(LOSSLESS, **SETTINGS) as llm:
        drafts = Drafts(llm)
        got = generate(llm, asked, greedy(ANSWER, **COLD))
        print(f"{drafts.drafted} tokens drafted, {drafts.rate:.3f} accepted")
        assert 0.5 < drafts.rate < 1
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

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Lines that leave anchors, on a GPU: V2 runner, FULL graphs, asynchronous
scheduling. In 16 bits, so against a masked forward in fp32 but for near ties."""

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    NGRAM,
    add,
    few_free_blocks,
    generate,
    greedy,
    stats,
    step_until_done,
)
from .family_runs import poison  # noqa: E402
from .test_anchor import RULES, anchored, expected  # noqa: E402
from .test_gpu_streaming import OPTIONS  # noqa: E402
from .test_streaming import ANSWERS, PROMPTS, pool  # noqa: E402
from .tiny import random_prompts, save_llama  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def check(folder, prompts, outputs, rules: str = "plain", gap: float = 0.4) -> None:
    """No token is less likely than the likeliest by more than ``gap`` nats."""
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        found = expected(folder, prompt + answer, rules)[len(prompt) - 1 : -1]
        chosen = found.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (found.amax(-1) - chosen).max() < gap


@pytest.mark.parametrize("rules", list(RULES))
def test_answers_and_memory(folder, rules):
    """Cold, from the cache, long prompts; held blocks stay few."""
    with anchored(folder, rules, **OPTIONS) as llm:
        poison(llm)
        for cache in (COLD, {}, {}):
            params = [greedy(n, detokenize=False, **cache) for n in ANSWERS]
            check(folder, PROMPTS, generate(llm, PROMPTS, params), rules)
        long = random_prompts(1200, 1900)
        for _ in range(2):
            outputs = generate(llm, long, greedy(40, detokenize=False))
            check(folder, long, outputs, rules)
        assert stats(llm)["sparse_rows"] > 0
        held, blocks = [], pool(llm)
        with few_free_blocks(llm, 12):
            add(llm, "long", PROMPTS[3], greedy(1500, detokenize=False))
            done = step_until_done(
                llm, lambda: held.append(12 - blocks.get_num_free_blocks())
            )
    assert len(done["long"]) == 1500
    assert max(held[600:-1]) <= 2 + 4


def test_drafts(folder):
    prompts = [PROMPTS[3][:150] * 3, PROMPTS[0]]
    options = OPTIONS | {"async_scheduling": False}  # vLLM's ngram has none
    with anchored(folder, speculative_config=NGRAM, **options) as llm:
        for _ in range(2):
            outputs = generate(llm, prompts, greedy(150, detokenize=False))
            check(folder, prompts, outputs)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sinks and a window on a GPU, blocks given back, without and with a learned state: V2
runner, FULL graphs, asynchronous scheduling. In 16 bits, so against a masked forward in
fp32 but for near ties."""

from functools import partial

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    add,
    few_free_blocks,
    generate,
    greedy,
    stats,
    step_until_done,  # noqa: E402
)
from .masked import State, assert_near, log_probabilities  # noqa: E402
from .test_less import SINKS, checkpoint, less  # noqa: E402, F401
from .test_less import mask as less_mask  # noqa: E402
from .test_streaming import ANSWERS, PREFILLS, PROMPTS, mask, pool, streaming  # noqa: E402
from .tiny import save_llama  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = dict(
    dtype="bfloat16",
    async_scheduling=True,
    enforce_eager=False,
    compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("backend", ["streaming", "less"])
def test_answers_and_memory(folder, checkpoint, backend, prefill):  # noqa: F811
    """Cold, from the cache, twice; held blocks do not grow."""
    if backend == "less":
        engine = less(folder, checkpoint, prefill, **OPTIONS)
        given = dict(mask_of=partial(less_mask, prefill))
        given["state"] = State.load(checkpoint, SINKS)
    else:
        engine = streaming(folder, prefill, **OPTIONS)
        given = dict(mask_of=partial(mask, prefill))
    with engine as llm:
        for cache in (COLD, {}, {}):
            params = [greedy(n, detokenize=False, **cache) for n in ANSWERS]
            assert_near(folder, PROMPTS, generate(llm, PROMPTS, params), **given)
        assert stats(llm)["sparse_rows"] > 0
        held, blocks = [], pool(llm)
        with few_free_blocks(llm, 12):
            add(llm, "long", PROMPTS[3], greedy(1500, detokenize=False))
            done = step_until_done(
                llm, lambda: held.append(blocks.get_num_free_blocks())
            )
    assert len(done["long"]) == 1500
    assert 12 - min(held[600:]) <= 1 + 2 + 1 + 2


def test_other_masks_would_be_noticed(folder):
    """The control, in fp32: texts of dense attention are not near."""
    whole = log_probabilities(folder, PROMPTS[2], mask("exact", 2000, 1000))
    window = log_probabilities(folder, PROMPTS[2], mask("streaming", 0, 1000))
    best = whole.argmax(-1, keepdim=True)
    assert (window.amax(-1) - window.gather(1, best)[:, 0]).max() > 0.6

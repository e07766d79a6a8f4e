# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A learned state for what has left a window, in vLLM's engine, against one forward of
the same mathematics. What is "learned" here is random, and strong enough to matter."""

from functools import partial

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from vllm_sparse.cache.layout import STATE_RANK  # noqa: E402
from vllm_sparse.checkpoint import save  # noqa: E402
from vllm_sparse.methods.less import KIND, described  # noqa: E402
from vllm_sparse.stats import live_figures  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    NGRAM,
    add,
    few_free_blocks,
    generate,
    greedy,
    scheduled,
    stats,
    step_until_done,
    tokens,
)
from .masked import State, assert_answers, log_probabilities, sinks_and_window  # noqa: E402
from .test_streaming import ANSWERS, PARAMS, PROMPTS, pool, streaming  # noqa: E402
from .tiny import random_prompts, save_llama  # noqa: E402

pytestmark = pytest.mark.engine
SINKS, WINDOW, HIDDEN = 128, 128, 16
LAYERS, HEADS, KV_HEADS, SIZE = 3, 4, 2, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, folder):
    """Random kernels: of what left, some tenths of the mass."""
    generator = torch.Generator().manual_seed(2)

    def random(*size):
        return torch.randn(size, generator=generator) / size[-2] ** 0.5

    tensors = {}
    for layer in range(LAYERS):
        of_layer = dict(
            q1=random(HEADS, SIZE, HIDDEN),
            q2=random(HEADS, HIDDEN, STATE_RANK) * 2,
            k1=random(KV_HEADS, SIZE, HIDDEN),
            k2=random(KV_HEADS, HIDDEN, STATE_RANK) * 2,
            k3=random(KV_HEADS, STATE_RANK, STATE_RANK),
            s1=torch.rand(KV_HEADS, STATE_RANK, generator=generator),
            s2=torch.randn(KV_HEADS, STATE_RANK, generator=generator),
        )
        tensors |= {f"layers.{layer}.{name}": t for name, t in of_layer.items()}
    config = described(AutoConfig.from_pretrained(folder), HIDDEN, SINKS, WINDOW)
    out = tmp_path_factory.mktemp("checkpoint")
    save(out, KIND, tensors, folder, config, {}, "")
    return str(out)


def less(folder, checkpoint, prefill: str, **options):
    sparse = dict(local_window=WINDOW, prefill=prefill, checkpoint=checkpoint)
    own = {"attention_backend": "less", "additional_config": {"sparse": sparse}}
    return streaming(folder, prefill, **own | options)


def mask(prefill: str, prompt: int, length: int) -> torch.Tensor:
    return sinks_and_window(length, SINKS, WINDOW, prompt * (prefill == "exact"))


@pytest.fixture(scope="module")
def state(checkpoint):
    return State.load(checkpoint, SINKS)


@pytest.mark.parametrize(
    "prefill", [pytest.param("exact", marks=pytest.mark.slow), "streaming"]
)
def test_answers_are_those_of_one_forward(folder, checkpoint, state, prefill):
    """In company; from the prefix cache; in odd chunks; with drafts' lags."""
    check = partial(assert_answers, folder, mask_of=partial(mask, prefill), state=state)
    with less(folder, checkpoint, prefill) as llm:
        free = pool(llm).get_num_free_blocks()
        llm.collective_rpc("reset_sparse_stats")
        check(PROMPTS, generate(llm, PROMPTS, PARAMS))
        assert stats(llm)["sparse_rows"] > 0
        # However a prompt's rows are served, they are none that decode.
        figures = live_figures(llm)
        assert figures.rows_dense["prefill"] == LAYERS * sum(map(len, PROMPTS))
        assert figures.decode_rows == LAYERS * (sum(ANSWERS) - len(ANSWERS))
        sparse = figures.kept_tokens
        assert sparse.rows == KV_HEADS * figures.rows_sparse
        assert 0.05 < figures.state_share < 0.95
        assert figures.blocks_given_back > 10 and figures.requests_holding == 0
        hits = generate(llm, PROMPTS, PARAMS)
        check(PROMPTS, hits)
        assert sum(output.num_cached_tokens for output in hits) > 1000
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.max_num_scheduled_tokens = 100
        cold = [greedy(n, logprobs=1, detokenize=False, **COLD) for n in ANSWERS]
        check(PROMPTS, generate(llm, PROMPTS, cold))
        assert pool(llm).get_num_free_blocks() == free


def test_without_the_state_answers_would_differ(folder, state):
    """The control: the state matters, and so does which tokens are in it."""
    text = PROMPTS[2]
    given = mask("streaming", 0, len(text))
    found = log_probabilities(folder, text, given, state)[-1]
    for other in (None, State(state.kernels, SINKS + 128)):
        apart = log_probabilities(folder, text, given, other)[-1]
        assert (found - apart).abs().max() > 0.05


@pytest.mark.slow
def test_preempted_requests_and_long_prompts(folder, checkpoint, state):
    prompts, names = random_prompts(129, 130, 131), "abc"
    preempted = set()
    params = greedy(300, detokenize=False, **COLD)
    with less(folder, checkpoint, "streaming", max_num_batched_tokens=256) as llm:
        expected = tokens(generate(llm, prompts, params))

        def watch():
            found = scheduled(llm).items()
            preempted.update(n for n, r in found if r.num_preemptions)

        with few_free_blocks(llm, 9):
            for name, prompt in zip(names, prompts, strict=True):
                add(llm, name, prompt, params)
            finished = step_until_done(llm, watch)
        assert [finished[name] for name in names] == expected
        long = random_prompts(1900)
        with few_free_blocks(llm, 10):
            outputs = generate(llm, long, PARAMS[1])
    assert preempted
    check = partial(assert_answers, folder, mask_of=partial(mask, "streaming"))
    check(long, outputs, state=state)


@pytest.mark.slow
def test_ranks_have_the_features_of_their_heads(folder, checkpoint, state):
    parallel = dict(tensor_parallel_size=2, distributed_executor_backend="mp")
    options = dict(in_process=False, max_num_batched_tokens=256) | parallel
    with less(folder, checkpoint, "streaming", **options) as llm:
        outputs = generate(llm, PROMPTS, PARAMS)
        figures = live_figures(llm)
    check = partial(assert_answers, folder, mask_of=partial(mask, "streaming"))
    check(PROMPTS, outputs, state=state)
    assert figures.decode_rows == LAYERS * (sum(ANSWERS) - len(ANSWERS))
    assert figures.kept_tokens.rows == KV_HEADS * figures.rows_sparse


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": None}, "checkpoint is what --attention-backend less"),
        ({"checkpoint": "/nowhere"}, "no checkpoint in /nowhere"),
        ({"local_window": 256}, "was made for local_window 128, not 256"),
        ({"sink_tokens": 0}, "was made for sink_tokens 128, not 0"),
    ],
)
def test_other_checkpoints_are_refused(folder, checkpoint, changes, message):
    sparse = dict(local_window=WINDOW, checkpoint=checkpoint) | changes
    with (
        pytest.raises(Exception, match=message),
        less(folder, None, "exact", additional_config={"sparse": sparse}),
    ):
        pass


def test_other_weights_are_refused(checkpoint, tmp_path):
    other = save_llama(tmp_path, vocabulary=600)
    with (
        pytest.raises(Exception, match="has other weights"),
        less(other, checkpoint, "exact"),
    ):
        pass


@pytest.mark.slow
def test_drafts_change_nothing(folder, checkpoint, state):
    """States are sealed over rejected drafts, and again."""
    prompts = [PROMPTS[3][:150] * 3, PROMPTS[0]]
    params = greedy(150, logprobs=1, detokenize=False)
    # vLLM starts no engine in a process that has drafted by ngram.
    options = dict(in_process=False, speculative_config=NGRAM)
    with less(folder, checkpoint, "streaming", **options) as llm:
        outputs = [generate(llm, prompts, params) for _ in range(2)]
    check = partial(assert_answers, folder, mask_of=partial(mask, "streaming"))
    for found in outputs:
        check(prompts, found, state=state)

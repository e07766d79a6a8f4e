# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Lossless engines of every kind against dense ones: options, formats, LoRA, processes.

A tiny random model, whose drafts are often wrong, and long answers.
"""

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402

from vllm_sparse.selectors import SELECTORS  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    EXTENSION,
    add,
    few_free_blocks,
    generate,
    greedy,
    running,
    scheduled,
    step_until_done,
    tokens,
)
from .lossless import DENSE_ENGINE, LOSSLESS, Drafts, lossless, text  # noqa: E402
from .test_lora import RANK, save_adapter  # noqa: E402
from .tiny import random_prompts, save_llama  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.slow]
OPTIONS = LOSSLESS | {"dense_below": 0, "top_k": 0.3}
LENGTHS = [1, 3, 125, 127, 128, 129, 300, 700, 1400]
NEW = 300
TWILIGHT = {
    name: OPTIONS[name] for name in OPTIONS if name not in ("top_k", "local_window")
} | {"top_p": 0.8, "min_tokens": 40}
FORMATS = ["int8", "int4", "k4v8", "k8v4"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    return dict(
        model=str(save_llama(tmp_path_factory.mktemp("llama"))),
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_seqs=16,
        max_num_batched_tokens=512,
    )


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(*LENGTHS)


def long(**options):
    return greedy(NEW, detokenize=False, **options)


@pytest.fixture(scope="module")
def dense(settings, prompts):
    with running(**settings | DENSE_ENGINE) as llm:
        return tokens(generate(llm, prompts, long()))


@pytest.mark.parametrize(
    "options",
    [
        *({"draft_tokens": n} for n in (1, 2, 5, 16)),
        {"draft_adapt": True},
        {"draft_adapt": True, "draft_tokens": 1},
        {"draft_sample_method": "greedy"},
        {"draft_above": 200},
        {"dense_below": 400},
        {"dense_layers": 1},
        {"mean_value": True},
        {"rank": 64},
        *({"selector": n} for n in SELECTORS if n not in ("sparq", "dense")),
    ],
    ids=str,
)
def test_options(settings, prompts, dense, options):
    with lossless(OPTIONS | options, **settings) as llm:
        drafts = Drafts(llm)
        assert tokens(generate(llm, prompts, long())) == dense
        assert 0 < drafts.accepted < drafts.drafted
        assert tokens(generate(llm, prompts, long())) == dense  # on hits
        for prompt, wanted in zip(prompts[-3:], dense[-3:]):
            assert tokens(generate(llm, [prompt], long(**COLD))) == [wanted]


def test_adaptive_budgets(settings, prompts, dense):
    with lossless(TWILIGHT, attention_backend="twilight", **settings) as llm:
        drafts = Drafts(llm)
        assert tokens(generate(llm, prompts, long())) == dense
        assert 0 < drafts.accepted < drafts.drafted


@pytest.mark.parametrize("number", [1, 4, 7])
def test_all_drafts_of_a_full_budget_are_accepted(settings, prompts, dense, number):
    options = OPTIONS | {"top_k": 1.0, "draft_tokens": number}
    with lossless(options, **settings) as llm:
        drafts = Drafts(llm)
        assert tokens(generate(llm, prompts, long())) == dense
        assert drafts.accepted == drafts.drafted
        # A step for each number + 1 tokens, after that of the prompt.
        steps = -(-(NEW - 1) // (number + 1))
        assert drafts.drafted == len(prompts) * steps * number


@pytest.mark.parametrize("kv_format", FORMATS)
def test_quantised_blocks(settings, prompts, kv_format):
    """Dense attention over the same codes; a model that rounds as it does."""
    plain = {"selector": "dense", "kv_format": kv_format}
    with running(
        **settings, attention_backend="sparq", additional_config={"sparse": plain}
    ) as llm:
        wanted = tokens(generate(llm, prompts, long()))
    with lossless(OPTIONS | {"kv_format": kv_format}, **settings) as llm:
        drafts = Drafts(llm)
        assert tokens(generate(llm, prompts, long())) == wanted
        assert 0 < drafts.accepted < drafts.drafted
        assert tokens(generate(llm, prompts, long())) == wanted
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.max_num_scheduled_tokens = 60
        assert tokens(generate(llm, prompts, long(**COLD))) == wanted


@pytest.mark.parametrize("kv_format", ["auto", *FORMATS])
def test_preemption_of_requests_that_grow(settings, prompts, dense, kv_format):
    """By many blocks, where there are few."""
    options = OPTIONS | {"kv_format": kv_format}
    preempted: dict[str, int] = {}
    with lossless(options, **settings) as llm:
        alone = [tokens(generate(llm, [p], long(**COLD)))[0] for p in prompts[:6]]
        if kv_format == "auto":
            assert alone == dense[:6]

        def watch():
            for name, request in scheduled(llm).items():
                preempted[name] = max(preempted.get(name, 0), request.num_preemptions)

        held = 0 if kv_format == "auto" else 6 * 4
        with few_free_blocks(llm, 12 + held):
            for i, prompt in enumerate(prompts[:6]):
                add(llm, f"r{i}", prompt, long())
            finished = step_until_done(llm, watch)
        assert sum(preempted.values()) > 0
        assert finished == {f"r{i}": ids for i, ids in enumerate(alone)}


def test_to_the_end_of_the_longest_context(settings):
    """Each distance from it that a cycle of drafts can have."""
    prompts = random_prompts(*range(480, 512))
    longest = dict(max_model_len=512)
    with running(**settings | DENSE_ENGINE | longest) as llm:
        wanted = tokens(generate(llm, prompts, long()))
    assert [len(ids) for ids in wanted] == list(range(32, 0, -1))
    with lossless(OPTIONS, **settings | longest) as llm:
        assert tokens(generate(llm, prompts, long())) == wanted
        for prompt, ids in zip(prompts[::5], wanted[::5]):
            assert tokens(generate(llm, [prompt], long(**COLD))) == [ids]


def test_adapters_hold_for_drafts(settings, tmp_path):
    """With a full budget a draft is rejected only if another adapter made it."""
    from vllm.lora.request import LoRARequest

    adapters = []
    for i in (1, 2):
        (tmp_path / f"{i}").mkdir()
        save_adapter(tmp_path / f"{i}", seed=i)
        adapters.append(LoRARequest(f"random {i}", i, str(tmp_path / f"{i}")))
    chosen = random_prompts(129, 300, 40, 200)
    first, second = adapters
    # Not with and without one in a batch: vLLM's LoRA for CPUs takes -1, no adapter,
    # for the last one.
    asked = [[None] * 4, [first] * 4, [second, first] * 2, [first, second] * 2]
    own = settings | dict(enable_lora=True, max_loras=2, max_lora_rank=RANK)

    def answers(llm, requests):
        inputs = [{"prompt_token_ids": p} for p in chosen]
        # Ends at different steps: rows of the batch move.
        params = [greedy(30 + 11 * i, detokenize=False) for i in range(4)]
        return tokens(
            llm.generate(inputs, params, use_tqdm=False, lora_request=requests)
        )

    with running(**own | DENSE_ENGINE) as llm:
        expected = [answers(llm, requests) for requests in asked]
    for changes in ({"top_k": 1.0}, {"top_k": 0.3}, {"top_k": 1.0, "draft_above": 250}):
        with lossless(OPTIONS | changes, **own) as llm:
            for requests, wanted in [*zip(asked, expected), (asked[0], expected[0])]:
                drafts = Drafts(llm)
                assert answers(llm, requests) == wanted
                assert drafts.drafted > 0
                assert changes["top_k"] < 1 or drafts.accepted == drafts.drafted
    for texts in zip(*expected[:3], strict=True):
        assert texts[0] != texts[1]
    assert all(a != b for a, b in zip(*expected[2:], strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_engines_in_processes_of_their_own(
    settings, prompts, dense, ranks, monkeypatch
):
    # Threads that spin would take the cores from the other rank.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parallel = dict(kv_cache_memory_bytes=2**27)
    if ranks > 1:
        parallel |= dict(tensor_parallel_size=ranks, distributed_executor_backend="mp")
    with lossless(OPTIONS, in_process=False, **settings, **parallel) as llm:
        drafts = Drafts(llm)
        assert tokens(generate(llm, prompts, long())) == dense
        assert 0 < drafts.accepted < drafts.drafted
        assert tokens(generate(llm, prompts, long())) == dense
        # Ranks that drafted different tokens would part here.
        params = [
            SamplingParams(
                temperature=0.8,
                seed=i,
                max_tokens=40,
                ignore_eos=True,
                detokenize=False,
            )
            for i in range(len(prompts))
        ]
        once, again = (tokens(generate(llm, prompts, params)) for _ in range(2))
        assert once == again != tokens(generate(llm, prompts, greedy(40, **COLD)))
        # CPUs have no sleep mode: vLLM says so and goes on.
        llm.sleep()
        llm.wake_up()
        assert tokens(generate(llm, prompts, long())) == dense


def test_a_real_model_over_long_answers():
    """Prompts up to 2,000 tokens, answers of 512; drafts at an eighth are good."""
    prompts = [text(n, 1500 * i) for i, n in enumerate((1, 130, 900, 2000))]
    own = dict(max_model_len=2560, max_num_batched_tokens=512)
    params = greedy(512)
    with running(**DENSE_ENGINE | own) as llm:
        wanted = tokens(generate(llm, prompts, params))
    options = LOSSLESS | {"top_k": 0.125, "dense_below": 128}
    with lossless(options, worker_extension_cls=EXTENSION, **own) as llm:
        drafts = Drafts(llm)
        assert tokens(generate(llm, prompts, params)) == wanted
        assert drafts.rate > 0.9, drafts.rate
        drafts.reset()
        assert tokens(generate(llm, prompts[3:], greedy(96))) == [wanted[3][:96]]
        assert drafts.rate > 0.9, drafts.rate

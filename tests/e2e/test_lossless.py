# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A lossless engine answers as vLLM's dense backend does, token for token.

A real model in fp32, the likeliest token every time. vLLM's own backend answers every
request once; the lossless engine then has the same requests in every way that a
scheduler can serve them.
"""

import pytest

pytest.importorskip("vllm")

import torch  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.sampling_params import StructuredOutputsParams  # noqa: E402

from vllm_sparse.cache.layout import BLOCK_SIZE  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    HEAD_SIZE,
    add,
    few_free_blocks,
    generate,
    greedy,
    running,
    scheduled,
    step_until_done,
    tokens,
)
from .lossless import (  # noqa: E402
    DENSE_ENGINE,
    LOSSLESS,
    Drafts,
    lossless,
    runner,
    said,
    text,
    verifying_sparsely,
)

pytestmark = pytest.mark.engine
LENGTHS = [1, 5, 110, 113, 116, 127, 128, 129, 300, 700]
LONGEST = 1024
NEW = 24
SETTINGS = dict(max_num_seqs=16, max_model_len=LONGEST)
JSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "year": {"type": "integer"}},
    "required": ["name", "year"],
    "additionalProperties": False,
}


def requests() -> dict[str, tuple[list[int], dict]]:
    """Prompts and sampling parameters by name."""
    found = {f"{n} tokens": (text(n, 400 * i), {}) for i, n in enumerate(LENGTHS)}
    middle = found["300 tokens"][0]
    found["up to the longest"] = text(LONGEST - 18, 5000), {"max_tokens": 100}
    found["logprobs"] = middle, {"logprobs": 3}
    found["prompt logprobs"] = found["129 tokens"][0], {"prompt_logprobs": 1}
    found["presence"] = middle, {"presence_penalty": 1.5}
    found["frequency"] = middle, {"frequency_penalty": 1.2}
    found["repetition"] = middle, {"repetition_penalty": 1.4}
    found["bad words"] = middle, {"bad_words": ["the", ",", "is", "of the object"]}
    found["bias"] = middle, {"logit_bias": {260: -5.0, 282: 3.0, 28: -2.0}}
    found["allowed"] = middle, {"allowed_token_ids": list(range(200, 400))}
    for name, rule in {
        "regex": dict(regex=r"(yes|no|maybe)( (yes|no|maybe)){7}\."),
        "choice": dict(choice=["a tuple of values", "a tuple of variables"]),
        "json": dict(json=JSON),
    }.items():
        rules = StructuredOutputsParams(**rule)
        found[name] = middle, {"structured_outputs": rules, "ignore_eos": False}
    return found


def follow_ups(first: dict) -> dict[str, tuple[list[int], dict]]:
    """Requests that are made of dense answers."""
    found = {}
    for n in (5, 127, 300):
        output = first[f"{n} tokens"]
        answer = list(output.outputs[0].token_ids)
        found[f"turn after {n}"] = output.prompt_token_ids + answer + text(20, 50), {}
    (answer,) = first["300 tokens"].outputs
    # Wherever a cycle of drafts begins, one of these is inside.
    for i in range(6, 11):
        stop = {"stop_token_ids": [answer.token_ids[i]]}
        found[f"stop token {i}"] = first["300 tokens"].prompt_token_ids, stop
        string = answer.text[3 * i : 3 * i + 4]
        stop = {"stop": [string], "include_stop_str_in_output": i % 2 == 0}
        found[f"stop string {i}"] = first["300 tokens"].prompt_token_ids, stop
    stop = {"stop_token_ids": list(range(0, 49152, 2)), "min_tokens": 9}
    found["least"] = first["300 tokens"].prompt_token_ids, stop
    return found


def ask(llm, asked: dict, **options) -> dict:
    shared = dict(temperature=0, max_tokens=NEW, ignore_eos=True)
    params = [SamplingParams(**shared | own | options) for _, own in asked.values()]
    prompts = [prompt for prompt, _ in asked.values()]
    return dict(zip(asked, generate(llm, prompts, params), strict=True))


@pytest.fixture(scope="module")
def asked() -> dict[str, tuple[list[int], dict]]:
    return requests()


@pytest.fixture(scope="module")
def dense(asked) -> dict:
    """What vLLM's own backend says; adds to ``asked``."""
    with running(**DENSE_ENGINE | SETTINGS) as llm:
        first = ask(llm, asked)
        more = follow_ups(first)
        asked.update(more)
        return first | ask(llm, more)


@pytest.fixture(scope="module")
def llm(dense):
    """The shared engine; after the dense one is gone."""
    with lossless(**SETTINGS) as llm:
        yield llm


@pytest.fixture
def engine(llm):
    """With a clean cache and scheduler."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    limit = scheduler.max_num_scheduled_tokens
    assert llm.reset_prefix_cache()
    yield llm
    scheduler.max_num_scheduled_tokens = limit
    # Only after a failure is there anything left.
    llm.llm_engine.abort_request([*scheduled(llm)])
    step_until_done(llm)


@pytest.fixture(scope="module")
def answers(llm, asked) -> dict:
    """Of the shared engine, all requests of ``asked`` in one batch."""
    assert llm.reset_prefix_cache()
    return ask(llm, asked)


def assert_same(got: dict, dense: dict, names=None) -> None:
    for name in names or got:
        assert said([got[name]]) == said([dense[name]]), name


def plain(asked: dict) -> dict:
    """Those that differ in their prompts alone."""
    return {name: request for name, request in asked.items() if not request[1]}


def test_all_requests_in_one_batch(answers, dense):
    assert_same(answers, dense)
    reasons = {name: out.outputs[0].finish_reason for name, out in answers.items()}
    assert {reasons[name] for name in reasons if name.startswith("stop")} == {"stop"}
    (least,) = answers["least"].outputs
    assert least.finish_reason == "stop" and 9 < len(least.token_ids) < NEW
    assert len(answers["up to the longest"].outputs[0].token_ids) == 18
    whole = answers["300 tokens"].outputs[0].token_ids
    for name in (
        "presence",
        "frequency",
        "repetition",
        "bad words",
        "allowed",
        "regex",
    ):
        assert answers[name].outputs[0].token_ids != whole


def test_drafts_are_accepted_and_rejected(engine, asked, dense):
    drafts = Drafts(engine)
    alone = {"700 tokens": asked["700 tokens"]}
    assert_same(ask(engine, alone), dense)
    assert 0.6 * drafts.drafted < drafts.accepted < drafts.drafted
    # One forward answers several tokens.
    assert drafts.drafted < 4 * NEW / 2.5


def test_log_probabilities_are_dense(answers, dense):
    for name in ("logprobs", "prompt logprobs"):
        a, b = answers[name], dense[name]
        pairs = [(a.outputs[0].logprobs, b.outputs[0].logprobs)]
        pairs.append((a.prompt_logprobs, b.prompt_logprobs))
        steps = [s for x, y in pairs if x for s in zip(x, y, strict=True) if s[0]]
        assert len(steps) == (NEW if name == "logprobs" else 128)
        for ours, theirs in steps:
            assert list(ours) == list(theirs)
            for token, found in theirs.items():
                assert ours[token].logprob == pytest.approx(found.logprob, abs=1e-4)
                assert ours[token].rank == found.rank


@pytest.mark.parametrize("chunk", [37, 200])
def test_prompts_in_chunks(engine, asked, dense, chunk):
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    scheduler.max_num_scheduled_tokens = chunk
    names = [f"{n} tokens" for n in (1, 129, 300)] + ["json", "frequency"]
    got = ask(engine, {name: asked[name] for name in names}, **COLD)
    assert_same(got, dense)


def test_hits_in_the_prefix_cache(engine, asked, dense):
    names = [f"{n} tokens" for n in (127, 129, 300, 700)]
    for _ in range(2):
        got = ask(engine, {name: asked[name] for name in names})
        assert_same(got, dense)
    assert [got[name].num_cached_tokens for name in names] == [0, 128, 256, 640]


def test_turns_that_hit_blocks_which_drafts_filled(engine, asked, dense):
    """Drafts wrote to the blocks of an answer, and verification after them."""
    first = ask(engine, {"300 tokens": asked["300 tokens"]}, max_tokens=100)
    answer = tokens(first.values())[0]
    prompt = asked["300 tokens"][0] + answer + text(20, 50)
    params = greedy(NEW, logprobs=0)
    (hit,) = generate(engine, [prompt], params)
    assert hit.num_cached_tokens == 384 > 300
    (cold,) = generate(engine, [prompt], greedy(NEW, logprobs=0, **COLD))
    assert said([hit]) == said([cold])
    for a, b in zip(hit.outputs[0].logprobs, cold.outputs[0].logprobs, strict=True):
        (a,), (b,) = a.values(), b.values()
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_requests_that_come_one_after_the_other(engine, asked, dense):
    names = iter(plain(asked))
    steps = 0

    def another():
        nonlocal steps
        steps += 1
        if steps % 2 == 0 and (name := next(names, None)):
            add(engine, name, asked[name][0], greedy(NEW, **COLD))

    another(), another()
    finished = step_until_done(engine, another)
    assert finished == {
        name: list(dense[name].outputs[0].token_ids) for name in plain(asked)
    }


def test_preemption_between_drafts(engine, asked, dense):
    chosen = [f"{n} tokens" for n in (110, 113, 116)]  # 2 blocks each in the end
    preempted = set()

    def watch():
        preempted.update(n for n, r in scheduled(engine).items() if r.num_preemptions)

    with few_free_blocks(engine, 5):
        for name in chosen:
            add(engine, name, asked[name][0], greedy(NEW))
        finished = step_until_done(engine, watch)
    assert preempted
    assert finished == {n: list(dense[n].outputs[0].token_ids) for n in chosen}


def test_aborts_leave_the_others_alone(engine, asked, dense):
    pool = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    free = pool.block_pool.get_num_free_blocks()
    names = [f"{n} tokens" for n in (5, 128, 300, 129, 127)]
    for name in names:
        add(engine, name, asked[name][0], greedy(NEW, **COLD))
    steps = 0

    def abort_some():
        nonlocal steps
        steps += 1
        if steps in (3, 6):
            name = names[steps // 3]
            engine.llm_engine.abort_request([name])
            # Its blocks go to a newcomer.
            add(engine, f"again {name}", asked[name][0], greedy(NEW, **COLD))

    finished = step_until_done(engine, abort_some)
    finished = {n: ids for n, ids in finished.items() if len(ids) == NEW}
    assert len(finished) == 5
    for name, ids in finished.items():
        wanted = dense[name.removeprefix("again ")].outputs[0].token_ids
        assert ids == list(wanted), name
    assert pool.block_pool.get_num_free_blocks() == free


def keys_and_values(llm, prompt: list[int], part: slice) -> torch.Tensor:
    """[layers, heads, tokens, 2 D] of some tokens of a request while it runs."""
    add(llm, "kept", prompt, greedy(part.stop - len(prompt) + 20, **COLD))
    while True:
        llm.llm_engine.step()
        request = scheduled(llm)["kept"]
        if request.num_tokens > part.stop and request.num_output_tokens > 0:
            break
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    (blocks,) = manager.get_block_ids(request.request_id)
    layers = []
    for cache in runner(llm).kv_caches:
        # A chunk, of a block and head, begins with the rows of K and V.
        chunks = cache[blocks].flatten(2)[..., : BLOCK_SIZE * 2 * HEAD_SIZE]
        rows = chunks.unflatten(2, (BLOCK_SIZE, 2 * HEAD_SIZE)).transpose(0, 1)
        layers.append(rows.flatten(1, 2)[:, part].clone())
    llm.llm_engine.abort_request(["kept"])
    step_until_done(llm)
    return torch.stack(layers)


def test_keys_and_values_of_answers_are_dense_and_the_control_is_not(
    engine, asked, dense
):
    """Where verification is sparse, tokens differ, and so do K and V."""
    names = ["300 tokens", "700 tokens"]
    chosen = {name: asked[name] for name in names}
    prompt, answer = asked["700 tokens"][0], dense["700 tokens"].outputs[0].token_ids
    part = slice(len(prompt), len(prompt) + NEW - 4)
    got = keys_and_values(engine, prompt, part)
    # A prompt is dense in any case.
    wanted = keys_and_values(engine, prompt + list(answer[: NEW - 4]), part)
    torch.testing.assert_close(got, wanted, atol=5e-4, rtol=0)
    with verifying_sparsely(engine, LOSSLESS):
        wrong = keys_and_values(engine, prompt, part)
        texts = ask(engine, chosen, **COLD)
    assert (wrong - wanted).abs().amax((0, 1, 3)).median() > 0.1
    assert said(texts.values()) != said(dense[name] for name in names)
    assert_same(ask(engine, chosen, **COLD), dense)

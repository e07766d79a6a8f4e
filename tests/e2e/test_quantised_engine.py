# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Quantised blocks in vLLM's engine with a real model.

Tokens differ from the unquantised model's, so what is compared is the same cache filled
in different ways: whatever the scheduler does, every token sees the same codes.
"""

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from vllm import LLM  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    EXTENSION,
    NEW_TOKENS,
    NGRAM,
    SPARSE,
    add,
    configure,
    few_free_blocks,
    generate,
    greedy,
    running,
    scheduled,
    stats,
    step_until_done,
    tokens,
)

pytestmark = pytest.mark.engine
INT4 = {"kv_format": "int4"}
DENSE = {"selector": "dense"} | INT4
SPARSE = SPARSE | INT4
# Blocks that a request holds ahead of its tokens: fp32, head size 64.
AHEAD = 7


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with running(
        dtype="float32",
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": SPARSE},
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm, prompts):
    """What the options generate: all prompts together, nothing cached."""
    configure(llm, SPARSE)
    result = tokens(generate(llm, prompts, greedy(**COLD)))
    assert stats(llm)["sparse_rows"] > 0
    return result


@pytest.fixture
def engine(llm, expected):
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    limit = scheduler.max_num_scheduled_tokens
    configure(llm, SPARSE)
    assert llm.reset_prefix_cache()
    yield llm
    scheduler.max_num_scheduled_tokens = limit
    llm.llm_engine.abort_request([*scheduled(llm)])
    step_until_done(llm)


def test_prefix_cache_hits_do_not_change_the_tokens(engine, prompts, expected):
    first = generate(engine, prompts, greedy())
    second = generate(engine, prompts, greedy())
    assert tokens(first) == tokens(second) == expected
    hits = [output.num_cached_tokens for output in second]
    assert hits == [0, 0, 0, 128, 256, 384]


def test_a_hit_on_blocks_that_decoding_filled(engine, prompts):
    """Unlike with plain rows, a recomputed prompt gives the very same tokens, if the
    answer was decoded densely."""
    configure(engine, DENSE)
    (answer,) = tokens(generate(engine, [prompts[4]], greedy(86)))
    follow_up = prompts[4] + answer + prompts[0]
    hit = generate(engine, [follow_up], greedy())
    assert hit[0].num_cached_tokens == 384
    cold = generate(engine, [follow_up], greedy(**COLD))
    assert cold[0].num_cached_tokens == 0
    assert tokens(cold) == tokens(hit)


@pytest.mark.parametrize("chunk", [256, 100])
def test_chunked_prefill_does_not_change_the_tokens(engine, prompts, expected, chunk):
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    scheduler.max_num_scheduled_tokens = chunk
    assert tokens(generate(engine, prompts, greedy(**COLD))) == expected


def test_concurrency_does_not_change_the_tokens(engine, prompts, expected):
    for i in (0, 2, 5):
        alone = generate(engine, [prompts[i]], greedy(**COLD))
        assert tokens(alone) == [expected[i]]


def test_an_aborted_request_leaves_its_blocks_to_others(engine, prompts, expected):
    for i in (2, 4, 5):
        add(engine, f"r{i}", prompts[i])
    steps = 0

    def abort_one():
        nonlocal steps
        steps += 1
        if steps == 5:
            engine.llm_engine.abort_request(["r4"])
            add(engine, "r3", prompts[3])

    finished = step_until_done(engine, abort_one)
    finished.pop("r4", None)
    assert finished == {f"r{i}": expected[i] for i in (2, 3, 5)}


def test_preempted_requests_finish_with_the_same_tokens(engine, prompts):
    """What was decoded is prefilled again, densely: to the same tokens, if decoding was
    dense."""
    configure(engine, DENSE)
    chosen = [2, 1, 3]  # 2 blocks each once they decode, and those ahead
    alone = [tokens(generate(engine, [prompts[i]], greedy(**COLD)))[0] for i in chosen]
    preempted = set()

    def watch():
        preempted.update(n for n, r in scheduled(engine).items() if r.num_preemptions)

    with few_free_blocks(engine, 3 * AHEAD + 5):
        for i in chosen:
            add(engine, f"r{i}", prompts[i])
        finished = step_until_done(engine, watch)
    assert preempted
    assert finished == {f"r{i}": ids for i, ids in zip(chosen, alone)}


def test_blocks_ahead_are_given_back(engine, prompts):
    core = engine.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    generate(engine, prompts, greedy())
    assert pool.get_num_free_blocks() == free


def test_drafts_change_nothing(llm, prompts):
    chosen = [prompts[4][:150] * 2, prompts[3]]
    configure(llm, SPARSE)
    plain = tokens(generate(llm, chosen, greedy(**COLD)))
    with running(
        in_process=False,
        dtype="float32",
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": SPARSE},
        speculative_config=NGRAM,
    ) as drafting:
        assert tokens(generate(drafting, chosen, greedy())) == plain
        totals = stats(drafting)
    assert totals["decode_tokens"] > len(chosen) * (NEW_TOKENS - 1)


# Engines in this process end what the shared one needs: it is not used any more.


def test_a_batch_that_does_not_fit_in_bf16_runs_in_int4(prompts, monkeypatch):
    """The same memory: in vLLM's own cache requests wait for each other or are
    preempted, in ours all decode at once."""
    # It would replace the size that is asked for.
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    batch = [(prompts[5][20 * i :] + prompts[4] * 4)[:1200] for i in range(3)]
    memory = 40 * 2**20  # 1,800 tokens of bf16; the batch has 3,600
    together, preempted = {}, {}
    for name, options in {
        "bf16": dict(attention_backend="CPU_ATTN"),
        "int4": dict(attention_backend="sparq", additional_config={"sparse": DENSE}),
    }.items():
        with running(
            dtype="bfloat16",
            kv_cache_memory_bytes=memory,
            max_model_len=1280,
            enable_prefix_caching=False,
            **options,
        ) as llm:
            decoding, restarted = [0], set()

            def watch(llm=llm, decoding=decoding, restarted=restarted):
                requests = scheduled(llm)
                decoding.append(sum(r.num_output_tokens > 0 for r in requests.values()))
                restarted.update(n for n, r in requests.items() if r.num_preemptions)

            for i, prompt in enumerate(batch):
                add(llm, f"r{i}", prompt)
            finished = step_until_done(llm, watch)
            assert {len(ids) for ids in finished.values()} == {NEW_TOKENS}
            together[name], preempted[name] = max(decoding), len(restarted)
    assert together["int4"] == 3 > together["bf16"]
    assert preempted["int4"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_format": "int2"}, "one of auto, int8, int4, k4v8, k8v4"),
        ({"kv_group_size": 32}, "needs a quantised"),
        ({"kv_format": "int4", "kernels": "triton"}, "no Triton kernels"),
        ({"kv_format": "int4", "kv_group_size": 48}, r"one of \[16, 32, 64\]"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_at_start(options, message):
    with (
        pytest.raises(Exception, match=message),
        running(attention_backend="sparq", additional_config={"sparse": options}),
    ):
        pass

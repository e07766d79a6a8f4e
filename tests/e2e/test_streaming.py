# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sinks and a window, blocks given back, in vLLM's engine, against a masked forward."""

from functools import partial

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from vllm_sparse.stats import live_figures  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    EXTENSION,
    NGRAM,
    add,
    few_free_blocks,
    generate,
    greedy,
    running,
    scheduled,
    stats,
    step_until_done,
    tokens,
)
from .family_runs import alone, family, poison, together  # noqa: E402
from .masked import assert_answers, log_probabilities, sinks_and_window  # noqa: E402
from .tiny import random_prompts, save_llama  # noqa: E402

pytestmark = pytest.mark.engine
SINKS, WINDOW = 128, 256
LENGTHS = (700, 129, 1000, 400, 511, 512, 5)
ANSWERS = (150, 20, 40, 150, 10, 10, 30)
PROMPTS = random_prompts(*LENGTHS)
PARAMS = [greedy(n, logprobs=1, detokenize=False) for n in ANSWERS]
PREFILLS = ("exact", "streaming")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def streaming(folder, prefill: str, **options):
    settings = dict(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        attention_backend="streaming",
        additional_config={"sparse": {"local_window": WINDOW, "prefill": prefill}},
        worker_extension_cls=EXTENSION,
        kv_cache_memory_bytes=2**27,
        max_num_seqs=4,
    )
    return running(**settings | options)


def mask(prefill: str, prompt: int, length: int) -> torch.Tensor:
    return sinks_and_window(length, SINKS, WINDOW, prompt * (prefill == "exact"))


@pytest.fixture(scope="module", params=PREFILLS)
def engine(request, folder):
    """(LLM, what a masked forward says of its answers)."""
    prefill = request.param
    with streaming(folder, prefill) as llm:
        yield llm, partial(assert_answers, folder, mask_of=partial(mask, prefill))


def pool(llm):
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return scheduler.kv_cache_manager.block_pool


def test_answers_are_those_of_a_masked_forward(engine):
    """In company; from the prefix cache; a token at a time and in odd chunks."""
    llm, check = engine
    free = pool(llm).get_num_free_blocks()
    llm.collective_rpc("reset_sparse_stats")
    check(PROMPTS, generate(llm, PROMPTS, PARAMS))
    figures = stats(llm)
    assert 0 < figures["sparse_rows"] < figures["decode_rows"]
    if check.keywords["mask_of"].args == ("exact",):
        # Every position that decodes, in every layer and KV head: K and V in fp32.
        read = sum(
            int(mask("exact", n, n + count)[n:-1].sum())
            for n, count in zip(LENGTHS, ANSWERS, strict=True)
        )
        assert figures["kv_bytes_read"] == 3 * 2 * read * 2 * 64 * 4
    assert figures["kv_bytes_read"] < figures["kv_bytes_dense"]
    hits = generate(llm, PROMPTS, PARAMS)
    check(PROMPTS, hits)
    assert sum(output.num_cached_tokens for output in hits) > 1000
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    limit = scheduler.max_num_scheduled_tokens
    try:
        scheduler.max_num_scheduled_tokens = 100
        cold = [greedy(n, logprobs=1, detokenize=False, **COLD) for n in ANSWERS]
        check(PROMPTS, generate(llm, PROMPTS, cold))
    finally:
        scheduler.max_num_scheduled_tokens = limit
    assert pool(llm).get_num_free_blocks() == free


def test_dense_attention_would_be_noticed(folder):
    """The control: other masks say something else of the same texts."""
    text = PROMPTS[2]
    found = [
        log_probabilities(folder, text, mask("streaming", 0, len(text)))[-1],
        log_probabilities(folder, text, mask("exact", 2000, len(text)))[-1],
        log_probabilities(
            folder, text, sinks_and_window(len(text), SINKS, WINDOW + 128)
        )[-1],
    ]
    for other in found[1:]:
        assert (found[0] - other).abs().max() > 0.05


def test_follow_up_turns_find_what_is_left_of_a_streamed_prompt(folder):
    """Blocks between sinks and window are gone from the cache, and not missed."""
    with streaming(folder, "streaming", max_num_batched_tokens=256) as llm:
        (answer,) = tokens(generate(llm, PROMPTS[:1], PARAMS[0]))
        blocks = pool(llm)
        hashes = [b for b in blocks.blocks if b.block_hash is not None]
        turn = PROMPTS[0] + answer + PROMPTS[6]
        (output,) = generate(llm, [turn], PARAMS[1])
        assert output.num_cached_tokens == (700 + 149) // 128 * 128
        check = partial(assert_answers, folder, mask_of=partial(mask, "streaming"))
        check([turn], [output])
        # Without its middle blocks the prefix is as good.
        first = {b.block_id for b in hashes[2:3]}
        blocks.evict_blocks(first)
        (again,) = generate(llm, [turn], PARAMS[1])
        assert again.num_cached_tokens >= output.num_cached_tokens
        check([turn], [again])
        # Without its first one there is none.
        blocks.evict_blocks({hashes[0].block_id})
        (cold,) = generate(llm, [turn], PARAMS[1])
        assert cold.num_cached_tokens == 0
        check([turn], [cold])


@pytest.mark.parametrize(
    "prefill", ["exact", pytest.param("streaming", marks=pytest.mark.slow)]
)
def test_memory_stays_flat(folder, prefill):
    """A context of twice the cache's blocks; held blocks do not grow."""
    prompt, count = PROMPTS[3], 1500
    held, seen = [], []
    with streaming(folder, prefill, max_num_batched_tokens=256) as llm:
        blocks = pool(llm)
        with few_free_blocks(llm, 8):
            add(llm, "long", prompt, greedy(count, detokenize=False))

            def watch():
                held.append(blocks.get_num_free_blocks())
                if len(held) == count - 100:
                    seen.append(live_figures(llm))

            finished = step_until_done(llm, watch)
    assert len(finished["long"]) == count
    # Sinks, window, the block behind it, the current one.
    assert 8 - min(held[600:]) <= 1 + 2 + 1 + 1
    # The figures say so, too: three layers' K and V of two heads in fp32.
    figures, block = seen[0], 3 * 2 * 128 * 2 * 64 * 4
    assert figures.requests_holding == 1
    assert figures.kv_bytes_held == figures.kv_bytes_held_most
    assert figures.kv_bytes_held == block * (8 - held[count - 101])
    computed = len(prompt) + count - 100
    assert figures.blocks_given_back in (computed // 128 - 4, computed // 128 - 5)


def test_a_long_prompt_runs_in_the_memory_of_a_short_one(folder):
    prompt = random_prompts(1900)
    engine = streaming(folder, "streaming", max_num_batched_tokens=256)
    with engine as llm, few_free_blocks(llm, 9):
        outputs = generate(llm, prompt, PARAMS[1])
    assert_answers(folder, prompt, outputs, partial(mask, "streaming"))


def test_preempted_requests_give_the_same_answers(folder):
    """Where all positions follow one rule, recomputing changes nothing."""
    chosen = {"a": 0, "b": 3, "c": 2}
    preempted = set()
    params = greedy(140, detokenize=False, **COLD)
    with streaming(folder, "streaming", max_num_batched_tokens=256) as llm:
        expected = tokens(generate(llm, [PROMPTS[i] for i in chosen.values()], params))

        def watch():
            found = scheduled(llm).items()
            preempted.update(n for n, r in found if r.num_preemptions)

        with few_free_blocks(llm, 9):
            for name, i in chosen.items():
                add(llm, name, PROMPTS[i], params)
            finished = step_until_done(llm, watch)
    assert preempted
    assert [finished[name] for name in chosen] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_window": 100}, "local_window = 100 must be a multiple of 128"),
        ({"kv_format": "int8"}, "kv_format = 'int8' does nothing"),
    ],
)
def test_options_without_a_meaning_are_refused(folder, options, message):
    with (
        pytest.raises(Exception, match=message),
        streaming(folder, "exact", additional_config={"sparse": options}),
    ):
        pass


def test_follow_up_turns_beside_windows():
    """vLLM cuts what the prefix cache has of a turn to what all kinds of layers have:
    no block that is needed is missing of it. Poisoned, so that one would be NaN."""
    options = dict(prefill="streaming", local_window=128)
    params = greedy(300, detokenize=False)
    with family("Gemma 3", options, attention_backend="streaming") as llm:
        poison(llm)
        (answer,) = tokens(generate(llm, PROMPTS[:1], params))
        turn = [(PROMPTS[0] + answer + PROMPTS[6])[:1000]]
        short = greedy(20, detokenize=False, **COLD)
        expected = tokens(generate(llm, turn, short))
        found = generate(llm, turn, greedy(20, detokenize=False))
    assert tokens(found) == expected


def test_prompts_are_whole_whatever_the_cache_retains(folder):
    with streaming(
        folder,
        "exact",
        prefix_cache_retention_interval=None,
        max_num_batched_tokens=256,
    ) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.max_num_scheduled_tokens = 100
        outputs = generate(llm, PROMPTS[:3], PARAMS[:3])
    assert_answers(folder, PROMPTS[:3], outputs, partial(mask, "exact"))


def test_a_running_engine_keeps_what_it_keeps(engine):
    llm, _ = engine
    for changes in ({"local_window": 512}, {"prefill": "none"}, {"selector": "sparq"}):
        options = {"local_window": WINDOW} | changes
        with pytest.raises(Exception, match="cannot replace|not allowed|multiple"):
            llm.collective_rpc("reconfigure_sparse", args=(options,))


@pytest.mark.slow
@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("name", ["Gemma 3", "Falcon-H1", "Gemma 3n", "Qwen3-MoE"])
def test_beside_windows_states_and_shared_caches(name, prefill):
    """A window as long as the context gives stock vLLM's tokens; a short one the same
    alone, in company and from the cache."""
    with family(name, None) as llm:
        expected = alone(llm, name)
    options = dict(prefill=prefill, local_window=1024)
    backend = dict(attention_backend="streaming")
    with family(name, options, **backend) as llm:
        poison(llm)
        assert together(llm, name) == expected
    with family(name, options | {"local_window": 128}, **backend) as llm:
        poison(llm)
        expected = alone(llm, name)
        assert stats(llm)["sparse_rows"] > 0
        for _ in range(2):
            assert together(llm, name) == expected


def test_layers_with_chunks_are_refused():
    message = "gives blocks of full attention back, and this layer's are Chunked"
    with (
        pytest.raises(Exception, match=message),
        family("Llama 4", {"prefill": "exact"}, attention_backend="streaming"),
    ):
        pass


@pytest.mark.slow
def test_drafts_change_nothing(folder):
    """vLLM starts no engine in a process that has drafted by ngram: in another."""
    prompts = [PROMPTS[3][:150] * 3, PROMPTS[0]]
    params = greedy(60, logprobs=1, detokenize=False)
    with streaming(
        folder, "streaming", in_process=False, speculative_config=NGRAM
    ) as llm:
        outputs = generate(llm, prompts, params)
    assert_answers(folder, prompts, outputs, partial(mask, "streaming"))

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A real model in vLLM's engine: exactness, scheduling, statistics.

One fp32 engine in this process serves most tests; its options are switched between
requests, and its scheduler is at hand. Tokens are compared exactly.
"""

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402

from vllm_sparse.config import default_rank  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    DENSE,
    EXTENSION,
    HEAD_SIZE,
    KV_HEADS,
    NEW_TOKENS,
    NGRAM,
    NUM_LAYERS,
    PROMPT_LENGTHS,
    SPARSE,
    add,
    assert_a_killed_worker_ends_the_engine,
    configure,
    differences,
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


@pytest.fixture(scope="module")
def dense(prompts):
    """What vLLM's own backend generates in fp32."""
    with running(dtype="float32", attention_backend="CPU_ATTN") as llm:
        return generate(llm, prompts, greedy(logprobs=0))


@pytest.fixture(scope="module")
def dense_tokens(dense):
    return tokens(dense)


@pytest.fixture(scope="module")
def llm(dense_tokens):
    """The shared engine; after the one of dense_tokens is gone."""
    with running(
        dtype="float32",
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": SPARSE},
    ) as llm:
        yield llm


@pytest.fixture
def sparse(llm):
    """The shared engine with sparse options, clean caches and scheduler."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    limit = scheduler.max_num_scheduled_tokens
    configure(llm, SPARSE)
    assert llm.reset_prefix_cache()
    yield llm
    scheduler.max_num_scheduled_tokens = limit
    # Only after a failure is there anything left.
    llm.llm_engine.abort_request([*scheduled(llm)])
    step_until_done(llm)


@pytest.fixture(scope="module")
def sparse_tokens(llm, prompts):
    """What the sparse settings generate, all prompts together, nothing cached."""
    configure(llm, SPARSE)
    result = tokens(generate(llm, prompts, greedy(**COLD)))
    assert stats(llm)["sparse_rows"] > 0
    return result


def test_budget_covering_the_context_gives_exactly_vllms_tokens(
    llm, prompts, dense_tokens
):
    configure(llm, DENSE)
    assert tokens(generate(llm, prompts, greedy())) == dense_tokens
    totals = stats(llm)
    assert totals["sparse_rows"] == 0
    assert totals["kv_bytes_read"] == totals["kv_bytes_dense"] > 0
    assert totals["decode_tokens"] == len(prompts) * (NEW_TOKENS - 1)


def test_sparse_tokens_are_near_the_dense_ones_but_not_the_same(
    sparse_tokens, dense_tokens
):
    assert sparse_tokens != dense_tokens
    # Contexts below dense_below never differ; the first token is always dense.
    assert sparse_tokens[0] == dense_tokens[0]
    assert [t[0] for t in sparse_tokens] == [t[0] for t in dense_tokens]


def test_prefix_cache_hits_do_not_change_the_tokens(sparse, prompts, sparse_tokens):
    first = generate(sparse, prompts, greedy())
    second = generate(sparse, prompts, greedy())
    assert tokens(first) == tokens(second) == sparse_tokens
    # Whole blocks hit, and a prompt's last token is always computed: the prompts of
    # 129 and of 257 or more compute a tail of one and of more tokens.
    hits = [output.num_cached_tokens for output in second]
    assert hits == [0, 0, 0, 128, 256, 384]
    assert [output.num_cached_tokens for output in first] == [0] * 6


def test_a_hit_on_blocks_that_decoding_filled(sparse, prompts):
    """A follow-up prompt contains an earlier answer, whose blocks it reuses."""
    (answer,) = tokens(generate(sparse, [prompts[4]], greedy(86)))
    follow_up = prompts[4] + answer + prompts[0]
    hit = generate(sparse, [follow_up], greedy())
    assert hit[0].num_cached_tokens == 384
    # The blocks hold what decoding computed, so a recomputed prompt may differ; the
    # same hit may not.
    assert tokens(generate(sparse, [follow_up], greedy())) == tokens(hit)


@pytest.mark.parametrize("chunk", [256, 100])
def test_chunked_prefill_does_not_change_the_tokens(
    sparse, prompts, sparse_tokens, chunk
):
    scheduler = sparse.llm_engine.engine_core.engine_core.scheduler
    scheduler.max_num_scheduled_tokens = chunk
    assert tokens(generate(sparse, prompts, greedy(**COLD))) == sparse_tokens


def test_concurrency_does_not_change_the_tokens(sparse, prompts, sparse_tokens):
    for i in (0, 2, 5):
        alone = generate(sparse, [prompts[i]], greedy(**COLD))
        assert tokens(alone) == [sparse_tokens[i]]
    backwards = generate(sparse, prompts[4:1:-1], greedy(**COLD))
    assert tokens(backwards) == sparse_tokens[4:1:-1]


def test_several_samples_of_a_prompt_equal_the_same_seeds_alone(sparse, prompts):
    def sampled(seed, n=1):
        return SamplingParams(
            temperature=0.8, seed=seed, n=n, max_tokens=12, ignore_eos=True
        )

    prompt = prompts[4]
    (output,) = generate(sparse, [prompt], sampled(seed=100, n=3))
    together = [list(o.token_ids) for o in output.outputs]
    alone = [tokens(generate(sparse, [prompt], sampled(100 + i)))[0] for i in range(3)]
    assert together == alone
    assert together[0] != together[1]


def test_aborting_a_request_does_not_disturb_the_others(sparse, prompts, sparse_tokens):
    for i in (2, 4, 5):
        add(sparse, f"r{i}", prompts[i])
    steps = 0

    def abort_one():
        nonlocal steps
        steps += 1
        if steps == 5:
            sparse.llm_engine.abort_request(["r4"])
            # Its blocks go to a newcomer.
            add(sparse, "r3", prompts[3])

    finished = step_until_done(sparse, abort_one)
    finished.pop("r4", None)
    assert finished == {f"r{i}": sparse_tokens[i] for i in (2, 3, 5)}


def test_decode_rows_stay_sparse_beside_prefill_chunks(sparse, prompts, sparse_tokens):
    scheduler = sparse.llm_engine.engine_core.engine_core.scheduler
    scheduler.max_num_scheduled_tokens = 130
    add(sparse, "decoding", prompts[4])
    while not stats(sparse)["decode_tokens"]:
        sparse.llm_engine.step()
    add(sparse, "prefilling", prompts[5])
    mixed = 0
    finished = {}
    while "prefilling" not in finished:
        sparse.collective_rpc("reset_sparse_stats")
        before = scheduled(sparse)["prefilling"].num_computed_tokens
        for output in sparse.llm_engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        totals = stats(sparse)
        if before < PROMPT_LENGTHS[5]:
            mixed += 1
            assert totals["decode_tokens"] == 1
            assert totals["sparse_rows"] == NUM_LAYERS
        assert totals["sparse_rows"] == totals["decode_tokens"] * NUM_LAYERS
    assert mixed == 4  # 450 tokens, 129 a step beside one decode row
    assert finished == {"decoding": sparse_tokens[4], "prefilling": sparse_tokens[5]}


@pytest.mark.parametrize("options", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_preempted_requests_finish(sparse, prompts, dense_tokens, options):
    """Requests that do not fit together: the later ones start again from the prompt.

    What was decoded before a preemption is then recomputed by dense prefill, so that
    only dense decoding must yield the very same tokens.
    """
    configure(sparse, options)
    chosen = [2, 1, 3]  # 128, 127 and 129 tokens: 2 blocks each once they decode
    preempted = set()

    def watch():
        preempted.update(n for n, r in scheduled(sparse).items() if r.num_preemptions)

    with few_free_blocks(sparse, 5):
        for i in chosen:
            add(sparse, f"r{i}", prompts[i])
        finished = step_until_done(sparse, watch)
    assert preempted
    assert {name: len(ids) for name, ids in finished.items()} == dict.fromkeys(
        finished, NEW_TOKENS
    )
    dense = {f"r{i}": dense_tokens[i] for i in chosen}
    if options is DENSE:
        assert finished == dense
    else:
        assert stats(sparse)["sparse_rows"] > 0
        # The first token comes from dense prefill, preempted or not.
        assert [finished[n][0] for n in dense] == [ids[0] for ids in dense.values()]


def test_statistics_equal_an_independent_computation(sparse, prompts):
    """Every decode row, layer and KV head counted by hand."""
    new = 9
    generate(sparse, prompts, greedy(new))
    row_bytes = 2 * HEAD_SIZE * 4  # K and V in fp32
    channel_bytes = 128 // 2 + 2 * 2  # codes of 128 tokens, scale and minimum
    rank = default_rank(HEAD_SIZE)
    rows = sparse_rows = read = dense = 0
    for length in PROMPT_LENGTHS:
        for context in range(length + 1, length + new):
            rows += 1
            dense += context * row_bytes
            forced = 4 + max(16, context % 128)
            kept = max(-(-context * 2 // 10), forced)
            if context < 64 or context < 128 or kept >= context:
                read += context * row_bytes
                continue
            sparse_rows += 1
            read += kept * row_bytes + context // 128 * rank * channel_bytes
    assert stats(sparse) == {
        "decode_tokens": rows,
        "decode_rows": rows * NUM_LAYERS,
        "sparse_rows": sparse_rows * NUM_LAYERS,
        "kv_bytes_read": read * NUM_LAYERS * KV_HEADS,
        "kv_bytes_dense": dense * NUM_LAYERS * KV_HEADS,
    }


@pytest.mark.parametrize("selector", ["exact", "quest", "window"])
def test_comparison_selectors(sparse, prompts, dense_tokens, selector):
    configure(sparse, SPARSE | {"selector": selector})
    outputs = tokens(generate(sparse, prompts[4:], greedy(8)))
    assert [ids[0] for ids in outputs] == [ids[0] for ids in dense_tokens[4:]]
    totals = stats(sparse)
    assert totals["sparse_rows"] == 2 * 7 * NUM_LAYERS
    assert totals["kv_bytes_read"] < 0.7 * totals["kv_bytes_dense"]


ADAPTIVE = {"top_p": 0.8, "min_tokens": 40, "dense_below": 64}


def test_adaptive_budgets_that_keep_all_the_mass_give_dense_tokens(
    sparse, prompts, dense_tokens
):
    configure(sparse, ADAPTIVE | {"top_p": 0.99999, "rank": HEAD_SIZE})
    assert tokens(generate(sparse, prompts, greedy(**COLD))) == dense_tokens
    totals = stats(sparse)
    assert totals["sparse_rows"] > 2 * NEW_TOKENS * NUM_LAYERS
    assert totals["kv_bytes_read"] < 1.3 * totals["kv_bytes_dense"]


def test_adaptive_budgets_do_not_depend_on_company_or_cache(sparse, prompts):
    configure(sparse, ADAPTIVE)
    together = tokens(generate(sparse, prompts, greedy(**COLD)))
    totals = stats(sparse)
    assert totals["kv_bytes_read"] < 0.7 * totals["kv_bytes_dense"]
    for i in (2, 5):
        assert tokens(generate(sparse, [prompts[i]], greedy(**COLD))) == [together[i]]
    assert sparse.reset_prefix_cache()
    for _ in range(2):
        assert tokens(generate(sparse, prompts, greedy())) == together


def test_the_report_of_kept_tokens_is_what_was_read(sparse, prompts):
    configure(sparse, ADAPTIVE)
    generate(sparse, prompts[4:], greedy(8, **COLD))
    (report,) = sparse.collective_rpc("sparse_kept_tokens")
    assert len(report) == NUM_LAYERS
    heads = [head for layer in report.values() for head in layer]
    assert {head["rows"] for head in heads} == {2 * 7}
    assert min(h["mean"] for h in heads) < 0.4 * max(h["mean"] for h in heads)
    kept = sum(head["rows"] * head["mean"] for head in heads)
    codes = KV_HEADS * NUM_LAYERS * default_rank(HEAD_SIZE) * (128 // 2 + 2 * 2)
    blocks = 7 * sum(len(prompt) // 128 for prompt in prompts[4:])
    read = kept * 2 * HEAD_SIZE * 4 + blocks * codes
    assert stats(sparse)["kv_bytes_read"] == pytest.approx(read, rel=1e-9)


def test_dense_layers_are_served_densely(sparse, prompts):
    configure(sparse, SPARSE | {"dense_layers": 28})
    generate(sparse, prompts[4:], greedy(8))
    totals = stats(sparse)
    assert totals["sparse_rows"] == 2 * 7 * 2
    assert totals["decode_rows"] == 2 * 7 * NUM_LAYERS


def test_reconfiguring_with_a_bad_option_names_it_and_changes_nothing(
    sparse, prompts, sparse_tokens
):
    for bad in ({"topk": 1}, {"rank": 65}):
        with pytest.raises(Exception, match=next(iter(bad))):
            sparse.collective_rpc("reconfigure_sparse", args=(bad,))
    assert tokens(generate(sparse, prompts[4:5], greedy())) == sparse_tokens[4:5]


def test_drafted_tokens_are_verified_by_sparse_rows(llm, prompts):
    """N-gram drafts change the speed, not the tokens."""
    # Text that repeats itself is drafted well.
    chosen = [prompts[4][:150] * 2, prompts[3]]
    configure(llm, SPARSE)
    expected = tokens(generate(llm, chosen, greedy(**COLD)))
    configure(llm, {"selector": "dense"})
    dense = tokens(generate(llm, chosen, greedy(**COLD)))
    # In a process of its own: ngram drafting imports numba, and vLLM 0.32's
    # _rebind_kernels, which walks all modules at each start, fails on llvmlite's.
    with running(
        in_process=False,
        dtype="float32",
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": SPARSE},
        speculative_config=NGRAM,
    ) as drafting:
        assert tokens(generate(drafting, chosen, greedy())) == expected
        totals = stats(drafting)
        # Where everything is dense, all drafts of a request are one call.
        configure(drafting, {"selector": "dense"})
        assert tokens(generate(drafting, chosen, greedy(**COLD))) == dense
        read = stats(drafting)
    assert read["decode_tokens"] > len(chosen) * (NEW_TOKENS - 1)
    assert read["kv_bytes_read"] == read["kv_bytes_dense"]
    # More positions were decoded than tokens came out: drafts were among them.
    assert totals["decode_tokens"] > len(chosen) * (NEW_TOKENS - 1)
    assert totals["sparse_rows"] == totals["decode_rows"]


def test_bf16_logprobs_in_the_default_multiprocess_engine(prompts, dense):
    """Dense decoding in bf16 is as near to fp32 as vLLM's backend is.

    At last the worker is killed: starting such an engine again takes half a minute.
    """
    params = greedy(logprobs=0)
    with running(dtype="bfloat16", attention_backend="CPU_ATTN") as llm:
        theirs = differences(generate(llm, prompts, params), dense)
    with running(
        in_process=False,
        dtype="bfloat16",
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": DENSE},
    ) as llm:
        ours = differences(generate(llm, prompts, params), dense)
        assert stats(llm)["decode_tokens"] == len(prompts) * (NEW_TOKENS - 1)
        configure(llm, SPARSE)
        generate(llm, prompts[4:], greedy(4))
        assert stats(llm)["sparse_rows"] == 2 * 3 * NUM_LAYERS
        assert_a_killed_worker_ends_the_engine(llm, prompts[4])
    # Ties may part the texts; beyond that, contexts differ.
    assert len(ours) > 0.6 * len(prompts) * NEW_TOKENS
    assert max(ours) < 0.3
    # Both round to bf16 (8 bits) in every layer, in another order.
    assert sum(ours) / len(ours) < 1.3 * sum(theirs) / len(theirs)

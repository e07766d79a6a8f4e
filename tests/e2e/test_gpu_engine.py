# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A real model in vLLM's engine on a GPU, FULL CUDA graphs, default model runner.

16-bit engines round differently from batch to batch (vLLM's own backends, too), so
texts may part where two tokens are nearly equal, and only there.
"""

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    EXTENSION,
    NGRAM,
    NUM_LAYERS,
    SPARSE,
    assert_same_but_for_ties,
    configure,
    generate,
    running,
    stats,
    tokens,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Graphs hold every other option.
DENSE = SPARSE | {"top_k": 1.0, "dense_below": 0}
LENGTHS = [5, 127, 128, 129, 300, 450, 1500, 3000]
NEW_TOKENS = 24
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
SETTINGS = dict(
    dtype="bfloat16",
    max_model_len=4096,
    max_num_batched_tokens=4096,
    max_num_seqs=64,
    kv_cache_memory_bytes=4 * 2**30,
    enforce_eager=False,
    compilation_config=GRAPHS,
)


def ours(**changes):
    options = dict(
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": SPARSE},
    )
    return running(**SETTINGS | options | changes)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """English text as token ids, every prompt from another place."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    from scripts.get_model import get_model

    text = "\n".join(topics[name] for name in sorted(topics))[:120_000]
    ids = AutoTokenizer.from_pretrained(get_model()).encode(text)
    starts = range(0, len(ids), 2500)
    return [ids[s : s + n] for s, n in zip(starts, LENGTHS, strict=False)]


def greedy(**options):
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=4, **options
    )


@pytest.fixture(scope="module")
def dense(prompts):
    """What FlashAttention generates."""
    with running(**SETTINGS, attention_backend="FLASH_ATTN") as llm:
        return generate(llm, prompts, greedy())


@pytest.fixture(scope="module")
def llm(dense):
    with ours() as llm:
        yield llm


@pytest.fixture(scope="module")
def sparse(llm, prompts):
    """What the sparse settings generate, all prompts together, nothing cached."""
    configure(llm, SPARSE)
    outputs = generate(llm, prompts, greedy(**COLD))
    totals = stats(llm)
    assert totals["decode_tokens"] == len(prompts) * (NEW_TOKENS - 1)
    assert totals["sparse_rows"] > 4 * (NEW_TOKENS - 1) * NUM_LAYERS
    assert totals["kv_bytes_read"] < 0.5 * totals["kv_bytes_dense"]
    return outputs


def test_the_default_model_runner_holds_full_graphs(llm):
    worker = llm.llm_engine.model_executor.driver_worker.worker
    runner = worker.model_runner
    assert "worker.gpu.model_runner" in type(runner).__module__
    assert runner.compilation_config.cudagraph_mode.has_full_cudagraphs()


def test_budget_covering_the_context_gives_flash_attentions_tokens(llm, prompts, dense):
    configure(llm, DENSE)
    assert_same_but_for_ties(generate(llm, prompts, greedy(**COLD)), dense)
    totals = stats(llm)
    assert totals["sparse_rows"] == 0
    assert totals["kv_bytes_read"] == totals["kv_bytes_dense"] > 0


def test_the_same_batch_gives_the_same_tokens_again(llm, prompts, sparse):
    configure(llm, SPARSE)
    again = generate(llm, prompts, greedy(**COLD))
    assert tokens(again) == tokens(sparse)


def test_prefix_cache_hits_do_not_change_the_tokens(llm, prompts, sparse):
    configure(llm, SPARSE)
    assert llm.reset_prefix_cache()
    first = generate(llm, prompts, greedy())
    second = generate(llm, prompts, greedy())
    assert [o.num_cached_tokens for o in second][3:6] == [128, 256, 384]
    assert_same_but_for_ties(first, sparse)
    assert_same_but_for_ties(second, sparse)


def test_concurrency_does_not_change_the_tokens(llm, prompts, sparse):
    configure(llm, SPARSE)
    for i in (3, 5, 7):
        assert_same_but_for_ties(
            generate(llm, [prompts[i]], greedy(**COLD)), sparse[i : i + 1]
        )
    many = generate(llm, prompts * 8, greedy(**COLD))
    assert_same_but_for_ties(many, sparse * 8)


def test_decode_rows_stay_sparse_beside_prefill_chunks(llm, prompts, sparse):
    configure(llm, SPARSE)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    limit, scheduler.max_num_scheduled_tokens = (
        scheduler.max_num_scheduled_tokens,
        300,
    )
    try:
        assert_same_but_for_ties(generate(llm, prompts, greedy(**COLD)), sparse)
    finally:
        scheduler.max_num_scheduled_tokens = limit


def test_preempted_requests_finish(llm, prompts, dense):
    configure(llm, DENSE)
    assert llm.reset_prefix_cache()
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 5)
    try:
        chosen = [2, 1, 3]  # 2 blocks each once they decode
        outputs = generate(llm, [prompts[i] for i in chosen], greedy(**COLD))
    finally:
        pool.free_blocks(taken)
    assert_same_but_for_ties(outputs, [dense[i] for i in chosen])


@pytest.fixture(scope="module")
def repeating(llm, prompts):
    """Prompts that are drafted well, and their outputs without drafts."""
    chosen = [prompts[4][:150] * 2, prompts[6][:700] * 2]
    configure(llm, SPARSE)
    return chosen, generate(llm, chosen, greedy(**COLD))


# The engines from here on end what the shared one needs: it is not used any more.


def test_drafted_tokens_are_verified_by_sparse_rows(repeating):
    chosen, expected = repeating
    with ours(
        speculative_config=NGRAM,
    ) as drafting:
        assert_same_but_for_ties(generate(drafting, chosen, greedy()), expected)
        totals = stats(drafting)
    assert totals["decode_tokens"] > len(chosen) * (NEW_TOKENS - 1)
    assert totals["sparse_rows"] == totals["decode_rows"]


def test_graphs_off_gives_the_same_tokens(prompts, sparse, repeating):
    with ours(enforce_eager=True, compilation_config={"mode": 0}) as llm:
        got = generate(llm, prompts, greedy(**COLD))
        totals = stats(llm)
    assert tokens(got) == tokens(sparse)
    assert totals["sparse_rows"] > 0


def test_a_slept_engine_wakes_with_its_counts_and_graphs(prompts, sparse):
    from vllm_sparse.stats import live_figures

    # A process of its own: its memory pools end with it.
    options = dict(in_process=False, gpu_memory_utilization=0.5)
    with ours(enable_sleep_mode=True, **options) as sleeper:
        first = tokens(generate(sleeper, prompts, greedy(**COLD)))
        assert first == tokens(sparse)
        before = live_figures(sleeper)
        for times in (2, 3):
            sleeper.sleep(level=1)
            with pytest.raises(RuntimeError, match="wake it up"):
                live_figures(sleeper)
            sleeper.wake_up()
            again = generate(sleeper, prompts, greedy(**COLD))
            assert tokens(again) == first
            after = live_figures(sleeper)
            assert after.decode_rows == times * before.decode_rows > 0
            assert after.kept[-1] == times * before.kept[-1] > 0


ADAPTIVE = {"top_p": 0.9, "rank": 24, "min_tokens": 64, "dense_below": 0}


def adaptive(**changes):
    options = dict(attention_backend="twilight")
    sparse = ADAPTIVE | changes.pop("sparse", {})
    return ours(**options, additional_config={"sparse": sparse}, **changes)


def test_adaptive_budgets_that_keep_nearly_all_mass_give_dense_tokens(prompts, dense):
    with adaptive(sparse={"top_p": 0.9999, "rank": 64}) as llm:
        got = generate(llm, prompts, greedy(**COLD))
        totals = stats(llm)
    assert_same_but_for_ties(got, dense)
    assert totals["sparse_rows"] > 4 * (NEW_TOKENS - 1) * NUM_LAYERS
    assert totals["kv_bytes_read"] < totals["kv_bytes_dense"]


def test_adaptive_budgets_with_graphs_and_without(prompts):
    results = []
    eager = dict(enforce_eager=True, compilation_config={"mode": 0})
    for changes in ({}, eager):
        with adaptive(**changes) as llm:
            llm.collective_rpc("reset_sparse_stats")
            outputs = generate(llm, prompts, greedy(**COLD))
            report = llm.collective_rpc("sparse_kept_tokens")[0]
            results.append((tokens(outputs), stats(llm), report))
    assert results[0] == results[1]
    assert len(report) == NUM_LAYERS
    kept = [head["mean"] for layer in report.values() for head in layer]
    assert min(kept) < 0.2 * max(kept)  # heads differ, so do their budgets

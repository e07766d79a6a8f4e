# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Quantised blocks in vLLM's engine on a GPU, with FULL CUDA graphs.

Rounding that differs between batches moves codes by whole steps: texts part at gaps
twice as large as with plain rows.
"""

from functools import partial

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from .test_gpu_engine import (  # noqa: E402
    COLD,
    LENGTHS,
    NEW_TOKENS,
    NGRAM,
    NUM_LAYERS,
    SETTINGS,
    SPARSE,
    configure,
    generate,
    greedy,
    ours,
    prompts,  # noqa: F401  (a fixture)
    running,
    stats,
    tokens,
)
from .test_gpu_engine import (
    assert_same_but_for_ties as assert_same,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
INT4 = SPARSE | {"kv_format": "int4"}
same = partial(assert_same, gap=0.4)


@pytest.fixture(scope="module")
def dense(prompts):  # noqa: F811
    with running(**SETTINGS, attention_backend="FLASH_ATTN") as llm:
        return generate(llm, prompts, greedy())


def test_int8_gives_flash_attentions_tokens(prompts, dense):  # noqa: F811
    options = {"kv_format": "int8", "selector": "dense"}
    with ours(additional_config={"sparse": options}) as llm:
        llm.collective_rpc("reset_sparse_stats")
        got = generate(llm, prompts, greedy())
        totals = stats(llm)
    same(got, dense)
    assert totals["sparse_rows"] == 0
    assert 0.5 < totals["kv_bytes_read"] / totals["kv_bytes_dense"] < 0.7


@pytest.fixture(scope="module")
def llm(dense):
    with ours(additional_config={"sparse": INT4}) as llm:
        yield llm


@pytest.fixture(scope="module")
def sparse(llm, prompts):  # noqa: F811
    configure(llm, INT4)
    outputs = generate(llm, prompts, greedy(**COLD))
    totals = stats(llm)
    assert totals["decode_tokens"] == len(prompts) * (NEW_TOKENS - 1)
    assert totals["sparse_rows"] > 4 * (NEW_TOKENS - 1) * NUM_LAYERS
    return outputs


def test_the_same_batch_gives_the_same_tokens_again(llm, prompts, sparse):  # noqa: F811
    assert tokens(generate(llm, prompts, greedy(**COLD))) == tokens(sparse)


def test_prefix_cache_hits_do_not_change_the_tokens(llm, prompts, sparse):  # noqa: F811
    assert llm.reset_prefix_cache()
    first = generate(llm, prompts, greedy())
    second = generate(llm, prompts, greedy())
    assert [o.num_cached_tokens for o in second][3:6] == [128, 256, 384]
    same(first, sparse)
    same(second, sparse)


def test_concurrency_does_not_change_the_tokens(llm, prompts, sparse):  # noqa: F811
    for i in (3, 5, 7):
        alone = generate(llm, [prompts[i]], greedy(**COLD))
        same(alone, sparse[i : i + 1])
    many = generate(llm, prompts * 8, greedy(**COLD))
    same(many, sparse * 8)


def test_chunks_of_prompts_beside_decoding(llm, prompts, sparse):  # noqa: F811
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    limit, scheduler.max_num_scheduled_tokens = scheduler.max_num_scheduled_tokens, 300
    try:
        got = generate(llm, prompts, greedy(**COLD))
    finally:
        scheduler.max_num_scheduled_tokens = limit
    same(got, sparse)


def test_blocks_ahead_are_given_back(llm, prompts):  # noqa: F811
    core = llm.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    generate(llm, prompts, greedy())
    assert pool.get_num_free_blocks() == free


@pytest.fixture(scope="module")
def repeating(llm, prompts):  # noqa: F811
    chosen = [prompts[4][:150] * 2, prompts[6][:700] * 2]
    return chosen, generate(llm, chosen, greedy(**COLD))


# The engines from here on end what the shared one needs: it is not used any more.


def test_drafts_change_nothing(repeating):
    chosen, expected = repeating
    with ours(
        additional_config={"sparse": INT4},
        speculative_config=NGRAM,
    ) as drafting:
        same(generate(drafting, chosen, greedy()), expected)
        totals = stats(drafting)
    assert totals["decode_tokens"] > len(chosen) * (NEW_TOKENS - 1)


def test_graphs_off_gives_the_same_tokens(prompts, sparse, repeating):  # noqa: F811
    eager = dict(enforce_eager=True, compilation_config={"mode": 0})
    with ours(additional_config={"sparse": INT4}, **eager) as llm:
        got = generate(llm, prompts, greedy(**COLD))
    same(got, sparse)
    assert len(got) == len(LENGTHS)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Tensor parallelism over two processes, and one of them killed while it decodes."""

import pytest

pytest.importorskip("vllm")

from .engines import (  # noqa: E402
    EXTENSION,
    assert_a_killed_worker_ends_the_engine,
    generate,
    greedy,
    running,
    tokens,
)
from .tiny import random_prompts, save_llama  # noqa: E402

# Four processes on two cores.
pytestmark = [pytest.mark.engine, pytest.mark.slow]


def undisturbed(**options):
    return greedy(detokenize=False, **options)


def test_two_ranks_give_one_ranks_tokens_and_end_together(tmp_path, monkeypatch):
    """KV heads are split, each rank counts its own, and a rank that dies is an error.

    One start of two ranks serves all three: it takes four processes.
    """
    settings = dict(
        model=str(save_llama(tmp_path)),
        skip_tokenizer_init=True,
        dtype="float32",
        kv_cache_memory_bytes=2**27,
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": {"top_k": 0.3, "dense_below": 0}},
    )
    prompts = random_prompts(700, 129, 300)
    with running(**settings) as llm:
        llm.collective_rpc("reset_sparse_stats")  # what engines before it counted
        expected = tokens(generate(llm, prompts, undisturbed()))
        (whole,) = llm.collective_rpc("sparse_stats")

    # Threads that spin would take the cores from the other rank.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parallel = dict(tensor_parallel_size=2, distributed_executor_backend="mp")
    with running(in_process=False, **settings, **parallel) as llm:
        assert tokens(generate(llm, prompts, undisturbed())) == expected
        ranks = llm.collective_rpc("sparse_stats")
        assert len(ranks) == 2
        for name, count in whole.items():
            if name.startswith("kv_bytes"):
                assert [rank[name] for rank in ranks] == [count / 2] * 2
            else:
                assert [rank[name] for rank in ranks] == [count] * 2

        assert_a_killed_worker_ends_the_engine(llm, prompts[0])

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Blocks that leave the KV cache for host memory, and come back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from vllm import LLM  # noqa: E402
from vllm.distributed.kv_transfer import get_kv_transfer_group  # noqa: E402

from .engines import (  # noqa: E402
    EXTENSION,
    SPARSE,
    generate,
    greedy,
    running,
    stats,
    tokens,
)
from .family_runs import family  # noqa: E402
from .lossless import LOSSLESS  # noqa: E402
from .offloading import counts, page_bytes, pages  # noqa: E402
from .tiny import random_prompts, save_llama  # noqa: E402

pytestmark = pytest.mark.engine
LAYERS, BLOCK = 3, 128
NUM_BLOCKS = 24
# Of whole blocks, one token more, and less: together they need twice the cache.
LENGTHS = [512, 513, 640, 600, 511, 384, 514, 700, 520, 256, 530, 650, 540]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@contextmanager
def engine(llama: Path, options: dict, **settings) -> Iterator[LLM]:
    own = dict(
        model=str(llama),
        skip_tokenizer_init=True,
        dtype="float32",
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": options},
        num_gpu_blocks_override=NUM_BLOCKS,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        max_num_seqs=2,
        disable_log_stats=False,
    )
    with running(**own | settings) as llm:
        yield llm


OFFLOADING = dict(kv_offloading_size=0.25)
PARAMS = greedy(8, detokenize=False)


@pytest.mark.parametrize("fmt", ["auto", "k8v4"])
def test_twice_the_cache_comes_back_from_host_memory(llama, fmt):
    prompts = random_prompts(*LENGTHS)
    options = SPARSE | {"kv_format": fmt}
    assert sum(n // BLOCK for n in LENGTHS) >= 2 * NUM_BLOCKS
    with engine(llama, options) as llm:
        want = tokens(generate(llm, prompts, PARAMS))
        assert tokens(generate(llm, prompts, PARAMS)) == want
    with engine(llama, options, **OFFLOADING) as llm:
        size = LAYERS * page_bytes(llm)
        before, answer = pages(llm, prompts[1], PARAMS)
        assert before.shape == (LAYERS, 4, page_bytes(llm)) and answer == want[1]
        first = generate(llm, prompts, PARAMS)
        assert tokens(first) == want
        stored = counts(llm)
        assert stored["external_prefix_cache_hits"] == 0
        blocks = sum(n // BLOCK for n in LENGTHS)
        assert stored["kv_offload_store_bytes"] == blocks * size

        second = generate(llm, prompts, PARAMS)
        assert tokens(second) == want
        # As from the prefix cache: all but the block of the last token.
        cached = [output.num_cached_tokens for output in second]
        assert cached == [(n - 1) // BLOCK * BLOCK for n in LENGTHS]
        loaded = counts(llm)
        hits = loaded["external_prefix_cache_hits"]
        assert hits >= sum(cached) - NUM_BLOCKS * BLOCK
        assert loaded["kv_offload_load_bytes"] == hits // BLOCK * size

        after, answer = pages(llm, prompts[1], PARAMS)
        assert counts(llm)["external_prefix_cache_hits"] == hits + 4 * BLOCK
        assert torch.equal(before, after) and answer == want[1]
        assert stats(llm)["sparse_rows"] > 0

        # A control: answers do depend on what is loaded.
        for part in get_kv_transfer_group().connector_worker.worker._host:
            part.zero_()
        assert tokens(generate(llm, prompts, PARAMS)) != want


def test_lossless_engines_verify_over_reloaded_blocks(llama):
    """Also over blocks of answers, which drafts had filled before."""
    prompts = random_prompts(*LENGTHS)
    with engine(llama, {"selector": "dense"}) as llm:
        want = tokens(generate(llm, prompts, PARAMS))
        longer = [p + answer + p[:200] for p, answer in zip(prompts, want, strict=True)]
        follow = tokens(generate(llm, longer, PARAMS))
    extra = {"offload_prompt_only": False}
    transfer = dict(kv_transfer_config={"kv_connector_extra_config": extra})
    with engine(llama, LOSSLESS, **OFFLOADING, **transfer) as llm:
        for _ in range(2):
            assert tokens(generate(llm, prompts, PARAMS)) == want
        hits = counts(llm)["external_prefix_cache_hits"]
        assert hits >= NUM_BLOCKS * BLOCK
        outputs = generate(llm, longer, PARAMS)
        assert tokens(outputs) == follow
        # 511 tokens, and one of the answer at least.
        assert outputs[4].num_cached_tokens == 512
        assert counts(llm)["external_prefix_cache_hits"] > hits
        assert stats(llm)["sparse_rows"] > 0


@pytest.mark.parametrize("fmt", [pytest.param("auto", marks=pytest.mark.slow), "k8v4"])
def test_an_engine_takes_prompts_that_another_computed_from_files(llama, fmt, tmp_path):
    """Prefill in one engine, decoding in another, by a folder that both see."""
    prompts = random_prompts(*LENGTHS[:5])
    tiers = [{"type": "fs", "root_dir": str(tmp_path)}]
    extra = {"spec_name": "TieringOffloadingSpec", "secondary_tiers": tiers}
    files = dict(
        kv_offloading_size=0.03,
        kv_transfer_config={"kv_connector_extra_config": extra},
    )
    options = SPARSE | {"kv_format": fmt}
    with engine(llama, options, **files) as llm:
        want = tokens(generate(llm, prompts, PARAMS))
        assert counts(llm)["external_prefix_cache_hits"] == 0
    with engine(llama, options, **files) as llm:
        outputs = generate(llm, prompts, PARAMS)
        cached = [output.num_cached_tokens for output in outputs]
        assert cached == [(len(p) - 1) // BLOCK * BLOCK for p in prompts]
        assert counts(llm)["external_prefix_cache_hits"] == sum(cached)
        assert tokens(outputs) == want
    # Blocks of another format are others, with the same names.
    other = SPARSE | {"kv_format": "int8"}
    with engine(llama, other, **files) as llm:
        generate(llm, prompts, PARAMS)
        assert counts(llm)["external_prefix_cache_hits"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["auto", "k8v4"])
def test_ranks_offload_their_own_heads(llama, fmt, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    prompts = random_prompts(*LENGTHS)
    options = {"selector": "dense", "kv_format": fmt}
    with engine(llama, options) as llm:
        want = tokens(generate(llm, prompts, PARAMS))
    ranks = dict(tensor_parallel_size=2, distributed_executor_backend="mp")
    with engine(llama, options, in_process=False, **ranks, **OFFLOADING) as llm:
        for _ in range(2):
            assert tokens(generate(llm, prompts, PARAMS)) == want
        assert counts(llm)["external_prefix_cache_hits"] >= NUM_BLOCKS * BLOCK


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fmt", "blocks"),  # two requests at first, not to the end
    [("auto", 20), ("int8", 20), ("int4", 24), ("k4v8", 20), ("k8v4", 20)],
)
def test_chunks_of_several_blocks_and_preempted_requests(llama, fmt, blocks):
    """Requests that are preempted come back to what was offloaded of them."""
    prompts, params = random_prompts(*LENGTHS[:8]), greedy(140, detokenize=False)
    options = {"selector": "dense", "kv_format": fmt}
    with engine(llama, options, max_num_seqs=1) as llm:
        want = tokens(generate(llm, prompts, params))
    small = dict(max_num_seqs=4, num_gpu_blocks_override=blocks)
    extra = {"blocks_per_chunk": 2, "offload_prompt_only": False}
    transfer = dict(kv_transfer_config={"kv_connector_extra_config": extra})
    with engine(llama, options, **small, **OFFLOADING, **transfer) as llm:
        for _ in range(2):
            assert tokens(generate(llm, prompts, params)) == want
        assert counts(llm)["external_prefix_cache_hits"] >= 20 * BLOCK
        found = {m.name: m for m in llm.get_metrics()}
        assert found["vllm:num_preemptions"].value > 0


def test_other_connectors_are_refused_before_anything_is_loaded(llama):
    other = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with (
        pytest.raises(ValueError, match="KV connector ExampleConnector is not served"),
        engine(llama, SPARSE, kv_transfer_config=other),
    ):
        pass


@pytest.mark.slow
def test_caches_of_other_layers_beside_ours_are_refused():
    with (
        pytest.raises(ValueError, match="keep their cache in blocks of ours, this one"),
        family("Gemma 3", SPARSE, **OFFLOADING),
    ):
        pass

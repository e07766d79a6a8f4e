# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A real model in vLLM's engine, and what its tests ask of it."""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from vllm import LLM, SamplingParams
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    model_parallel_is_initialized,
)

from scripts.get_model import get_model

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
EXTENSION = "vllm_sparse.worker.WorkerExtension"
DENSE = {"top_k": 1.0, "dense_below": 0}
SPARSE = {"top_k": 0.2, "dense_below": 64, "local_window": 16, "sink_tokens": 4}
# Single tokens, both sides of a block boundary, several blocks.
PROMPT_LENGTHS = [5, 127, 128, 129, 300, 450]
NEW_TOKENS = 16
NUM_LAYERS, KV_HEADS, HEAD_SIZE = 30, 3, 64


@contextmanager
def running(in_process: bool = True, **options) -> Iterator[LLM]:
    """An engine that is gone afterwards."""
    settings = dict(
        enforce_eager=True,
        kv_cache_memory_bytes=2**29,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        max_num_seqs=8,
        disable_log_stats=True,
        seed=0,
    )
    if "model" not in options:
        settings["model"] = str(get_model())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(not in_process)))
        # Binding threads to cores would outlive the engine.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        environment = dict(os.environ)
        # An engine that lives in this process keeps its groups.
        alone = in_process and not model_parallel_is_initialized()
        llm = None
        try:
            llm = LLM(**settings | options)
            yield llm
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            if alone:
                cleanup_dist_env_and_memory()
            for name in set(os.environ) - set(environment):
                del os.environ[name]


def greedy(max_tokens: int = NEW_TOKENS, **options) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, **options
    )


COLD = dict(skip_reading_prefix_cache=True)


def generate(llm: LLM, prompts, params):
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, params, use_tqdm=False)


def tokens(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def logprobs(outputs) -> list[list[float]]:
    return [
        [step[t].logprob for step, t in zip(o.logprobs, o.token_ids, strict=True)]
        for o in (output.outputs[0] for output in outputs)
    ]


def assert_same_but_for_ties(
    got, want, gap: float = 0.15, most: int | None = None
) -> None:
    """Equal texts, or texts that part where the best tokens are within ``gap`` nats.

    Args:
        most: texts that may part; None: one in three and one.
    """
    parted = 0
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = a.outputs[0], b.outputs[0]
        for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)):
            if x == y:
                continue
            step = b.logprobs[i]
            assert x in step, (number, i)
            apart = step[y].logprob - step[x].logprob
            assert apart < gap, (number, i, apart)
            parted += 1
            break
    assert parted <= (len(got) // 3 + 1 if most is None else most), parted


def configure(llm: LLM, options: dict) -> None:
    llm.collective_rpc("reconfigure_sparse", args=(options,))
    llm.collective_rpc("reset_sparse_stats")


def stats(llm: LLM) -> dict[str, int]:
    (worker,) = llm.collective_rpc("sparse_stats")
    return worker


def step_until_done(llm: LLM, on_step=lambda: None) -> dict[str, list[int]]:
    """Run the engine by hand; token ids by request."""
    finished = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        on_step()
    return finished


def add(llm: LLM, name: str, prompt: list[int], params=None) -> None:
    llm.llm_engine.add_request(
        name, {"prompt_token_ids": prompt}, params or greedy(**COLD)
    )


def scheduled(llm: LLM) -> dict:
    """The scheduler's requests; vLLM adds a suffix to the names that we gave."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return {name.rpartition("-")[0]: r for name, r in scheduler.requests.items()}


@contextmanager
def few_free_blocks(llm: LLM, count: int) -> Iterator[None]:
    """Take all but ``count`` blocks of the KV cache away."""
    assert llm.reset_prefix_cache()
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - count)
    try:
        yield
    finally:
        pool.free_blocks(taken)


def assert_a_killed_worker_ends_the_engine(llm: LLM, prompt: list[int]) -> None:
    """While a request runs: vLLM's own error, soon, and no process is left.

    Args:
        llm: an engine in processes of its own; it is dead afterwards.
    """
    import psutil
    from vllm.v1.engine.exceptions import EngineDeadError

    family = psutil.Process().children(recursive=True)
    family = [p for p in family if p.name().startswith("VLLM")]
    worker = next(p for p in reversed(family) if "Worker" in p.name())
    add(llm, "endless", prompt, greedy(1000, detokenize=False))
    for _ in range(3):
        llm.llm_engine.step()
    worker.kill()
    start = time.monotonic()
    with pytest.raises(EngineDeadError, match="See stack trace"):
        while True:
            llm.llm_engine.step()
    assert time.monotonic() - start < 60
    assert not psutil.wait_procs(family, timeout=30)[1]


def differences(outputs, reference) -> list[float]:
    """Of the log-probabilities, as far as the texts are the same."""
    found: list[float] = []
    for a, b, pa, pb in zip(
        tokens(outputs),
        tokens(reference),
        logprobs(outputs),
        logprobs(reference),
        strict=True,
    ):
        same = next((i for i in range(NEW_TOKENS) if a[i] != b[i]), NEW_TOKENS)
        found += [abs(x - y) for x, y in zip(pa[:same], pb[:same])]
    return found

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""An engine whose decode steps are timed."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from vllm_sparse.anchor_config import FILE
from vllm_sparse.plugin.registry import BACKENDS

OURS = tuple(name.lower() for name in BACKENDS)  # they take options of ours
# Name on the command line -> arguments of vllm.LLM; other names are backends.
ENGINES = {
    "flash_attn_fp8": {"attention_backend": "flash_attn", "kv_cache_dtype": "fp8"}
}
# After a colon: ranks, executor.
RANKS = {"one": (1, None), "mp": (2, "mp"), "ray": (2, "ray")}
# Tokens of a line in prompts for models with anchors, as in Python.
LINE = 12
TIMELINE_US = 60_000  # of the GPU's time line, some eight steps
ATTENTION = ("FlashAttnFwdSm90", "decode_kernel")  # once a layer


class Timed:
    """One engine and its measurements; prompts are lists of random tokens, in lines
    where the model has anchors."""

    def __init__(self, name: str, sparse: dict | None = None, **settings: Any) -> None:
        """Start it.

        Args:
            name: of an engine, and of ranks: ``sparq:mp``.
            sparse: options of ours.
            settings: those of ``vllm.LLM``.
        """
        from vllm import LLM

        engine, _, ranks = name.partition(":")
        self.is_sparse = engine in OURS
        self.ranks, executor = RANKS[ranks or "one"]
        settings |= ENGINES.get(engine, {"attention_backend": engine})
        if self.is_sparse:
            settings["worker_extension_cls"] = "vllm_sparse.worker.WorkerExtension"
            settings["additional_config"] = {"sparse": sparse or {}}
        self.llm = LLM(
            tensor_parallel_size=self.ranks,
            distributed_executor_backend=executor,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            **{"disable_log_stats": True, "dtype": "bfloat16"} | settings,
        )
        self.config = self.llm.llm_engine.vllm_config
        self.line_end: int | None = None
        anchors = Path(self.config.model_config.model) / FILE
        if anchors.is_file():
            self.line_end = json.loads(anchors.read_text())["line_ends"][0]

    def prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        vocabulary = self.config.model_config.get_vocab_size()
        prompts = make_prompts(count, length, seed, vocabulary)
        if self.line_end is not None:
            for prompt in prompts:
                prompt[LINE - 1 :: LINE] = [self.line_end] * (length // LINE)
        return prompts

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        """Time to generate ``tokens`` for every prompt, all prompts together."""
        params = greedy(tokens)
        inputs = [{"prompt_token_ids": p} for p in prompts]
        start = time.perf_counter()
        self.llm.generate(inputs, params, use_tqdm=False)
        return time.perf_counter() - start

    def difference(
        self, prompts: list[list[int]], tokens: int, before: int = 1
    ) -> float:
        """Seconds per decode step; the prompts must be in the prefix cache.

        Args:
            before: tokens of the shorter run, which is subtracted. One is cheap; more
                than that decode while later prompts arrive in both runs, not in one.
        """
        first = self.seconds(prompts, before)
        return (self.seconds(prompts, before + tokens) - first) / tokens

    def steps(self, prompts: list[list[int]], tokens: int) -> list[float]:
        """Seconds between the outputs of steps in which all prompts decode.

        Their median is steadier than :meth:`difference` where a step takes few
        milliseconds: what happens before and after does not enter.

        Raises:
            RuntimeError: the prompts never decode all together.
        """
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        params = greedy(tokens, output_kind=RequestOutputKind.DELTA)
        for i, prompt in enumerate(prompts):
            engine.add_request(f"timed-{i}", {"prompt_token_ids": prompt}, params)
        found, last = [], None
        while engine.has_unfinished_requests():
            outputs, now = engine.step(), time.perf_counter()
            everyone = len(outputs) == len(prompts)
            if everyone and last is not None:
                found.append(now - last)
            last = now if everyone else None
        if not found:
            raise RuntimeError("prompts do not decode together: more tokens are needed")
        return found

    def timeline(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds per decode step on the GPU's own time line, free of what the host
        does between steps. Needs the engine in this process.

        Kernels that start before the one ahead of them is through (programmatic
        dependent launch) count their waiting, so only the whole step compares.
        """
        profiler = torch.profiler
        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
            self.seconds(prompts, tokens)
            torch.cuda.synchronize()
        spans = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        spans = [span for span in spans if span[0] > spans[-1][1] - TIMELINE_US]
        calls = sum(any(name in span[2] for name in ATTENTION) for span in spans)
        layers = self.config.model_config.hf_text_config.num_hidden_layers
        total = max(end for _, end, _ in spans) - spans[0][0]
        return total * 1e-6 / (calls / layers)

    def time(
        self, clock: str, prompts: list[list[int]], tokens: int, before: int
    ) -> float:
        """Seconds per decode step by one of CLOCKS."""
        if clock == "difference":
            return self.difference(prompts, tokens, before)
        if clock == "timeline":
            return self.timeline(prompts, tokens)
        return CLOCKS[clock](self.steps(prompts, tokens))

    def reset(self) -> None:
        if self.is_sparse:
            self.llm.collective_rpc("reset_sparse_stats")

    def kv_read(self) -> dict[str, Any]:
        """Bytes since :meth:`reset`, of all ranks, each of which counts its own KV
        heads; {} without counts."""
        if not self.is_sparse:
            return {}
        ranks = self.llm.collective_rpc("sparse_stats")
        by_rank = [rank["kv_bytes_read"] for rank in ranks]
        dense = sum(rank["kv_bytes_dense"] for rank in ranks)
        return {
            "kv_bytes_read": sum(by_rank),
            "kv_bytes_read_by_rank": by_rank,
            "kv_share": sum(by_rank) / max(1, dense),
        }


CLOCKS = {
    "difference": None,
    "median": statistics.median,  # of intervals between steps
    "mean": statistics.fmean,
    "timeline": None,
}


def engine_settings(args) -> dict[str, Any]:
    """Those of ``vllm.LLM`` that the options of all benchmarks of engines say."""
    settings: dict[str, Any] = {
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "seed": 0,
    }
    if args.kv_cache_gib:
        settings["kv_cache_memory_bytes"] = int(args.kv_cache_gib * 2**30)
    if args.compilation_config:
        settings["compilation_config"] = args.compilation_config
    else:
        settings["enforce_eager"] = True
    return settings


def greedy(tokens: int, **more: Any) -> Any:
    """Sampling parameters: the best token every time, as often as asked."""
    from vllm import SamplingParams

    fixed = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    return SamplingParams(max_tokens=tokens, **fixed, **more)


def make_prompts(
    count: int, length: int, seed: int, vocabulary: int = 2**31
) -> list[list[int]]:
    # With the seed alone, longer prompts would begin as shorter ones do, and find them
    # in the prefix cache.
    generator = torch.Generator().manual_seed(seed * 10**6 + length)
    ids = torch.randint(1000, 40000, (count, length), generator=generator)
    return (ids % vocabulary).tolist()

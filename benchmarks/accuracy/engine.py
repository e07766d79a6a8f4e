# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""One vLLM engine for all methods: forced and free decoding, switching, statistics."""

import os
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy.forcing import ForceTokens, forced_params
from benchmarks.accuracy.methods import ModelShape
from benchmarks.accuracy.metrics import TOP_LOGPROBS, ForcedResult
from benchmarks.accuracy.tasks import ANSWER_TOKENS, Sample
from vllm_sparse.methods.compare.scored import ScoredMethod

WORKER_EXTENSION = "vllm_sparse.worker.WorkerExtension"
OUR_BACKEND = "sparq"


@dataclass(frozen=True)
class EngineOptions:
    """How the engine is built; recorded in the result's header."""

    model: str
    # Ours, or one of vLLM's ("cpu_attn", "flash_attn"), which are dense only.
    attention_backend: str = OUR_BACKEND
    dtype: str = "bfloat16"
    max_model_len: int = 8192
    max_num_seqs: int = 16
    kv_cache_gib: float = 4.0
    # Ours: sparse.kv_format. vLLM's own, for its own backends: --kv-cache-dtype.
    kv_format: str = "auto"
    kv_cache_dtype: str = "auto"
    # None: vLLM's default, which leaves no room for a second engine.
    gpu_memory_utilization: float | None = None


class Engine:
    """Prefix caching keeps each prompt's KV, so a method only decodes.

    Prompts are never extended, hence blocks that hold a method's decoded tokens are
    never hit by another method.
    """

    def __init__(self, options: EngineOptions, comparisons: bool = False):
        """
        Args:
            comparisons: also on GPUs run the selectors that serving refuses there, as
                they loop over rows on the host: here that is only slow.
        """
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if comparisons:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            ScoredMethod.devices = ("cpu", "cuda")
        from vllm import LLM

        self.options = options
        self.is_stock = options.attention_backend != OUR_BACKEND
        extra = {"kv_cache_dtype": options.kv_cache_dtype}
        if not self.is_stock:
            self.fixed = {"kv_format": options.kv_format}
            extra["worker_extension_cls"] = WORKER_EXTENSION
            extra["additional_config"] = {"sparse": self.fixed}
        if options.gpu_memory_utilization is not None:
            extra["gpu_memory_utilization"] = options.gpu_memory_utilization
        # ForceTokens is written for this runner, which is the CPU's only one.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        self.llm = LLM(
            model=options.model,
            attention_backend=options.attention_backend,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            kv_cache_memory_bytes=int(options.kv_cache_gib * 2**30),
            enable_prefix_caching=True,
            enforce_eager=True,
            logits_processors=[ForceTokens],
            logprobs_mode="raw_logprobs",
            max_logprobs=TOP_LOGPROBS,
            # bf16 logits of 16 to 32 are multiples of 0.125: noise in every metric.
            hf_overrides={"head_dtype": "float32"},
            disable_log_stats=True,
            **extra,
        )
        self.tokenizer = self.llm.get_tokenizer()

    @property
    def shape(self) -> ModelShape:
        config = self.llm.llm_engine.model_config
        layers = config.hf_text_config.num_hidden_layers
        return ModelShape(config.get_head_size(), layers, config.dtype.itemsize)

    def configure(self, options: dict[str, Any]) -> None:
        """Switch the running engine's selector and budget.

        Raises:
            ValueError: a sparse method on stock vLLM.
        """
        if not self.is_stock:
            self.llm.collective_rpc(
                "reconfigure_sparse", args=({**options, **self.fixed},)
            )
        elif options["selector"] != "dense":
            raise ValueError(
                f"attention backend {self.options.attention_backend!r} is dense only, "
                f"got the method {options['selector']!r}; use --attention-backend sparq"
            )

    def reset_stats(self) -> None:
        if not self.is_stock:
            self.llm.collective_rpc("reset_sparse_stats")

    def stats(self) -> dict[str, int] | None:
        """Counters of the decode steps since ``reset_stats``, summed over workers."""
        if self.is_stock:
            return None
        total: dict[str, int] = {}
        for worker in self.llm.collective_rpc("sparse_stats"):
            for key, value in worker.items():
                total[key] = total.get(key, 0) + value
        return total

    def kept_tokens(self) -> dict[str, list[list[float]]]:
        """Tokens that sparse rows kept since ``reset_stats``: mean, p50 and p99 of
        every KV head, by layer; layers without sparse rows are left out."""
        kept: dict[str, list[list[float]]] = {}
        if self.is_stock:
            return kept
        for worker in self.llm.collective_rpc("sparse_kept_tokens"):
            for name, heads in worker.items():
                if heads[0]["rows"]:
                    kept.setdefault(name, []).extend(
                        [round(head["mean"], 1), head["p50"], head["p99"]]
                        for head in heads
                    )
        return kept

    def prefill(self, samples: list[Sample]) -> None:
        """Put the prompts' KV into the prefix cache."""
        self._generate(samples, [forced_params(s.forced_ids[:1], 1) for s in samples])

    def force(self, samples: list[Sample]) -> list[ForcedResult]:
        """Decode every sample's forced tokens.

        Raises:
            RuntimeError: the engine emitted other tokens.
        """
        params = [forced_params(s.forced_ids, TOP_LOGPROBS) for s in samples]
        results = []
        for sample, output in zip(
            samples, self._generate(samples, params), strict=True
        ):
            if list(output.token_ids) != sample.forced_ids:
                raise RuntimeError(
                    "the engine did not emit the forced tokens; is the logits "
                    "processor ignored (speculative decoding, other model runner)?"
                )
            # vLLM returns the forced token beside the top ones when it is none.
            top = [
                {t: lp.logprob for t, lp in p.items() if lp.rank <= TOP_LOGPROBS}
                for p in output.logprobs
            ]
            logprobs = [
                p[t].logprob
                for p, t in zip(output.logprobs, sample.forced_ids, strict=True)
            ]
            results.append(ForcedResult(logprobs, top))
        return results

    def answer(self, samples: list[Sample]) -> list[str]:
        """Greedy decoding of a few tokens after each prompt."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
        outputs = self._generate(samples, [params] * len(samples))
        return [output.text for output in outputs]

    def _generate(self, samples: list[Sample], params: list) -> list:
        prompts = [{"prompt_token_ids": s.prompt_ids} for s in samples]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Thousands of requests that come, share prefixes, are preempted and aborted.

    python -m benchmarks.serving.soak --requests 2000 --output soak.json

Every output is compared with that of the same request run alone (fp32, the best token
every time, also with n > 1); at the end every KV block must be free again. Resident
memory is reported at ten times. One thing may differ: what a preempted request says
after its recomputation, where decoding is sparse, because prompts are attended densely.
Such requests are counted; what they said before counts as any other.

With ``--sparse '{"lossless": true}'`` every output is compared with that of a dense
engine, and preemption changes nothing.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from benchmarks.environment import describe
from scripts.get_model import get_model

PREFIXES = 8
STREAMED, COLLECTED, LAST = "DELTA", "CUMULATIVE", "FINAL_ONLY"


@dataclass(frozen=True)
class Job:
    """One distinct request."""

    prompt: tuple[int, ...]
    max_tokens: int
    n: int = 1

    def params(self, kind: str) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=self.n,
            # vLLM takes temperature 0 for n = 1 only; the best token of one is as sure.
            # (Seeds are no way: on CPUs vLLM 0.32 fails with them in chunked prefill.)
            temperature=0.0 if self.n == 1 else 1.0,
            top_k=0 if self.n == 1 else 1,
            max_tokens=self.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind[kind],
        )


@dataclass
class Running:
    """A request on its way."""

    job: int
    kind: str
    abort_after: int | None  # tokens of the first completion
    tokens: list[list[int]]
    before_preemption: list[int] | None = None
    finished: bool = False


@dataclass
class Report:
    requests: int = 0
    tokens: int = 0
    aborted: int = 0
    streamed: int = 0
    several: int = 0  # n > 1
    prefix_hits: int = 0
    preempted: int = 0
    changed_after_preemption: int = 0
    mismatches: list[str] = field(default_factory=list)
    leaked_blocks: int = 0
    unfinished_in_scheduler: int = 0
    megabytes: list[float] = field(default_factory=list)  # resident, at tenths
    seconds: float = 0.0
    drafted: int = 0  # tokens, of lossless engines
    accepted: int = 0


def make_jobs(
    count: int, vocabulary: int, max_model_len: int, rng: Random, longest: int = 60
) -> list[Job]:
    """Distinct requests; some begin alike, up to half of the longest context.

    Args:
        longest: tokens of the longest answers.
    """

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocabulary) for _ in range(n))

    prefixes = [ids(rng.randrange(0, max_model_len // 2)) for _ in range(PREFIXES)]
    jobs = []
    for _ in range(count):
        prompt = rng.choice(prefixes) + ids(rng.randrange(1, max_model_len // 3))
        most = min(
            max_model_len - len(prompt), rng.choice((2, 8, 2 * longest // 5, longest))
        )
        several = rng.random() < 0.15
        tokens, n = rng.randint(1, most), rng.randint(2, 3) if several else 1
        jobs.append(Job(prompt, tokens, n))
    return jobs


class Soak:
    """Drives a ``vllm.LLM`` of this process, with prefix caching.

    Args:
        recomputes: decoding is dense, so that preemption may change nothing.
    """

    def __init__(
        self, llm: Any, jobs: list[Job], rng: Random, recomputes: bool = False
    ) -> None:
        self.engine, self.recomputes = llm.llm_engine, recomputes
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.jobs, self.rng = jobs, rng
        self.report = Report()
        self.running: dict[str, Running] = {}
        self.names: dict[str, str] = {}  # ours, by the engine's

    def alone(self) -> list[list[list[int]]]:
        """[job][completion] tokens of every job run by itself, nothing cached."""
        result = []
        for i, job in enumerate(tqdm(self.jobs, desc="alone")):
            assert self.engine.reset_prefix_cache()
            self._add(f"alone-{i}", i, STREAMED, None)
            while self.engine.has_unfinished_requests():
                self._take(self.engine.step())
            result.append(self.running.pop(f"alone-{i}").tokens)
        assert self.engine.reset_prefix_cache()
        return result

    def run(
        self, requests: int, concurrency: int, expected: list[list[list[int]]]
    ) -> Report:
        """``requests`` draws from the jobs, at most ``concurrency`` at once.

        Args:
            expected: of :meth:`alone`.
        """
        self.free_at_first = self.pool.get_num_free_blocks()
        start, added = time.perf_counter(), 0
        bar = tqdm(total=requests, desc="together")
        while added < requests or self.running:
            room = concurrency - len(self.running)
            for _ in range(min(self.rng.randint(0, 4), room, requests - added)):
                self._draw(f"request-{added}")
                added += 1
            self._watch_preemptions()
            self._take(self.engine.step())
            self._abort()
            for name in [n for n, r in self.running.items() if r.finished]:
                self._compare(self.running.pop(name), expected)
                bar.update()
                if self.report.requests % max(1, requests // 10) == 0:
                    self.report.megabytes.append(resident_megabytes())
        self.report.seconds = time.perf_counter() - start
        bar.close()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.report.unfinished_in_scheduler = len(self.scheduler.requests)
        free = self.pool.get_num_free_blocks()
        self.report.leaked_blocks = self.free_at_first - free
        return self.report

    def _draw(self, name: str) -> None:
        job = self.rng.randrange(len(self.jobs))
        kind = self.rng.choice((STREAMED, COLLECTED, LAST))
        abort_after = None
        if kind != LAST and self.rng.random() < 0.15:
            abort_after = self.rng.randint(0, self.jobs[job].max_tokens)
        self._add(name, job, kind, abort_after)

    def _add(self, name: str, job: int, kind: str, abort_after: int | None) -> None:
        what = self.jobs[job]
        prompt = {"prompt_token_ids": list(what.prompt)}
        own = self.engine.add_request(name, prompt, what.params(kind))
        self.names[own] = name
        empty: list[list[int]] = [[] for _ in range(what.n)]
        self.running[name] = Running(job, kind, abort_after, empty)

    def _take(self, outputs: list[Any]) -> None:
        for output in outputs:
            request = self.running.get(output.request_id)
            if request is None:  # aborted in the last step
                continue
            if output.num_cached_tokens and not any(request.tokens):
                self.report.prefix_hits += 1
            for completion in output.outputs:
                ids = list(completion.token_ids)
                if request.kind == STREAMED:
                    request.tokens[completion.index] += ids
                else:
                    request.tokens[completion.index] = ids
            request.finished = output.finished

    def _abort(self) -> None:
        for name, request in self.running.items():
            after = request.abort_after
            if request.finished or after is None or len(request.tokens[0]) < after:
                continue
            self.engine.abort_request([name])
            request.finished = True
            self.report.aborted += 1

    def _watch_preemptions(self) -> None:
        """Remember how much of a request was said before it was preempted."""
        for waiting in self.scheduler.waiting:
            if not waiting.num_preemptions:
                continue
            # Completions of n > 1 have their number before the request's own name.
            name = self.names.get(waiting.request_id.rpartition("_")[2])
            request = self.running.get(name)
            if request is not None and request.before_preemption is None:
                request.before_preemption = [len(ids) for ids in request.tokens]

    def _compare(self, request: Running, expected: list[list[list[int]]]) -> None:
        report, job = self.report, self.jobs[request.job]
        report.requests += 1
        report.streamed += request.kind == STREAMED
        report.several += job.n > 1
        report.preempted += request.before_preemption is not None
        report.tokens += sum(map(len, request.tokens))
        for i, (got, want) in enumerate(zip(request.tokens, expected[request.job])):
            if request.abort_after is not None:
                want = want[: len(got)]
            if got == want:
                continue
            if request.before_preemption is not None and not self.recomputes:
                said = request.before_preemption[i]
                if got[:said] == want[:said] and len(got) == len(want):
                    report.changed_after_preemption += 1
                    continue
            at = next((k for k, (a, b) in enumerate(zip(got, want)) if a != b), None)
            report.mismatches.append(
                f"job {request.job}, completion {i}, {request.kind}: token {at} of "
                f"{len(got)} for {len(want)}"
            )


def resident_megabytes() -> float:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def dense_reference(sparse: dict) -> tuple[str, dict] | None:
    """Backend and options of what a lossless engine must say; None for others."""
    if not sparse.get("lossless"):
        return None
    kept = {k: sparse[k] for k in ("kv_format", "kv_group_size") if k in sparse}
    return ("sparq", {"selector": "dense"} | kept) if kept else ("CPU_ATTN", {})


@contextmanager
def started(args: argparse.Namespace, backend: str, sparse: dict) -> Iterator[Any]:
    """A ``vllm.LLM`` of this process, which is gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=str(args.model or get_model()),
        attention_backend=backend,
        additional_config={"sparse": sparse},
        dtype=args.dtype,
        skip_tokenizer_init=True,
        max_model_len=args.max_model_len,
        max_num_seqs=args.concurrency,
        max_num_batched_tokens=args.max_num_batched_tokens,
        kv_cache_memory_bytes=args.kv_cache_mib * 2**20,
        enforce_eager=True,
        disable_log_stats=False,
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, help="a folder; default: SmolLM2-135M")
    add("--backend", default="sparq")
    add("--sparse", type=json.loads, default={}, metavar="JSON")
    add("--requests", type=int, default=2000)
    add("--jobs", type=int, default=200, help="distinct requests")
    add("--concurrency", type=int, default=24)
    add("--max-model-len", type=int, default=1024)
    add("--max-tokens", type=int, default=60, help="of the longest answers")
    # On CPUs vLLM keeps a oneDNN primitive for every number of tokens in a step; with
    # few such numbers that memory is soon all there.
    add("--max-num-batched-tokens", type=int, default=128)
    add("--kv-cache-mib", type=int, default=512)
    add("--dtype", default="float32")
    add("--seed", type=int, default=0)
    add("--output", type=Path)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    rng, reference = Random(args.seed), dense_reference(args.sparse)
    with started(args, *(reference or (args.backend, args.sparse))) as llm:
        vocabulary = llm.llm_engine.model_config.get_vocab_size()
        jobs = make_jobs(
            args.jobs, vocabulary, args.max_model_len, rng, args.max_tokens
        )
        soak = Soak(llm, jobs, rng)
        expected = soak.alone()
        if reference is None:
            report = soak.run(args.requests, args.concurrency, expected)
    if reference is not None:
        with started(args, args.backend, args.sparse) as llm:
            soak = Soak(llm, jobs, rng, recomputes=True)
            report = soak.run(args.requests, args.concurrency, expected)
            found = {metric.name: metric for metric in llm.get_metrics()}
            name = "vllm:spec_decode_num_{}_tokens"
            report.drafted = found[name.format("draft")].value
            report.accepted = found[name.format("accepted")].value
    result = vars(report) | {"mismatches": report.mismatches[:20]}
    print(json.dumps(result, indent=1))
    if args.output:
        settings = {k: str(v) for k, v in vars(args).items() if k != "output"}
        found = {"header": describe() | settings} | result
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    if report.mismatches or report.leaked_blocks or report.unfinished_in_scheduler:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

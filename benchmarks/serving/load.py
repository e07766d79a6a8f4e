# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Servers under load: ``vllm bench serve`` against one server per backend.

The prompts are drawn once by vLLM's own random datasets; each run reads its part from
a file, by ``--dataset-name custom``.

    python -m benchmarks.serving.load --engines flash_attn sparq --model FOLDER \\
        --cases cold:30000:24 shared:30000:96 --output load.json \\
        --server-args --renderer-num-workers 8

A case is KIND:PROMPT TOKENS:REQUESTS. "cold" prompts have nothing in common; "shared"
ones are questions of 64 tokens, new in every run, after one of a few long documents,
whose KV the prefix cache holds. Every case first runs with all requests at once, which
gives the largest throughput; then at shares of the first engine's (``--rates``), the
same for all, as are prompts and times of arrival. One thread of a server turns some
five prompts of 30K tokens a second into tokens, hence the renderer's workers above.

``--together`` keeps the servers of all engines up and loads them in turns, so that
ratios are of one machine and minute. On one GPU every server then needs its share of
the memory: ``--server-args --gpu-memory-utilization 0.47 --kv-cache-memory-bytes 20G``.
"""

import argparse
import asyncio
import io
import json
import os
import re
import sys
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import save
from benchmarks.serving.engine import OURS
from benchmarks.serving.processes import exit_on_signals, free_port, running

QUESTION = 64  # tokens after a shared document
TIMES = [
    f"{of}_{what}_ms" for what in ("ttft", "tpot", "itl") for of in ("median", "p99")
]
COUNTS = ["completed", "total_input_tokens"]  # tokens as the server counts them
KEPT = [*COUNTS, "duration", "request_throughput", "output_throughput", *TIMES]


class Case:
    """One case: its prompts lie in a row, run after run."""

    def __init__(self, text: str, args: argparse.Namespace) -> None:
        self.text = text
        kind, length, count = text.split(":")
        self.count, self.shared = int(count), kind == "shared"
        # Prompts lie shuffled, and every document must come into the cache.
        self.warm = max(self.count, 8 * args.documents) if self.shared else 2
        self.total = self.warm + self.count * (1 + len(args.rates))
        name, options = "random", {"random-input-len": int(length)}
        if self.shared:
            self.total += -self.total % args.documents
            name, options = (
                "prefix_repetition",
                {
                    "prefix-repetition-prefix-len": int(length) - QUESTION,
                    "prefix-repetition-suffix-len": QUESTION,
                    "prefix-repetition-num-prefixes": args.documents,
                },
            )
        self.dataset = arguments({"dataset-name": name} | options)

    def first(self, run: int) -> int:
        """Of a run's prompts; run 0 comes after warming up."""
        return self.warm + run * self.count


def arguments(options: dict[str, Any]) -> list[str]:
    return [word for k, v in options.items() for word in (f"--{k}", str(v))]


def write_prompts(path: Path, prompts: Iterable[str]) -> None:
    """A file for vLLM's dataset ``custom``: prompts are sent as they are, in order.

    Args:
        path: ends in ``.jsonl``.
    """
    # json.dumps escapes what else would end a line.
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))


class Load:
    """``vllm bench serve`` in this process.

    (vLLM's command line asks for a distribution named vllm; its CPU build has another
    name.)
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Draw the prompts of all cases once, in a thread: drawing long ones takes
        longer than serving them, and servers start meanwhile.

        Args:
            folder: for the file of prompts.
        """
        from vllm.benchmarks import serve
        from vllm.benchmarks.datasets import get_samples
        from vllm.tokenizers import get_tokenizer
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self.args, self.serve, self.folder = args, serve, folder
        self.parser = FlexibleArgumentParser()
        serve.add_cli_args(self.parser)
        self.cases = [Case(text, args) for text in args.cases]
        tokenizer = str(args.tokenizer or args.model)

        def draw(case: Case) -> list[str]:
            options = arguments({"num-prompts": case.total, "seed": 0})
            parsed = self.parser.parse_args(case.dataset + options)
            return [s.prompt for s in get_samples(parsed, get_tokenizer(tokenizer))]

        pool = ThreadPoolExecutor(1)
        self.drawn = {case.text: pool.submit(draw, case) for case in self.cases}

    def bench(
        self, url: str, case: Case, first: int, count: int, rate: float, tokens: int
    ) -> dict[str, Any]:
        """``count`` prompts of a case, from number ``first``; ``tokens`` of output.

        Raises:
            RuntimeError: with the end of the output, when not all requests succeed.
        """
        file = self.folder / "prompts.jsonl"
        write_prompts(file, self.drawn[case.text].result()[first : first + count])
        options = {
            "dataset-name": "custom",
            "dataset-path": file,
            "custom-output-len": tokens,
            "backend": "openai",
            "endpoint": "/v1/completions",
            "base-url": url,
            "model": self.args.model,
            "tokenizer": self.args.tokenizer or self.args.model,
            "num-prompts": count,
            "temperature": 0,
            # Requests of one case and rate arrive at the same times at all engines.
            "seed": zlib.crc32(f"{case.text} {rate:.3f}".encode()),
            "request-rate": rate,
            "percentile-metrics": "ttft,tpot,itl",
        }
        flags = ["skip-chat-template", "disable-shuffle", "no-oversample"]
        flags = [f"--{flag}" for flag in (*flags, "ignore-eos", "disable-tqdm")]
        parsed = self.parser.parse_args(arguments(options) + flags)
        error, result = "", {}
        with redirect_stdout(io.StringIO()) as shown:
            try:
                # A server that hangs would be waited for, for hours.
                limit = self.args.run_seconds
                run = asyncio.wait_for(self.serve.main_async(parsed), limit)
                result = asyncio.run(run)
            except TimeoutError:
                error = f"it took more than --run-seconds {limit:g}\n"
            except Exception as other:
                error = f"{other!r}\n"
        if error or result.get("completed") != count:
            raise RuntimeError(f"the load failed: {error}{shown.getvalue()[-3000:]}")
        return {name: result[name] for name in KEPT if name in result}


def server_command(engine: str, port: int, args: argparse.Namespace) -> list[str]:
    options = {"attention-backend": engine}
    options |= {"host": "127.0.0.1", "port": port}
    if args.tokenizer:
        options["tokenizer"] = args.tokenizer
    if engine in OURS:
        options["additional-config"] = json.dumps({"sparse": json.loads(args.sparse)})
    command = [sys.executable, "-m", "vllm_sparse", "serve", args.model]
    return command + arguments(options) + args.server_args


def wait_for(engine: str, process, url: str, seconds: float, log: Path) -> None:
    """Until the server answers.

    Raises:
        RuntimeError: it ended, or is not ready after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not healthy(url):
        if process.poll() is not None or time.monotonic() > deadline:
            text = log.read_text()
            errors = [line for line in text.splitlines() if "Error" in line]
            shown = "\n".join(errors[:5]) + text[-1500:]
            raise RuntimeError(f"{engine} did not start:\n{shown}")
        time.sleep(1)


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def our_metrics(url: str) -> dict[str, float]:
    """The server's ``vllm_sparse:`` counters, of all engines together."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    # Gauges of several engines do not add up.
    counter = r"^(vllm_sparse:\w+_total)\{(.*)\} (\S+)$"
    result: dict[str, float] = {}
    for metric, labels, value in re.findall(counter, page, re.MULTILINE):
        metric = " ".join([metric, *re.findall(r'\b(?:reason|le)="(.*?)"', labels)])
        result[metric] = result.get(metric, 0) + float(value)
    return result


def measure(
    load: Load,
    engines: list[str],
    args: argparse.Namespace,
    limits: dict[str, float],
    folder: Path,
    rows: list[dict[str, Any]],
) -> None:
    """All cases on servers that run at the same time, one of them loaded at a time.

    Args:
        limits: largest throughput of the first engine by case, filled by it.
        rows: filled as cases finish.
    """
    with ExitStack() as stack:
        servers = {}
        for engine in engines:
            port, log = free_port(), folder / f"{engine}.log"
            url, command = (
                f"http://127.0.0.1:{port}",
                server_command(engine, port, args),
            )
            process = stack.enter_context(running(command, log))
            servers[engine] = process, url, log
        for engine, (process, url, log) in servers.items():
            wait_for(engine, process, url, args.start_seconds, log)
        for case in load.cases:
            for engine, (_, url, _) in servers.items():
                for row in measured(partial(load.bench, url), case, limits, args):
                    row["engine"] = engine
                    rows.append(row)
                    save(args, rows)
                    print(line(row), flush=True)
        for engine, (_, url, _) in servers.items():
            if metrics := our_metrics(url):
                rows.append({"engine": engine, "metrics": metrics})


def measured(
    bench: Callable[..., dict[str, Any]],
    case: Case,
    limits: dict[str, float],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """One case: all requests at once, then at every share of its limit."""
    bench(case, 0, case.warm, float("inf"), 1)
    for run, share in enumerate((None, *args.rates)):
        rate = float("inf") if share is None else share * limits[case.text]
        row = bench(case, case.first(run), case.count, rate, args.output_tokens)
        if share is None:
            limits.setdefault(case.text, row["request_throughput"])
        # No rate: all at once.
        yield row | {"case": case.text, "share": share, "rate": rate if share else None}


def line(row: dict[str, Any]) -> str:
    rate = "all at once" if row["share"] is None else f"{row['rate']:.2f}/s"
    return (
        f"| {row['case']} | {rate} | {row['engine']} | {row['request_throughput']:.3f} "
        f"| {row['output_throughput']:.0f} | {row['median_ttft_ms']:.0f} "
        f"| {row['median_tpot_ms']:.1f} | {row['p99_tpot_ms']:.1f} "
        f"| {row['median_itl_ms']:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--engines", nargs="+", default=["flash_attn", "sparq"])
    add("--sparse", default="{}", help="options of ours, as JSON")
    add("--model", type=Path, required=True)
    add("--tokenizer", type=Path, help="a folder, where --model has none")
    add("--cases", nargs="+", default=["cold:30000:24", "shared:30000:96"])
    add("--documents", type=int, default=4, help="that shared prompts begin with")
    add("--output-tokens", type=int, default=256)
    add("--rates", type=float, nargs="*", default=[0.9])
    add("--limits", type=json.loads, default={}, help="of a former run, by case")
    add("--start-seconds", type=float, default=300, help="until a server answers")
    add("--run-seconds", type=float, default=3600, help="of one case at one rate")
    add(
        "--together",
        action="store_true",
        help="servers run at the same time, in turns loaded; each needs its memory",
    )
    add("--server-args", nargs=argparse.REMAINDER, default=[], help="last: for vLLM")
    add("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    limits: dict[str, float] = dict(args.limits)
    exit_on_signals()
    print(
        "| case | rate | engine | requests/s | tokens/s | TTFT ms | TPOT ms | p99 "
        "| ITL ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    results: list[dict[str, Any]] = []
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        load = Load(args, Path(folder))
        groups = [args.engines] if args.together else [[e] for e in args.engines]
        for engines in groups:
            try:
                measure(load, engines, args, limits, Path(folder), results)
            except (RuntimeError, OSError) as error:
                failed = True
                print(error, flush=True)
                results.append({"engine": " ".join(engines), "error": str(error)})
                if any(case not in limits for case in args.cases):
                    break  # other engines would set their own rates
            save(args, results)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

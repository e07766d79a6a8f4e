# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Servers under load: ``vllm bench serve`` against one server per backend.

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
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.serving.decode import OURS
from benchmarks.serving.processes import exit_on_signals, free_port, running
from benchmarks.serving.results import save

QUESTION = 64  # tokens after a shared document
# ``vllm bench serve`` again and again in one process, whose imports take long, with
# prompts that were drawn before: drawing long ones takes longer than serving them.
# (vLLM's command line asks for a distribution named vllm; its CPU build has another
# name.)
BENCH = """
import asyncio, dataclasses, json, sys
from vllm.benchmarks import serve
from vllm.tokenizers import get_tokenizer
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
serve.add_cli_args(parser)
draw, drawn, chosen = serve.get_samples, {}, []
serve.get_samples = lambda args, tokenizer: chosen
for line in sys.stdin:
    task = json.loads(line)
    args, case = parser.parse_args(task["arguments"]), task["case"]
    if "first" in task:
        chosen = [
            dataclasses.replace(sample, expected_output_len=task["output_tokens"])
            for sample in drawn[case][task["first"]:][:args.num_prompts]
        ]
        asyncio.run(serve.main_async(args))
    else:
        drawn[case] = draw(args, get_tokenizer(args.tokenizer))
    print("@done", flush=True)
"""
KEPT = (
    "completed",
    "duration",
    "request_throughput",
    "output_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "median_itl_ms",
    "p99_itl_ms",
)


@contextmanager
def server(engine: str, args: argparse.Namespace, log: Path):
    """A server that starts, and its client, which draws prompts meanwhile."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(args.model), "--attention-backend", engine]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if args.tokenizer:
        command += ["--tokenizer", str(args.tokenizer)]
    if engine in OURS:
        command += [
            "--additional-config",
            json.dumps({"sparse": json.loads(args.sparse)}),
        ]
    command += args.server_args
    with running(command, log) as process:
        client = Client(f"http://127.0.0.1:{port}", args)
        try:
            yield process, client
        finally:
            client.close()


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
        lines = answer.read().decode().splitlines()
    result: dict[str, float] = {}
    for line in lines:
        if not line.startswith("vllm_sparse:"):
            continue
        name, value = line.rsplit(" ", 1)
        metric = name.partition("{")[0]
        # Gauges of several engines do not add up.
        if not metric.endswith("_total"):
            continue
        for label in ("reason", "le"):
            kind = name.partition(f'{label}="')[2].partition('"')[0]
            metric += f" {kind}" if kind else ""
        result[metric] = result.get(metric, 0) + float(value)
    return result


class Case:
    """One case: its prompts lie in a row, run after run."""

    def __init__(self, text: str, args: argparse.Namespace) -> None:
        self.text = text
        kind, length, count = text.split(":")
        self.count, self.shared = int(count), kind == "shared"
        # Prompts lie shuffled, and every document must come into the cache.
        self.warm = max(self.count, 8 * args.documents) if self.shared else 2
        total = self.warm + self.count * (1 + len(args.rates))
        if not self.shared:
            self.dataset = ["--dataset-name", "random", "--random-input-len", length]
        else:
            total += -total % args.documents
            self.dataset = ["--dataset-name", "prefix_repetition"]
            self.dataset += [
                "--prefix-repetition-prefix-len",
                str(int(length) - QUESTION),
            ]
            self.dataset += ["--prefix-repetition-suffix-len", str(QUESTION)]
            self.dataset += ["--prefix-repetition-num-prefixes", str(args.documents)]
        self.total = total

    def first(self, run: int) -> int:
        """Of a run's prompts; run 0 comes after warming up."""
        return self.warm + run * self.count


class Client:
    """``vllm bench serve``, waiting for what to do."""

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        """Start it, drawing the prompts of all cases."""
        self.url, self.args = url, args
        self.process = subprocess.Popen(
            [sys.executable, "-c", BENCH],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._unread = 0  # answers on their way
        for text in args.cases:
            case = Case(text, args)
            self._send(case, ["--num-prompts", str(case.total), "--seed", "0"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def bench(
        self, case: Case, first: int, count: int, rate: float, output_tokens: int
    ) -> dict[str, Any]:
        """``count`` prompts of a case, from number ``first``.

        Raises:
            RuntimeError: with the end of the output, when not all requests succeed.
        """
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["--backend", "openai", "--endpoint", "/v1/completions"]
            arguments += ["--base-url", self.url, "--model", str(self.args.model)]
            arguments += ["--num-prompts", str(count), "--ignore-eos"]
            # Requests of one case and rate arrive at the same times at all engines.
            seed = zlib.crc32(f"{case.text} {rate:.3f}".encode())
            arguments += ["--temperature", "0", "--seed", str(seed)]
            arguments += ["--request-rate", str(rate), "--disable-tqdm"]
            arguments += ["--percentile-metrics", "ttft,tpot,itl"]
            arguments += ["--save-result", "--result-dir", folder]
            arguments += ["--result-filename", "result.json"]
            self._send(case, arguments, first=first, output_tokens=output_tokens)
            # A server that hangs would be waited for, for hours.
            limit = threading.Timer(self.args.run_seconds, self.process.kill)
            limit.start()
            try:
                shown = self._read()
            finally:
                limit.cancel()
            path = Path(folder) / "result.json"
            result = json.loads(path.read_text()) if path.exists() else {}
        if result.get("completed") != count:
            raise RuntimeError(
                f"the load failed, or took more than --run-seconds "
                f"{self.args.run_seconds:g}:\n{shown[-3000:]}"
            )
        return {name: result[name] for name in KEPT if name in result}

    def _send(self, case: Case, arguments: list[str], **task) -> None:
        arguments = case.dataset + arguments
        arguments += ["--tokenizer", str(self.args.tokenizer or self.args.model)]
        task |= {"case": case.text, "arguments": arguments}
        assert self.process.stdin
        with suppress(BrokenPipeError):  # what it printed says why
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
        self._unread += 1

    def _read(self) -> str:
        """What was printed up to the end of all tasks."""
        shown = ""
        assert self.process.stdout
        for text in self.process.stdout:
            shown += text
            self._unread -= text.startswith("@done")
            if not self._unread:
                break
        return shown


def measure(
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
        logs = {engine: folder / f"{engine}.log" for engine in engines}
        servers = {
            engine: stack.enter_context(server(engine, args, log))
            for engine, log in logs.items()
        }
        for engine, (process, client) in servers.items():
            seconds = args.start_seconds
            wait_for(engine, process, client.url, seconds, logs[engine])
        for case in (Case(text, args) for text in args.cases):
            for engine, (_, client) in servers.items():
                for row in measured(client, case, limits, args):
                    row["engine"] = engine
                    rows.append(row)
                    save(args, rows)
                    print(line(row), flush=True)
        for engine, (_, client) in servers.items():
            if metrics := our_metrics(client.url):
                rows.append({"engine": engine, "metrics": metrics})


def measured(
    client: Client, case: Case, limits: dict[str, float], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One case: all requests at once, then at every share of its limit."""
    client.bench(case, 0, case.warm, float("inf"), 1)
    for run, share in enumerate((None, *args.rates)):
        rate = float("inf") if share is None else share * limits[case.text]
        first, tokens = case.first(run), args.output_tokens
        row = client.bench(case, first, case.count, rate, tokens)
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
        groups = [args.engines] if args.together else [[e] for e in args.engines]
        for engines in groups:
            try:
                measure(engines, args, limits, Path(folder), results)
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

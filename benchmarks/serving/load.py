# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Servers under load: ``vllm bench serve`` against one server per backend.

    python -m benchmarks.serving.load --engines flash_attn sparq --model FOLDER \\
        --cases cold:30000:24 shared:30000:96 --output load.json

A case is KIND:PROMPT TOKENS:REQUESTS. "cold" prompts have nothing in common; "shared"
ones are questions of 64 tokens after one of a few long documents, whose KV the prefix
cache holds. Every case first runs with all requests at once, which gives the largest
throughput; then at shares of the first engine's (``--rates``), the same for all. A
server turns some five prompts of 30K tokens a second into tokens: with more requests
than that, it needs ``--server-args --renderer-num-workers 8``.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serving.processes import free_port, running

QUESTION = 64  # tokens after a shared document
# ``vllm bench serve`` again and again in one process, whose imports take long; its
# arguments come as lines of JSON. (vLLM's command line asks for a distribution named
# vllm; its CPU build has another name.)
BENCH = """
import asyncio, json, sys
from vllm.benchmarks.serve import add_cli_args, main_async
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
for line in sys.stdin:
    asyncio.run(main_async(parser.parse_args(json.loads(line))))
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
)


@contextmanager
def server(engine: str, args: argparse.Namespace, log: Path):
    """A server that starts, and its client."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(args.model), "--attention-backend", engine]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if engine in ("sparq", "twilight"):
        command += [
            "--additional-config",
            json.dumps({"sparse": json.loads(args.sparse)}),
        ]
    command += args.server_args
    # The client's imports take long, too: beside the server's start.
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
    except (urllib.error.URLError, OSError):
        return False


def our_metrics(url: str) -> dict[str, float]:
    """The server's ``vllm_sparse:`` figures, labels summed."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    result: dict[str, float] = {}
    for line in lines:
        if not line.startswith("vllm_sparse:"):
            continue
        name, value = line.rsplit(" ", 1)
        metric = name.partition("{")[0]
        if metric.endswith("_created"):
            continue
        for label in ("reason", "le"):
            kind = name.partition(f'{label}="')[2].partition('"')[0]
            metric += f" {kind}" if kind else ""
        result[metric] = result.get(metric, 0) + float(value)
    return result


class Client:
    """``vllm bench serve``, waiting for what to do."""

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        self.url, self.args = url, args
        self.process = subprocess.Popen(
            [sys.executable, "-c", BENCH],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def bench(
        self, case: str, rate: float, seed: int, output_tokens: int | None = None
    ) -> dict[str, Any]:
        """One run.

        Raises:
            RuntimeError: with the end of its output.
        """
        with tempfile.TemporaryDirectory() as folder:
            output_tokens = output_tokens or self.args.output_tokens
            arguments = self._arguments(case, rate, seed, output_tokens)
            arguments += ["--save-result", "--result-dir", folder]
            arguments += ["--result-filename", "result.json"]
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(json.dumps(arguments) + "\n")
            self.process.stdin.flush()
            shown: list[str] = []
            for text in self.process.stdout:
                if text.startswith("@done"):
                    break
                shown.append(text)
            path = Path(folder) / "result.json"
            if not path.exists():
                raise RuntimeError(f"the load failed:\n{''.join(shown)[-3000:]}")
            result = json.loads(path.read_text())
        return {name: result[name] for name in KEPT if name in result}

    def _arguments(
        self, case: str, rate: float, seed: int, output_tokens: int
    ) -> list[str]:
        args = self.args
        kind, length, count = case.split(":")
        result = ["--backend", "openai", "--endpoint", "/v1/completions"]
        result += ["--base-url", self.url, "--model", str(args.model)]
        result += ["--tokenizer", str(args.tokenizer or args.model)]
        result += ["--seed", str(seed), "--num-prompts", count, "--ignore-eos"]
        result += ["--temperature", "0", "--request-rate", str(rate)]
        result += ["--percentile-metrics", "ttft,tpot,itl", "--disable-tqdm"]
        if kind == "cold":
            result += ["--dataset-name", "random", "--random-input-len", length]
            return result + ["--random-output-len", str(output_tokens)]
        result += ["--dataset-name", "prefix_repetition"]
        result += ["--prefix-repetition-prefix-len", str(int(length) - QUESTION)]
        result += ["--prefix-repetition-suffix-len", str(QUESTION)]
        result += ["--prefix-repetition-num-prefixes", str(args.documents)]
        return result + ["--prefix-repetition-output-len", str(output_tokens)]


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
        for case in args.cases:
            for engine, (_, client) in servers.items():
                for row in measured(client, case, limits, args.rates):
                    row["engine"] = engine
                    rows.append(row)
                    save(args, rows)
                    print(line(row), flush=True)
        for engine, (_, client) in servers.items():
            if metrics := our_metrics(client.url):
                rows.append({"engine": engine, "metrics": metrics})


def measured(
    client: Client, case: str, limits: dict[str, float], rates: list[float]
) -> Iterator[dict[str, Any]]:
    """One case: all requests at once, then at every share of ``limits[case]``."""
    # Of shared documents, this fills the cache: a seed and a number of requests draw
    # the same ones.
    warm = case if "shared" in case else case.rsplit(":", 1)[0] + ":2"
    client.bench(warm, float("inf"), 0, output_tokens=1)
    for i, share in enumerate((None, *rates)):
        rate = float("inf") if share is None else share * limits[case]
        row = client.bench(case, rate, 0 if "shared" in case else i + 1)
        if share is None:
            limits.setdefault(case, row["request_throughput"])
        # No rate: all at once.
        yield row | {"case": case, "share": share, "rate": rate if share else None}


def save(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    if args.output is None:
        return
    from benchmarks.accuracy.environment import describe

    options = {k: str(v) for k, v in vars(args).items() if k != "output"}
    options |= {"model": args.model.name, "tokenizer": ""}
    header = describe() | {"options": options}
    text = json.dumps({"header": header, "results": results}, indent=1)
    args.output.write_text(text + "\n")


def line(row: dict[str, Any]) -> str:
    rate = "all at once" if row["share"] is None else f"{row['rate']:.2f}/s"
    return (
        f"| {row['case']} | {rate} | {row['engine']} | {row['request_throughput']:.3f} "
        f"| {row['output_throughput']:.0f} | {row['median_ttft_ms']:.0f} "
        f"| {row['median_tpot_ms']:.1f} | {row.get('p99_tpot_ms', 0):.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--engines", nargs="+", default=["flash_attn", "sparq"])
    add("--sparse", default="{}", help="options of ours, as JSON")
    add("--model", type=Path, required=True)
    add("--tokenizer", type=Path)
    add("--cases", nargs="+", default=["cold:30000:24", "shared:30000:96"])
    add("--documents", type=int, default=4, help="that shared prompts begin with")
    add("--output-tokens", type=int, default=256)
    add("--rates", type=float, nargs="*", default=[0.9])
    add("--limits", type=json.loads, default={}, help="of a former run, by case")
    add("--start-seconds", type=float, default=300)
    add(
        "--together",
        action="store_true",
        help="servers run at the same time, in turns loaded; each needs its memory",
    )
    add("--server-args", nargs=argparse.REMAINDER, default=[], help="last: for vLLM")
    add("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    limits: dict[str, float] = args.limits
    # A server that outlives this would keep the GPU.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("| case | rate | engine | requests/s | tokens/s | TTFT ms | TPOT ms | p99 |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    results: list[dict[str, Any]] = []
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        groups = [args.engines] if args.together else [[e] for e in args.engines]
        for engines in groups:
            try:
                measure(engines, args, limits, Path(folder), results)
            except RuntimeError as error:
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

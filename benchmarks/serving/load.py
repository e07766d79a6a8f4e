# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Servers under load: ``vllm bench serve`` against one server per backend.

    python -m benchmarks.serving.load --engines flash_attn sparq --model FOLDER \\
        --cases cold:30000:24 shared:30000:96 --output load.json

A case is KIND:PROMPT TOKENS:REQUESTS. "cold" prompts have nothing in common; "shared"
ones are questions of 64 tokens after one of a few long documents, whose KV the prefix
cache holds. Every case first runs with all requests at once, which gives the largest
throughput; then at shares of the first engine's (``--rates``), the same for all.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUESTION = 64  # tokens after a shared document
# vLLM's command line asks for a distribution named vllm; its CPU build has another.
BENCH = (
    "import argparse, asyncio\n"
    "from vllm.benchmarks.serve import add_cli_args, main_async\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "asyncio.run(main_async(parser.parse_args()))\n"
)
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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(engine: str, args: argparse.Namespace, log: Path):
    """A server and its URL, ready to answer."""
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
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + args.start_seconds
        while not healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{engine} did not start:\n{log.read_text()[-3000:]}"
                )
            time.sleep(1)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


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
        if line.startswith("vllm_sparse:"):
            name, value = line.rsplit(" ", 1)
            reason = name.partition('reason="')[2].partition('"')[0]
            name = name.partition("{")[0] + (f" {reason}" if reason else "")
            result[name] = result.get(name, 0) + float(value)
    return result


def bench(
    url: str, case: str, rate: float, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One run of ``vllm bench serve``."""
    kind, length, count = case.split(":")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", BENCH, "--backend", "openai"]
        command += ["--base-url", url, "--endpoint", "/v1/completions"]
        command += ["--model", str(args.model), "--seed", str(seed)]
        command += ["--tokenizer", str(args.tokenizer or args.model)]
        command += ["--num-prompts", count, "--ignore-eos", "--temperature", "0"]
        command += [
            "--request-rate",
            str(rate),
            "--percentile-metrics",
            "ttft,tpot,itl",
        ]
        if kind == "cold":
            command += ["--dataset-name", "random", "--random-input-len", length]
            command += ["--random-output-len", str(args.output_tokens)]
        else:
            document = str(int(length) - QUESTION)
            command += ["--dataset-name", "prefix_repetition"]
            command += ["--prefix-repetition-prefix-len", document]
            command += ["--prefix-repetition-suffix-len", str(QUESTION)]
            command += ["--prefix-repetition-num-prefixes", str(args.documents)]
            command += ["--prefix-repetition-output-len", str(args.output_tokens)]
        command += ["--save-result", "--result-dir", folder]
        command += ["--result-filename", "result.json"]
        done = subprocess.run(command, capture_output=True, text=True)
        path = Path(folder) / "result.json"
        if done.returncode or not path.exists():
            raise RuntimeError(
                f"the load failed:\n{(done.stdout + done.stderr)[-3000:]}"
            )
        result = json.loads(path.read_text())
    return {name: result[name] for name in KEPT if name in result}


def measure(
    engine: str, args: argparse.Namespace, limits: dict[str, float], folder: Path
) -> list[dict[str, Any]]:
    """All cases on one engine.

    Args:
        limits: largest throughput of the first engine by case, filled by it.
    """
    rows = []
    with server(engine, args, folder / f"{engine}.log") as url:
        for case in args.cases:
            warm = case.rsplit(":", 1)[0] + f":{args.documents}"
            # Compiles what compiles late; of shared documents, fills the cache: the
            # dataset draws the same ones for a seed.
            bench(url, warm, float("inf"), 1, args)
            for share in (None, *args.rates):
                rate = float("inf")
                if share is not None:
                    rate = share * limits[case]
                row = bench(url, case, rate, 1 if "shared" in case else 2, args)
                if share is None:
                    limits.setdefault(case, row["request_throughput"])
                row |= {"case": case, "share": share, "rate": rate}
                rows.append(row)
                print(line(engine, row), flush=True)
        metrics = our_metrics(url)
    return [row | {"engine": engine} for row in rows] + (
        [{"engine": engine, "metrics": metrics}] if metrics else []
    )


def line(engine: str, row: dict[str, Any]) -> str:
    rate = "all at once" if row["share"] is None else f"{row['rate']:.2f}/s"
    return (
        f"| {row['case']} | {rate} | {engine} | {row['request_throughput']:.3f} "
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
    add("--start-seconds", type=float, default=300)
    add("--server-args", nargs=argparse.REMAINDER, default=[], help="last: for vLLM")
    add("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    limits: dict[str, float] = {}
    print("| case | rate | engine | requests/s | tokens/s | TTFT ms | TPOT ms | p99 |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for engine in args.engines:
            try:
                results += measure(engine, args, limits, Path(folder))
            except RuntimeError as error:
                print(f"{engine}: {error}", flush=True)
    if args.output:
        from benchmarks.accuracy.environment import describe

        options = {k: str(v) for k, v in vars(args).items() if k != "output"}
        options |= {"model": args.model.name, "tokenizer": ""}
        header = describe() | {"options": options}
        text = json.dumps({"header": header, "results": results}, indent=1)
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()

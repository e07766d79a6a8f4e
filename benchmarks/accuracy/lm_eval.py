# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""lm-evaluation-harness against one OpenAI server per backend, compared in pairs.

    python -m benchmarks.accuracy.lm_eval --model FOLDER --samples 16 \\
        --engines cpu_attn 'sparq {"top_k": 0.075}' twilight --tasks niah_single_1 \\
        --output lm_eval.json --server-args --max-model-len 8192

Tasks, prompts, requests and scores are lm-eval's own, from an environment of its own
(installed at the first run, beside cached models). This file starts the servers and
compares every sample's score with that of the first engine. An ``--output`` that exists
is added to: engines and tasks may come one by one. Any task of lm-eval will do whose
answers are generated; those named by default need no network (RULER's, without essays).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.accuracy.report import difference
from benchmarks.environment import save
from benchmarks.serving import load
from benchmarks.serving.processes import exit_on_signals, free_port, running

VERSION = "0.4.13"
# transformers: RULER measures its prompts in the model's tokens.
REQUIREMENTS = [f"lm_eval[api,ruler]=={VERSION}", "transformers==5.19.0"]
TASKS = ["niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_cwe", "ruler_fwe"]
# Options that differ between the runs whose rows a file holds.
OF_ONE_RUN = ("output", "environment", "engines", "tasks", "samples", "lm_eval_args")
SHOWN = ["lm_eval", "transformers", "datasets", "nltk", "wonderwords"]


def install(folder: Path) -> dict[str, str]:
    """Make the environment of lm-eval, if need be; versions of what matters in it."""
    python = folder / "bin" / "python"
    if not (folder / "bin" / "lm_eval").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", *REQUIREMENTS]
        subprocess.run(pip, check=True, env=environment())
    code = "import sys\nfrom importlib.metadata import version\n"
    code += "print(*map(version, sys.argv[1:]))"
    shown = subprocess.check_output([python, "-c", code, *SHOWN], env=environment())
    return dict(zip(SHOWN, shown.decode().split(), strict=True))


def environment() -> dict[str, str]:
    """Without what our interpreter needs: vLLM's preload, a path to this project."""
    return {
        k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "PYTHONPATH")
    }


def evaluate(url: str, args: argparse.Namespace, folder: Path) -> None:
    """Run lm-eval; its results lie in ``folder`` then.

    Raises:
        RuntimeError: with the end of its output, when it fails.
    """
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        (model,) = json.load(answer)["data"]
    options = {
        "model": model["id"],
        "base_url": f"{url}/v1/completions",
        "tokenizer": args.model,
        "tokenizer_backend": "huggingface",
        "num_concurrent": args.concurrent,
        "max_length": model["max_model_len"],  # else lm-eval cuts prompts at 2,048
        "max_retries": 1,
        "timeout": 3600,
    }
    command = [args.environment / "bin" / "lm_eval", "run"]
    command += ["--model", "local-completions", "--log_samples"]
    command += ["--model_args", ",".join(f"{k}={v}" for k, v in options.items())]
    command += ["--tasks", *args.tasks, "--limit", str(args.samples)]
    command += ["--output_path", folder, *shlex.split(args.lm_eval_args)]
    log = folder / "log"
    with log.open("w") as output:
        done = subprocess.run(
            command, env=environment(), stdout=output, stderr=output, check=False
        )
    if done.returncode:
        raise RuntimeError(f"lm-eval failed:\n{log.read_text()[-3000:]}")


def rows_of(folder: Path, engine: str) -> list[dict[str, Any]]:
    """A row per task and metric from lm-eval's files of samples.

    RULER's metrics are lengths; a sample has -1 for those that it is not of.
    """
    rows = []
    for file in sorted(folder.rglob("samples_*.jsonl")):
        task = file.name.removeprefix("samples_").rpartition("_")[0]
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        samples.sort(key=lambda sample: sample["doc_id"])
        for metric in samples[0]["metrics"]:
            own = [sample for sample in samples if sample[metric] >= 0]
            if own:
                row = {"engine": engine, "task": task, "metric": metric}
                rows.append(row | scored(own, metric))
    return rows


def scored(samples: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    prompts = "".join(sample["prompt_hash"] for sample in samples)
    answers = [json.dumps(sample["resps"]) for sample in samples]
    scores = [sample[metric] for sample in samples]
    return {
        "score": fmean(scores),
        "scores": scores,
        "prompts": zlib.crc32(prompts.encode()),
        "answers": [zlib.crc32(answer.encode()) for answer in answers],
    }


def key(row: dict[str, Any]) -> tuple[str, str]:
    return row["task"], row["metric"]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Per task: the first engine's score; the others' paired differences from it, ±
    standard error, samples that score higher and lower, and answers that are the same.

    Raises:
        ValueError: engines were asked different questions.
    """
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    found = {(row["engine"], *key(row)): row for row in rows}
    head = ["task", "metric", "n", *engines]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task in dict.fromkeys(map(key, rows)):
        base = found.get((engines[0], *task))
        if base is None:
            continue  # of a run that goes on
        cells = [*task, str(len(base["scores"])), f"{base['score']:.3f}"]
        for engine in engines[1:]:
            row = found.get((engine, *task))
            cells.append(compared(row, base) if row else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compared(row: dict[str, Any], base: dict[str, Any]) -> str:
    if row["prompts"] != base["prompts"]:
        raise ValueError(
            f"{row['task']}: {row['engine']} and {base['engine']} were asked different "
            "questions; run both with the same --samples, --lm-eval-args and versions"
        )
    pairs = list(zip(row["scores"], base["scores"], strict=True))
    mean, error = difference([a - b for a, b in pairs])
    up, down = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    same = sum(a == b for a, b in zip(row["answers"], base["answers"], strict=True))
    shown = f"{mean:+.3f} ± {error:.3f}".replace("-", "−")
    return f"{shown} (+{up} −{down}; {same} the same)"


def measure(engine: str, args: argparse.Namespace, folder: Path) -> list[dict]:
    """Start a server of ``engine`` and run the tasks.

    Returns:
        :func:`rows_of` it, with the server's own figure of the KV bytes that decoding
        read, as a share of what dense decoding reads.
    """
    name, _, sparse = engine.partition(" ")
    own = argparse.Namespace(**vars(args) | {"sparse": sparse or "{}"})
    port, log = free_port(), folder / "server.log"
    url = f"http://127.0.0.1:{port}"
    with running(load.server_command(name, port, own), log) as process:
        load.wait_for(engine, process, url, args.start_seconds, log)
        evaluate(url, args, folder)
        metrics = load.our_metrics(url)
    rows = rows_of(folder, engine)
    if metrics:
        read = metrics["vllm_sparse:kv_bytes_read_total"]
        share = read / metrics["vllm_sparse:kv_bytes_dense_total"]
        rows = [row | {"kv_share": share} for row in rows]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    cache = Path(os.environ.get("VLLM_SPARSE_CACHE") or "~/.cache/vllm-sparse")
    add(
        "--engines",
        nargs="+",
        default=["cpu_attn", 'sparq {"top_k": 0.075}', "twilight"],
        help="backends, ours with options as JSON; the first is compared with",
    )
    add("--model", type=Path, required=True)
    add("--tasks", nargs="+", default=TASKS)
    add("--samples", type=int, default=16, help="per task: lm-eval's --limit")
    add("--concurrent", type=int, default=4, help="requests at a time")
    add(
        "--lm-eval-args",
        default="",
        help="more for lm-eval, as one word: --lm-eval-args='--num_fewshot 3'",
    )
    add(
        "--environment",
        type=Path,
        default=cache.expanduser() / f"lm-eval-{VERSION}",
        help="a virtual environment for lm-eval, made if it is not there",
    )
    add("--start-seconds", type=float, default=300, help="until a server answers")
    add("--output", type=Path, help="is added to, if it exists")
    add("--server-args", nargs=argparse.REMAINDER, default=[], help="last: for vLLM")
    args = parser.parse_args()
    args.tokenizer = None
    exit_on_signals()
    args.versions = install(args.environment)
    rows = []
    if args.output and args.output.exists():
        rows = json.loads(args.output.read_text())["results"]
    for engine in args.engines:
        with tempfile.TemporaryDirectory() as folder:
            new = measure(engine, args, Path(folder))
        done = {(row["engine"], *key(row)) for row in new}
        rows = [row for row in rows if (row["engine"], *key(row)) not in done] + new
        save(args, rows, hidden=OF_ONE_RUN)
        print(markdown(rows), flush=True)


if __name__ == "__main__":
    main()

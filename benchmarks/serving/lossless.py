# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Decoding of lossless engines beside dense ones: tokens, verifications, time.

    python -m benchmarks.serving.lossless --engines flash_attn lossless \\
        --model FOLDER --cases 24x30000 4x32768 1x32768 --acceptance 0.95 --output FILE

A case is batch x context, prompts are random tokens that prefix caching keeps. Every
engine has a process of its own. With ``--acceptance`` drafts are accepted by chance
(vLLM's ``synthetic`` rejection sampling), as dummy weights say nothing of it: times are
then those of a model with that acceptance, and answers mean nothing. ``fixed`` is a
lossless engine that always drafts, ``lossless`` one that adapts, ``fp8`` one that also
drafts with weights of 8 bits.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import save
from benchmarks.serving.engine import Timed, engine_settings
from benchmarks.serving.processes import exit_on_signals, running
from scripts.get_model import get_model

HIDDEN = {"output", "part"}
OURS = {  # name -> options
    "lossless": {},
    "fixed": {"draft_adapt": False},
    "fp8": {"draft_weights": "fp8"},
}


def start(args: argparse.Namespace, name: str) -> Timed:
    longest = max(length for _, length in args.cases)
    settings: dict[str, Any] = {
        "model": str(args.model),
        "load_format": args.load_format,
        "max_model_len": longest + args.tokens + 32,
        "max_num_seqs": max(batch for batch, _ in args.cases),
        "disable_log_stats": False,
    } | engine_settings(args)
    if name not in OURS:
        return Timed(name, **settings)
    options = args.sparse | {"lossless": True} | OURS[name]
    if args.acceptance:
        drafts = options.setdefault("draft_tokens", 4)
        rates = [args.acceptance**i for i in range(1, drafts + 1)]
        accept_by_chance(rates)
    return Timed("sparq", options, **settings)


def accept_by_chance(rates: list[float]) -> None:
    """Let lossless engines of this process accept drafts with these probabilities, and
    say what they like."""
    from vllm_sparse.plugin import platform

    add_speculation = platform.add_speculation

    def add(vllm_config) -> None:
        add_speculation(vllm_config)
        if vllm_config.speculative_config is not None:
            speculation = vllm_config.speculative_config
            speculation.rejection_sample_method = "synthetic"
            speculation.synthetic_acceptance_rates = rates

    platform.add_speculation = add


def speculated(engine: Timed) -> dict[str, int]:
    """Verifications of a request, tokens drafted and accepted, so far."""
    prefix = "vllm:spec_decode_num_"
    return {
        metric.name.removeprefix(prefix): metric.value
        for metric in engine.llm.get_metrics()
        if metric.name.startswith(prefix) and hasattr(metric, "value")
    }


def one_run(args: argparse.Namespace, engine: Timed, prompts: list) -> dict[str, Any]:
    """Milliseconds of a step in which all prompts decode, and of a token in it.

    A step is a verification with the drafts after it; where requests end apart from
    each other, the last steps have fewer of them and are left out.
    """
    before = speculated(engine)
    steps = engine.steps(prompts, args.tokens)[args.before :]
    more = {k: v - before[k] for k, v in speculated(engine).items()}
    row: dict[str, Any] = {"ms_per_step": statistics.fmean(steps) * 1e3}
    row["steps"], row["median_ms"] = len(steps), statistics.median(steps) * 1e3
    tokens = 1.0
    if verified := more.get("drafts"):
        row["drafted"] = more["draft_tokens"] / verified
        row["accepted"] = more["accepted_tokens"] / verified
        # Steps without drafts verify nothing.
        drafting = verified / (len(prompts) * args.tokens - more["accepted_tokens"])
        tokens += min(1.0, drafting) * row["accepted"]
    row["ms"] = row["ms_per_step"] / tokens
    return row


def measure(args: argparse.Namespace, name: str) -> None:
    results = json.loads(args.output.read_text())["results"]
    engine = start(args, name)
    cache = engine.config.cache_config
    result = {
        "engine": name,
        "kv_capacity_tokens": cache.num_gpu_blocks * cache.block_size,
        "rows": [],
    }
    results.append(result)
    for batch, length in args.cases:
        prompts = engine.prompts(batch, length, length + batch)
        engine.seconds(prompts, 1)
        engine.steps(prompts, args.tokens)  # what a rule learns first
        runs = [one_run(args, engine, prompts) for _ in range(args.repeats)]
        row = {"batch": batch, "context": length, "runs": runs}
        row["ms"] = statistics.median(run["ms"] for run in runs)
        result["rows"].append(row)
        save(args, results, HIDDEN)


def print_table(results: list[dict[str, Any]]) -> None:
    print("| batch | context | engine | ms a token | vs first | accepted | ms a step |")
    print("|---|---|---|---|---|---|---|")
    base: dict[tuple, float] = {}
    for result in results:
        for row in result["rows"]:
            first = base.setdefault((row["batch"], row["context"]), row["ms"])
            run = row["runs"][-1]
            drafts = ""
            if "drafted" in run:
                drafts = f"{run['accepted']:.2f} of {run['drafted']:.2f}"
            print(
                f"| {row['batch']} | {row['context']} | {result['engine']} "
                f"| {row['ms']:.2f} | {first / row['ms']:.2f}x | {drafts} "
                f"| {run['median_ms']:.1f} |"
            )


def parse_args() -> argparse.Namespace:
    from vllm.platforms import current_platform

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, on_cpu = parser.add_argument, current_platform.is_cpu()
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    dense = "cpu_attn" if on_cpu else "flash_attn"
    add("--engines", nargs="+", default=[dense, "lossless"])
    add("--sparse", type=json.loads, default={}, help="our options, JSON")
    add("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    add("--load-format", default="auto" if on_cpu else "dummy")
    add("--cases", nargs="+", default=["8x8000" if on_cpu else "24x30000"])
    add("--acceptance", type=float, help="of a drafted token, by chance")
    add("--tokens", type=int, default=96, help="decoded by every request")
    add("--before", type=int, default=8, help="steps ahead of those that are timed")
    add("--repeats", type=int, default=3)
    add("--gpu-memory-utilization", type=float, default=0.92)
    add("--kv-cache-gib", type=float, default=4 if on_cpu else None)
    add("--compilation-config", type=json.loads, default=None if on_cpu else graphs)
    add("--seconds", type=float, default=3600, help="that one engine may take")
    add("--output", type=Path, required=True)
    add("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model or get_model()
    args.cases = [tuple(map(int, case.split("x"))) for case in args.cases]
    return args


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    args = parse_args()
    if args.part:
        return measure(args, args.part)
    exit_on_signals()
    save(args, [], HIDDEN)
    for name in args.engines:
        print(f"{name} ...", flush=True)
        command = [sys.executable, "-m", "benchmarks.serving.lossless", *sys.argv[1:]]
        with running([*command, "--part", name]) as process:
            if process.wait(args.seconds):
                raise SystemExit(f"{name} failed: see above")
    print_table(json.loads(args.output.read_text())["results"])


if __name__ == "__main__":
    main()

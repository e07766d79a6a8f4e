# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Decode steps and time to first token of whole engines, side by side.

    python -m benchmarks.serving.decode --engines flash_attn sparq --model FOLDER \\
        --cases 1x32768 10x40000 --output benchmarks/results/serving_NAME.json

A case is batch x context. On a CPU all engines are alive and measured in turns, so that
they see the same machine. On a GPU each has it for itself, in a process of its own,
with dummy weights; one that fails leaves an error in the result and the others alone.

``flash_attn:mp`` and ``sparq:ray`` are engines of two ranks. Ranks split the KV heads,
so the batch of a case is one rank's, and the KV bytes of a GPU are those that one has
alone. What they say is compared with the same engine of one rank ahead of them; for
that ``--layers`` of the model get random weights from a file that all ranks read.

``--live-figures`` measures what they add to a step: off, on, and asked for as often as
can be. Prompts are random tokens that prefix caching keeps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.environment import save
from benchmarks.serving.engine import CLOCKS, OURS, RANKS, Timed, engine_settings
from benchmarks.serving.live import switches
from benchmarks.serving.processes import exit_on_signals, running
from benchmarks.serving.shapes import SHAPES, save_shape
from benchmarks.serving.texts import LENGTHS, compare, greedy_texts, save_model
from benchmarks.serving.texts import describe as describe_texts
from scripts.get_model import get_model

# What says nothing of the result.
HIDDEN = {"output", "part", "checkpoint", "compare", "in_turns"}
Job = tuple[str, str, dict | None]  # label, engine, options of ours


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Our engines are measured once per set of options."""
    jobs: list[Job] = []
    for name in args.engines:
        if name.partition(":")[0] not in OURS:
            jobs.append((name, name, None))
            continue
        for options in args.sparse:
            several = len(args.sparse) > 1
            label = f"{name} {json.dumps(options)}" if several else name
            jobs.append((label, name, options))
    return jobs


def start(args: argparse.Namespace, name: str, options: dict | None) -> Timed:
    ranks = RANKS[name.partition(":")[2] or "one"][0]
    lengths = [n for _, n in args.cases] + args.ttft_lengths
    longest = max(lengths) + args.before + args.tokens + 128
    settings: dict[str, Any] = {
        "model": str(args.checkpoint or args.model),
        "load_format": "auto" if args.checkpoint else args.load_format,
        "max_model_len": args.max_model_len or longest,
        "max_num_seqs": max(len(LENGTHS), *(ranks * batch for batch, _ in args.cases)),
        "disable_log_stats": not args.live_figures,
    } | engine_settings(args)
    settings |= args.engine_args
    return Timed(name, options, **settings)


def measure(
    args: argparse.Namespace, jobs: list[Job], results: list[dict[str, Any]]
) -> None:
    """Adds a result for every job and saves after each case: a run that is cut off
    leaves the rest."""
    engines: dict[str, Timed] = {}
    variants: list[tuple[dict, Timed, Callable[[], Any]]] = []
    for label, name, options in jobs:
        if name not in engines:
            engines[name] = start(args, name, options)
        engine = engines[name]
        cache = engine.config.cache_config
        result = {
            "engine": label,
            "sparse": options,
            "cudagraph_mode": str(engine.config.compilation_config.cudagraph_mode),
            "kv_capacity_tokens": cache.num_gpu_blocks * cache.block_size,
            "rows": [],
        }
        if args.compare:
            result["texts"] = greedy_texts(engine)
        if args.live_figures:
            for figures, switch in switches(engine).items():
                of_figures = {"engine": f"{label}, figures {figures}", "rows": []}
                variants.append((result | of_figures, engine, switch))
            continue
        # Several options are several engines on a GPU, whose graphs hold them.
        call = partial(engine.llm.collective_rpc, "reconfigure_sparse")
        several = options is not None and args.in_turns and len(args.sparse) > 1
        switch = partial(call, args=(options,)) if several else lambda: None
        variants.append((result, engine, switch))
    results += [result for result, *_ in variants]
    cases = [("ttft", 1, n) for n in args.ttft_lengths]
    cases += [("decode", batch, n) for batch, n in args.cases]
    with tqdm(total=len(cases) * (args.repeats + 1), disable=None) as bar:
        for kind, batch, length in cases:
            bar.set_description(f"{kind} {batch} x {length}")
            rows = [
                {"kind": kind, "context": length, "batch_per_rank": batch, "all_ms": []}
                for _ in variants
            ]
            for repeat in range(args.repeats + 1):
                # Every variant is first in turn, as a machine slows while it gets warm.
                first = repeat % len(variants)
                order = list(range(len(variants)))
                for i in order[first:] + order[:first]:
                    _, engine, switch = variants[i]
                    switch()
                    seed = 10**6 + 100 * repeat + i
                    one_case(args, engine, rows[i], repeat, seed)
                bar.update()
            for (result, *_), row in zip(variants, rows, strict=True):
                row["ms"] = statistics.median(row["all_ms"])
                result["rows"].append(row)
            save(args, results, HIDDEN)


def one_case(
    args: argparse.Namespace, engine: Timed, row: dict, repeat: int, seed: int
) -> None:
    """Time one repeat; the first one warms up."""
    length, batch = row["context"], row["batch_per_rank"]
    if row["kind"] == "ttft":  # prompts never seen before
        row["batch"] = batch
        seconds = engine.seconds(engine.prompts(batch, length, seed), 1)
    else:
        row["batch"] = batch * engine.ranks
        prompts = engine.prompts(row["batch"], length, length + batch)
        if not repeat:
            engine.seconds(prompts, 1)
        engine.reset()
        seconds = engine.time(args.clock, prompts, args.tokens, args.before)
        row |= engine.kv_read()
    if repeat:
        row["all_ms"].append(seconds * 1e3)


def in_processes(args: argparse.Namespace, jobs: list[Job]) -> list[dict[str, Any]]:
    """Each job in a child process, which adds its result to ``--output``."""
    results: list[dict[str, Any]] = []
    references: dict[str, list] = {}
    save(args, results, HIDDEN)
    with tempfile.TemporaryDirectory() as folder:
        extra = ["--output", str(args.output)]
        if args.layers:
            extra += ["--checkpoint", folder]
            print("weights ...", flush=True)
            # In a process of its own, which leaves no CUDA context behind.
            if error := run_part(args, "weights", extra):
                raise SystemExit(error)
        for i, (label, name, _) in enumerate(jobs):
            print(f"{label} ...", flush=True)
            error = run_part(args, str(i), extra)
            results = json.loads(args.output.read_text())["results"]
            if error:
                results.append({"engine": label, "error": error, "rows": []})
            backend, _, ranks = name.partition(":")
            for result in results:
                texts = result.pop("texts", None)
                if texts and ranks in ("", "one"):
                    references[backend] = texts
                elif texts and backend in references:
                    result["compared"] = compare(texts, references[backend])
            save(args, results, HIDDEN)
    return results


def run_part(args: argparse.Namespace, part: str, extra: list[str]) -> str | None:
    """What went wrong, if anything did."""
    command = [sys.executable, "-m", "benchmarks.serving.decode", *sys.argv[1:]]
    with running([*command, *extra, "--part", part]) as process:
        try:
            code = process.wait(args.seconds)
        except subprocess.TimeoutExpired:
            return f"not done after {args.seconds:g} s"
    return f"exit status {code}" if code else None


def print_table(results: list[dict[str, Any]]) -> None:
    print("| what | context | batch | engine | ms | vs first | KV read | KV tokens |")
    print("|---|---|---|---|---|---|---|---|")
    base: dict[tuple, float] = {}
    for result in results:
        for r in result["rows"]:
            key = (r["kind"], r["context"], r["batch_per_rank"])
            first = base.setdefault(key, r["ms"])
            share = f"{r['kv_share']:.1%}" if "kv_share" in r else ""
            print(
                f"| {r['kind']} | {r['context']} | {r['batch']} | {result['engine']} "
                f"| {r['ms']:.2f} | {first / r['ms']:.2f}x | {share} "
                f"| {result['kv_capacity_tokens']} |"
            )
    for result in results:
        if "error" in result:
            print(f"{result['engine']}: {result['error']}")
        if "compared" in result:
            print(describe_texts(result["engine"], result["compared"]))


def parse_args() -> argparse.Namespace:
    from vllm.platforms import current_platform

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    names = ", ".join(RANKS)
    add("--engines", nargs="+", help=f"backend or backend:ranks, ranks of {names}")
    add("--sparse", type=json.loads, nargs="+", default=[{}], help="our options, JSON")
    add("--model", help="folder, or shape[:layers] of shapes.py; default: SmolLM2-135M")
    add("--load-format", help="default: dummy on GPUs")
    add("--layers", type=int, help="of the model, with random weights from a file")
    add("--cases", nargs="+", help="batch x context")
    add("--ttft-lengths", type=int, nargs="*", default=[])
    add("--clock", choices=CLOCKS, help="default: difference; mean with live figures")
    add("--tokens", type=int, help="decode steps timed")
    add("--before", type=int, default=16, help="decode steps ahead of those")
    add("--repeats", type=int, default=3)
    add("--max-model-len", type=int, help="default: what the cases need")
    add("--gpu-memory-utilization", type=float, default=0.92)
    add("--kv-cache-gib", type=float, help="of a rank")
    add("--compilation-config", type=json.loads, help="of vLLM, JSON")
    add("--engine-args", type=json.loads, default={}, help="others of vLLM.LLM, JSON")
    add("--live-figures", action="store_true", help="what they cost")
    add("--seconds", type=float, default=3600, help="that one engine may take")
    add("--output", type=Path)
    # Set by the script itself, for a child process.
    add("--part", help=argparse.SUPPRESS)
    add("--checkpoint", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_cpu = current_platform.is_cpu()
    defaults: dict[str, Any] = {
        "engines": ["cpu_attn", "sparq"],
        "cases": ["1x512", "4x512", "4x8000", "8x8000"],
        "tokens": 48,
        "load_format": "auto",
        "kv_cache_gib": 2.5,
    }
    if not on_cpu:
        defaults = {
            "engines": ["flash_attn", "sparq"],
            "cases": ["1x32768", "10x40000"],
            "tokens": 64,
            "load_format": "dummy",
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        }
    defaults["clock"] = "mean" if args.live_figures else "difference"
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.cases = [tuple(map(int, case.split("x"))) for case in args.cases]
    ranks = {name: name.partition(":")[2] for name in args.engines}
    for name, of_ranks in ranks.items():
        if of_ranks and of_ranks not in RANKS:
            parser.error(f"--engines {name}: expected backend:ranks, ranks of {names}")
    args.compare = any(ranks.values())
    args.in_turns = on_cpu and not args.compare
    if args.load_format == "dummy" and args.compare and not args.layers:
        parser.error("several ranks need --layers: dummy weights differ between ranks")
    if args.live_figures and on_cpu:
        parser.error("--live-figures is measured on GPUs")
    return args


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    args = parse_args()
    if args.live_figures or args.clock == "timeline":
        # The engine must be in this process.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    exit_on_signals()
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            args.model = get_model()
        elif args.model.partition(":")[0] in SHAPES:
            args.model = save_shape(args.model, Path(folder))
        else:
            args.model = Path(args.model)
        run(args)


def run(args: argparse.Namespace) -> None:
    jobs = jobs_of(args)
    results: list[dict[str, Any]] = []
    if args.part == "weights":
        return save_model(args)
    if args.part:
        results = json.loads(args.output.read_text())["results"]
        return measure(args, [jobs[int(args.part)]], results)
    if args.in_turns:
        measure(args, jobs, results)
    else:
        with tempfile.TemporaryDirectory() as folder:
            args.output = args.output or Path(folder) / "result.json"
            results = in_processes(args, jobs)
    print_table(results)
    if any("error" in result for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

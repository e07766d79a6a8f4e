# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Whole-engine decode speed and time to first token on a GPU, backend after backend.

    python -m benchmarks.serving.decode_gpu --model FOLDER_WITH_CONFIG_JSON \\
        --output benchmarks/results/serving_NAME.json

Weights are dummies unless ``--load-format`` says otherwise. Every engine has the GPU
for itself, in a process of its own. ``VLLM_SPARSE_COMMIT`` names the commit where there
is no git.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.serving.decode import OURS, Timed, make_prompts
from benchmarks.serving.processes import exit_on_signals

# Name on the command line -> arguments of vllm.LLM.
ENGINES = {
    "flash_attn": {"backend": "flash_attn"},
    "flash_attn_fp8": {"backend": "flash_attn", "kv_cache_dtype": "fp8"},
    "triton_attn": {"backend": "triton_attn"},
    "sparq": {"backend": "sparq"},
    "twilight": {"backend": "twilight"},
}


def measure(args: argparse.Namespace) -> dict:
    """One engine: rows of milliseconds, and its KV capacity in tokens."""
    settings = dict(ENGINES[args.engine])
    cases = [tuple(map(int, case.split("x"))) for case in args.cases]
    if settings["backend"] in OURS:
        settings["additional_config"] = {"sparse": json.loads(args.sparse)}
    engine = Timed(
        **settings,
        model=str(args.model),
        load_format=args.load_format,
        max_model_len=args.max_model_len,
        max_num_seqs=max(batch for batch, _ in cases),
        gpu_memory_utilization=args.gpu_memory_utilization,
        compilation_config=json.loads(args.compilation_config),
    )
    rows = []
    for length in args.ttft_lengths:
        times = []
        for repeat in range(args.repeats + 1):
            prompts = make_prompts(1, length, seed=10**6 + repeat)
            times.append(engine.seconds(prompts, 1))
        rows.append(row("ttft", 1, length, times[1:]))  # the first one warms up
    for batch, length in cases:
        prompts = make_prompts(batch, length, seed=length + batch)
        engine.seconds(prompts, 1)
        engine.decode_step(prompts, 4)
        engine.kv_share()
        times = [
            engine.decode_step(prompts, args.tokens, args.before)
            for _ in range(args.repeats)
        ]
        rows.append(row("decode", batch, length, times))
        rows[-1]["kv_share"] = engine.kv_share()
    config = engine.llm.llm_engine.vllm_config.cache_config
    capacity = config.num_gpu_blocks * config.block_size
    return {"engine": args.engine, "kv_capacity_tokens": capacity, "rows": rows}


def row(kind: str, batch: int, length: int, times: list[float]) -> dict:
    return {
        "kind": kind,
        "batch": batch,
        "context": length,
        "ms": statistics.median(times) * 1e3,
        "all_ms": [t * 1e3 for t in times],
    }


def print_table(results: list[dict]) -> None:
    print("| what | batch | context | engine | ms | vs first | KV read | KV tokens |")
    print("|---|---|---|---|---|---|---|---|")
    base: dict[tuple, float] = {}
    for result in results:
        for r in result["rows"]:
            key = (r["kind"], r["batch"], r["context"])
            first = base.setdefault(key, r["ms"])
            share = r.get("kv_share")
            print(
                f"| {' | '.join(map(str, key))} | {result['engine']} | {r['ms']:.2f} "
                f"| {first / r['ms']:.2f}x "
                f"| {'' if share is None else f'{100 * share:.1f} %'} "
                f"| {result['kv_capacity_tokens']} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--engines", nargs="+", choices=ENGINES, default=["flash_attn", "sparq"])
    add("--sparse", default="{}", help="options of ours, as JSON")
    add("--model", type=Path, required=True)
    add("--load-format", default="dummy")
    add("--cases", nargs="+", default=["1x32768", "10x40000"], help="batch x context")
    add("--ttft-lengths", type=int, nargs="*", default=[32768])
    add("--tokens", type=int, default=64, help="decode steps timed")
    add("--before", type=int, default=16, help="decode steps ahead of those")
    add("--repeats", type=int, default=3)
    add("--max-model-len", type=int, default=131072)
    add("--gpu-memory-utilization", type=float, default=0.95)
    add(
        "--compilation-config",
        default='{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}',
    )
    add("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    add("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if args.engine:
        args.output.write_text(json.dumps(measure(args)))
        return
    exit_on_signals()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.engines:
            print(f"{name} ...", flush=True)
            part = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", "benchmarks.serving.decode_gpu"]
            command += [*sys.argv[1:], "--engine", name, "--output", str(part)]
            code = subprocess.run(command).returncode
            if code == 0:
                results.append(json.loads(part.read_text()))
            else:
                error = f"exit status {code}"
                results.append({"engine": name, "error": error, "rows": []})
    print_table(results)
    if args.output:
        import torch
        import vllm

        options = {k: str(v) for k, v in vars(args).items() if k != "output"}
        options["model"] = args.model.name
        header = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "vllm": vllm.__version__,
            "commit": os.environ.get("VLLM_SPARSE_COMMIT", "unknown"),
            "options": options,
        }
        text = json.dumps({"header": header, "results": results}, indent=1)
        args.output.write_text(text + "\n")
    if any("error" in result for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

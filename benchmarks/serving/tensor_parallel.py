# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Tensor parallelism over two GPUs: decode speed, time to first token, equal tokens.

    python -m benchmarks.serving.tensor_parallel --model FOLDER_WITH_CONFIG_JSON \\
        --output benchmarks/results/tensor_parallel_NAME.json

Two ranks split the KV heads, so twice the batch gives every GPU the KV bytes that one
GPU has alone: a case ``8x32000`` is a batch of 8 per rank. The model has the shape that
config.json gives it, but ``--layers`` layers, and random weights from a file that all
ranks read (vLLM's dummy weights would differ from rank to rank). Every engine runs in
processes of its own; one that fails leaves an error in the result and the others alone.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.serving.decode import OURS, Timed, make_prompts
from benchmarks.serving.decode_gpu import row
from benchmarks.serving.processes import exit_on_signals, running
from benchmarks.serving.results import save

# Name on the command line -> ranks, executor.
RANKS = {"one": (1, None), "mp": (2, "mp"), "ray": (2, "ray")}
NAMES = ", ".join(RANKS)
DEFAULT = ["flash_attn:one", "flash_attn:mp", "sparq:one", "sparq:mp", "sparq:ray"]
LENGTHS = (5, 129, 300, 700, 1500)  # of the prompts whose tokens are compared
COMPARED = 32
INTERNAL = {"output", "part", "checkpoint"}


def settings(args: argparse.Namespace, backend: str, ranks: str) -> dict:
    size, executor = RANKS[ranks]
    result = {
        "backend": backend,
        "tensor_parallel_size": size,
        "distributed_executor_backend": executor,
        "compilation_config": json.loads(args.compilation_config),
        "seed": 0,
        "enforce_eager": args.enforce_eager,
    }
    if args.kv_cache_gib:
        result["kv_cache_memory_bytes"] = int(args.kv_cache_gib * 2**30)
    if backend in OURS:
        result["additional_config"] = {"sparse": json.loads(args.sparse)}
    return result


def measure(args: argparse.Namespace, backend: str, ranks: str) -> dict:
    """Rows of milliseconds, what the ranks read together, and greedy tokens."""
    cases = [tuple(map(int, case.split("x"))) for case in args.cases]
    size = RANKS[ranks][0]
    engine = Timed(
        **settings(args, backend, ranks),
        model=str(args.checkpoint),
        max_model_len=args.max_model_len,
        max_num_seqs=max(len(LENGTHS), size * max(batch for batch, _ in cases)),
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    config = engine.llm.llm_engine.vllm_config
    vocabulary = config.model_config.get_vocab_size()
    result = {
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "kv_capacity_tokens": config.cache_config.num_gpu_blocks
        * config.cache_config.block_size,
        "texts": greedy_texts(engine, vocabulary),
        "rows": [],
    }
    for length in args.ttft_lengths:
        times = [
            engine.seconds(prompts(1, length, 10**6 + i, vocabulary), 1)
            for i in range(args.repeats + 1)
        ]
        # The first one warms up.
        result["rows"].append(row("ttft", 1, length, times[1:]))
    for per_rank, length in cases:
        batch = prompts(size * per_rank, length, length + per_rank, vocabulary)
        engine.seconds(batch, 1)
        # As long as what is timed: prompts arrive while earlier ones decode.
        engine.steps(batch, args.tokens)
        reset(engine)
        times = [
            statistics.median(engine.steps(batch, args.tokens))
            for _ in range(args.repeats)
        ]
        decoded = row("decode", size * per_rank, length, times)
        decoded |= {"batch_per_rank": per_rank} | read_by_all(engine)
        result["rows"].append(decoded)
    return result


def prompts(count: int, length: int, seed: int, vocabulary: int) -> list[list[int]]:
    drawn = make_prompts(count, length, seed)
    return [[token % vocabulary for token in prompt] for prompt in drawn]


def greedy_texts(engine: Timed, vocabulary: int) -> list[list[dict]]:
    """By prompt and step: the token, and the best tokens' log-probabilities."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=COMPARED,
        ignore_eos=True,
        detokenize=False,
        logprobs=5,
    )
    inputs = [
        {"prompt_token_ids": prompts(1, length, length, vocabulary)[0]}
        for length in LENGTHS
    ]
    outputs = engine.llm.generate(inputs, params, use_tqdm=False)
    texts = []
    for output in outputs:
        answer = output.outputs[0]
        steps = [{str(t): p.logprob for t, p in s.items()} for s in answer.logprobs]
        texts.append(
            [{"token": str(t), "best": s} for t, s in zip(answer.token_ids, steps)]
        )
    return texts


def reset(engine: Timed) -> None:
    if engine.is_sparse:
        engine.llm.collective_rpc("reset_sparse_stats")


def read_by_all(engine: Timed) -> dict:
    """Bytes of all ranks, each of which counts its own KV heads; {} without counts."""
    if not engine.is_sparse:
        return {}
    ranks = engine.llm.collective_rpc("sparse_stats")
    read, dense = (
        sum(r[k] for r in ranks) for k in ("kv_bytes_read", "kv_bytes_dense")
    )
    by_rank = [r["kv_bytes_read"] for r in ranks]
    return {
        "kv_bytes_read": read,
        "kv_bytes_read_by_rank": by_rank,
        "kv_share": read / max(1, dense),
    }


def save_model(args: argparse.Namespace) -> None:
    """Random weights in the shape of ``--model``, into ``--checkpoint``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(args.model)
    config.num_hidden_layers = args.layers
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(args.checkpoint)


def compare(texts: list[list[dict]], reference: list[list[dict]]) -> dict:
    """How far texts equal those of one rank.

    16-bit ranks round differently, so texts may part where the best tokens are nearly
    equal; ``gap`` is the largest difference of log-probabilities where they do (None: a
    token was not among the reference's best five), and ``rounding`` the largest one of
    the same token after the same text.
    """
    same, rounding, parted = 0, 0.0, 0
    gap: float | None = 0.0
    for got, want in zip(texts, reference, strict=True):
        for a, b in zip(got, want, strict=True):
            both = a["best"].keys() & b["best"].keys()
            apart = (abs(a["best"][t] - b["best"][t]) for t in both)
            rounding = max(rounding, *apart, 0.0)
            if a["token"] != b["token"]:
                parted += 1
                if gap is not None and a["token"] in b["best"]:
                    gap = max(gap, b["best"][b["token"]] - b["best"][a["token"]])
                else:
                    gap = None
                break
            same += 1
    total = sum(map(len, reference))
    return {
        "equal": same / total,
        "parted": parted,
        "of": len(reference),
        "gap": gap,
        "rounding": rounding,
    }


def in_subprocess(part: str, checkpoint: str, seconds: float) -> dict:
    """What a part of the script wrote, or {"error": the end of what it printed}."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.serving.tensor_parallel"]
        command += [*sys.argv[1:], "--part", part, "--checkpoint", checkpoint]
        command += ["--output", str(result)]
        with running(command, log) as process:
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return {"error": f"not done after {seconds:g} s"}
        if code == 0:
            return json.loads(result.read_text())
        text = log.read_text()
        print(text[-3000:], flush=True)
        # The first error is the cause, processes above repeat that there was one.
        error = re.search(r"^(\(\w+ pid=\d+\) )?\w*Error: .*", text, re.MULTILINE)
        return {"error": error[0] if error else f"exit status {code}"}


def print_tables(results: list[dict]) -> None:
    print("| what | context | backend | ranks | batch | ms | KV read |")
    print("|---|---|---|---|---|---|---|")
    for result in results:
        who = f"{result['backend']} | {result['ranks']}"
        for r in result.get("rows", []):
            share = f"{100 * r['kv_share']:.1f} %" if "kv_share" in r else ""
            print(
                f"| {r['kind']} | {r['context']} | {who} | {r['batch']} "
                f"| {r['ms']:.2f} | {share} |"
            )
    for result in results:
        who = f"{result['backend']}, {result['ranks']}"
        if "error" in result:
            print(f"{who}: {result['error']}")
        if "compared" in result:
            c = result["compared"]
            gap = "unknown" if c["gap"] is None else f"at most {c['gap']:.3f} nats"
            print(
                f"{who}: {100 * c['equal']:.1f} % of the tokens lie before texts part "
                f"from one rank's; {c['parted']} of {c['of']} texts do, at differences "
                f"of {gap}; the same token differs by up to "
                f"{c['rounding']:.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--engines", nargs="+", default=DEFAULT, help="backend:ranks, ranks of " + NAMES
    )
    add(
        "--sparse",
        default='{"top_k": 1024, "rank": 32}',
        help="our options, JSON",
    )
    add("--model", type=Path, required=True)
    add("--layers", type=int, default=16)
    add("--cases", nargs="+", default=["4x32000", "16x32000"], help="batch x context")
    add("--ttft-lengths", type=int, nargs="*", default=[32000])
    add("--tokens", type=int, default=128, help="decode steps timed")
    add("--repeats", type=int, default=2)
    add("--max-model-len", type=int, default=40960)
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--kv-cache-gib", type=float, help="of a rank; default: what memory allows")
    add("--seconds", type=float, default=120, help="that one engine may take")
    add("--enforce-eager", action="store_true", help="no CUDA graphs")
    add(
        "--compilation-config",
        default='{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}',
    )
    add("--output", type=Path)
    # Set by the script itself, for one engine in a child process.
    add("--part", help=argparse.SUPPRESS)
    add("--checkpoint", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in args.engines:
        if name.partition(":")[2] not in RANKS:
            parser.error(f"--engines {name}: expected backend:ranks, ranks of {NAMES}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    exit_on_signals()
    if args.part == "save":
        save_model(args)
        args.output.write_text("{}")
        return
    if args.part:
        backend, _, ranks = args.part.partition(":")
        args.output.write_text(json.dumps(measure(args, backend, ranks)))
        return
    results = []
    with tempfile.TemporaryDirectory() as checkpoint:
        print("weights ...", flush=True)
        # In a process of its own, which leaves no CUDA context behind.
        saved = in_subprocess("save", checkpoint, args.seconds)
        if "error" in saved:
            raise SystemExit(saved["error"])
        references = {}
        for name in args.engines:
            print(f"{name} ...", flush=True)
            backend, _, ranks = name.partition(":")
            result = {"backend": backend, "ranks": ranks}
            result |= in_subprocess(name, checkpoint, args.seconds)
            texts = result.pop("texts", None)
            if ranks == "one":
                references[backend] = texts
            elif texts and references.get(backend):
                result["compared"] = compare(texts, references[backend])
            results.append(result)
            save(args, results, hidden=INTERNAL)
    print_tables(results)
    if any("error" in result for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

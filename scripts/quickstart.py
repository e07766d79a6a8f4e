#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Ask four questions about a long document: dense, sparse and lossless, side by side.

The document is Python's own language reference, which ships with Python, with four
facts hidden in it. The questions run as one batch and share the document's KV blocks
through vLLM's prefix cache. The lossless engine drafts with sparse attention and
verifies with dense attention. Each engine runs in a process of its own.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ENGINES = ("dense", "sparq", "lossless")
PREFILL_CHUNK = 1024  # tokens of one engine step
HEADER = (
    "Some facts that do not belong here are hidden within the following text. "
    "Make sure to memorize them. I will quiz you about them afterwards."
)
# What is asked for and its value; the depth is where in the document it is said.
FACTS = (
    ("passcode of the north gate", "4918273", 0.15),
    ("telephone number of the observatory", "7305518", 0.40),
    ("serial number of the steam engine", "2846690", 0.60),
    ("account number of the bakery", "9150364", 0.85),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint folder (default: get_model.py's)")
    parser.add_argument(
        "--context",
        type=int,
        default=6000,
        help="document length in tokens (default: %(default)s, at most 7900)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=48,
        help="tokens decoded per question (default: %(default)s)",
    )
    parser.add_argument(
        "--sparse",
        type=json.loads,
        default={},
        metavar="JSON",
        help="""options of the sparse engines, e.g. '{"top_k": 0.0625}'""",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of weights and KV (default: bfloat16; float32 on CPUs without AVX-512)",
    )
    # Used by the script itself: one engine in a child process, and a health check.
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def build_prompts(tokenizer, num_tokens: int) -> list[str]:
    """One prompt per fact: the same document of ``num_tokens``, another question."""
    from pydoc_data.topics import topics

    paragraphs: list[str] = []
    for name in sorted(topics):
        for paragraph in topics[name].strip().split("\n\n"):
            num_tokens -= len(tokenizer(paragraph + "\n\n").input_ids)
            if num_tokens < 0:
                break
            paragraphs.append(paragraph)
        if num_tokens < 0:
            break
    # From the back, so that a depth is not moved by the facts before it.
    for what, value, depth in reversed(FACTS):
        paragraphs.insert(int(depth * len(paragraphs)), f"The {what} is {value}.")
    document = "\n\n".join([HEADER, *paragraphs])
    return [f"{document}\n\nWhat is the {what}? The {what} is" for what, _, _ in FACTS]


def run_engine(args: argparse.Namespace) -> dict:
    """Load one engine, answer the questions, and measure.

    Returns:
        ``answers`` (text per question), ``tokens`` (their ids), ``prompt_tokens`` (of
        the first prompt), ``ttft_s`` (until every question has its first token),
        ``tokens_per_s`` (decode, whole batch, from the median step), ``kv_bytes`` and
        ``kv_bytes_dense`` (read per decoded token, all layers).
    """
    # In this process: a separate engine core would import everything a second time.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Some messages come before vLLM sets its own level from the same variable.
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))
    from vllm import LLM, SamplingParams

    options = {}
    if args.engine != "dense":
        sparse = dict(args.sparse)
        if args.engine == "lossless":
            # So few steps are over before the engine has measured how many drafts pay.
            sparse = {"lossless": True, "draft_adapt": False} | sparse
        options = {
            "attention_backend": "sparq",
            "additional_config": {"sparse": sparse},
            "worker_extension_cls": "vllm_sparse.worker.WorkerExtension",
        }
    llm = LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=8192,
        max_num_seqs=len(FACTS),
        max_num_batched_tokens=PREFILL_CHUNK,
        use_tqdm_on_load=False,
        # Compiling takes minutes on CPU, and these few steps would not repay it.
        enforce_eager=True,
        **options,
    )
    greedy = SamplingParams(
        temperature=0, max_tokens=args.max_tokens, ignore_eos=True, detokenize=True
    )
    llm.generate("Hello", SamplingParams(max_tokens=4), use_tqdm=False)  # warm up

    prompts = build_prompts(llm.get_tokenizer(), args.context)
    engine = llm.llm_engine
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy)
    outputs = {}

    def step() -> float:
        """Advance every question by one engine step; seconds it took."""
        start = time.perf_counter()
        for output in engine.step():
            outputs[int(output.request_id)] = output
        return time.perf_counter() - start

    ttft = 0.0
    with progress_bar(args.engine, "reading", args.context) as progress:
        while len(outputs) < len(prompts):
            ttft += step()
            progress.update(min(PREFILL_CHUNK, progress.total - progress.n))
    if args.engine != "dense":
        llm.collective_rpc("reset_sparse_stats")
    step_times, read = [], num_tokens(outputs)
    with progress_bar(args.engine, "answering", args.max_tokens) as progress:
        while engine.has_unfinished_requests():
            step_times.append(step())
            decoded = num_tokens(outputs) - read
            progress.update(decoded // len(prompts) - progress.n)

    context = len(outputs[0].prompt_token_ids) + args.max_tokens / 2
    kv_bytes = kv_bytes_dense = context * kv_bytes_per_token(llm)
    if args.engine != "dense":
        kv_bytes = llm.collective_rpc("sparse_stats")[0]["kv_bytes_read"] / decoded
    return {
        "answers": [outputs[i].outputs[0].text for i in range(len(prompts))],
        "tokens": [outputs[i].outputs[0].token_ids for i in range(len(prompts))],
        "prompt_tokens": len(outputs[0].prompt_token_ids),
        "ttft_s": ttft,
        "tokens_per_s": decoded / len(step_times) / statistics.median(step_times),
        "kv_bytes": kv_bytes,
        "kv_bytes_dense": kv_bytes_dense,
    }


def num_tokens(outputs: dict) -> int:
    """Tokens of all answers so far."""
    return sum(len(output.outputs[0].token_ids) for output in outputs.values())


def progress_bar(engine: str, phase: str, total: int):
    """A tqdm bar over tokens of one sequence; sparing where nobody watches it."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 10
    description = f"{engine}: {phase:<9}"
    return tqdm(total=total, desc=description, unit="tok", mininterval=interval)


def kv_bytes_per_token(llm) -> int:
    """Bytes of one token's K and V in all layers."""
    model = llm.llm_engine.model_config
    config = model.hf_text_config
    per_layer = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return per_layer * config.num_hidden_layers


def usual_dtype() -> str:
    """As the model is kept; but CPUs whose widest vectors are AVX2's multiply 16-bit
    numbers so slowly that a prompt takes several times as long."""
    import torch

    narrow = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    slow = narrow and x86 and not torch.cuda.is_available()
    return "float32" if slow else "bfloat16"


def run_child(engine: str, args: argparse.Namespace) -> dict:
    """Run one engine in a child process and return what it measured.

    Raises:
        SystemExit: when the child fails; its error is on stderr by then.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--engine", engine, "--model", args.model]
        command += ["--context", str(args.context), "--result", str(result)]
        command += ["--max-tokens", str(args.max_tokens), "--dtype", args.dtype]
        command += ["--sparse", json.dumps(args.sparse)]
        print(f"{engine}: loading", file=sys.stderr)
        code = subprocess.run(command).returncode
        if code != 0:
            raise SystemExit(f"the {engine} engine failed (exit status {code})")
        return json.loads(result.read_text())


def print_comparison(results: dict[str, dict], num_tokens: int, dtype: str) -> None:
    """Print the engines' answers and measurements in columns."""
    columns = [results[engine] for engine in ENGINES]
    dense, sparse, lossless = columns
    rows = []
    for i, (what, value, _) in enumerate(FACTS):
        rows.append([what, *(judged(r["answers"][i], value) for r in columns)])
    rows.append([])
    for label, cell in (
        ("tokens as dense's", lambda r: f"{same_tokens(r, dense)} of {len(FACTS)}"),
        ("time to first token", lambda r: f"{r['ttft_s']:.1f} s"),
        ("decode speed, batch of 4", lambda r: f"{r['tokens_per_s']:.1f} tokens/s"),
        ("KV read per decoded token", lambda r: f"{r['kv_bytes'] / 1e6:.1f} MB"),
        (
            "fraction of KV read",
            lambda r: f"{100 * r['kv_bytes'] / r['kv_bytes_dense']:.1f} %",
        ),
    ):
        rows.append([label, *map(cell, columns)])
    print(
        f"\n{len(FACTS)} questions about one document of {dense['prompt_tokens']:,} "
        f"tokens, {num_tokens} tokens decoded for each, {dtype}\n"
    )
    for row in [["", *ENGINES], *rows]:
        print("  {:<38}{:<18}{:<18}{}".format(*row) if row else "")
    same = sum(
        first_line(a) == first_line(b)
        for a, b in zip(dense["answers"], sparse["answers"])
    )
    print(
        f"\n  sparq decodes at {sparse['tokens_per_s'] / dense['tokens_per_s']:.2f} "
        f"times the speed of dense and reads 1/"
        f"{sparse['kv_bytes_dense'] / sparse['kv_bytes']:.1f} of the KV cache; "
        f"{same} of {len(FACTS)} answers are the same.\n"
        f"  lossless: {lossless['tokens_per_s'] / dense['tokens_per_s']:.2f} times; "
        f"{verdict(same_tokens(lossless, dense))}.\n"
        "  It always drafts here, to show that; by itself it drafts where that pays: "
        "on GPUs, many long\n  requests (docs/lossless.md).\n"
        "  The engines ran one after the other: where the machine has other work, "
        "repeat\n  before comparing speeds "
        "(benchmarks.serving.decode measures in turns)."
    )


def same_tokens(result: dict, dense: dict) -> int:
    """Questions with the same tokens as dense attention's, from first to last."""
    return sum(a == b for a, b in zip(result["tokens"], dense["tokens"]))


def verdict(same: int) -> str:
    """What the lossless engine's ``same`` questions say."""
    if same == len(FACTS):
        return "every token is dense's, by construction"
    return (
        "its tokens are dense's by construction, but for\n  near ties, which sums "
        "can round otherwise when several tokens are verified at once"
    )


def first_line(answer: str) -> str:
    return answer.strip().split("\n")[0]


def judged(answer: str, value: str) -> str:
    """The answer's beginning and whether it holds ``value``."""
    right = first_line(answer).startswith(value)
    return f"{first_line(answer)[:9]:<9} {'right' if right else 'WRONG'}"


def is_healthy(port: int) -> bool:
    """Whether a vLLM server answers on ``port``."""
    try:
        urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
    except (urllib.error.URLError, OSError):
        return False
    return True


def main() -> None:
    args = parse_args()
    if args.probe is not None:
        sys.exit(not is_healthy(args.probe))
    if args.model is None:
        from get_model import get_model

        args.model = str(get_model())
    if args.engine is not None:
        args.result.write_text(json.dumps(run_engine(args)))
        return
    args.dtype = args.dtype or usual_dtype()
    results = {engine: run_child(engine, args) for engine in ENGINES}
    print_comparison(results, args.max_tokens, args.dtype)


if __name__ == "__main__":
    main()

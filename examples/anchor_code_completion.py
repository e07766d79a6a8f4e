#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Complete a long Python file by a model whose old lines leave anchors, and by
its control with dense attention; what that takes in time and memory.

    python examples/anchor_code_completion.py --anchor FOLDER --control FOLDER

The folders are what ``python -m vllm_sparse.train merge`` makes of the two arms that
docs/training.md trains. **A model that was not trained with anchors answers nonsense**
under --anchor, whoever wrote an anchors.json beside it: only its speed and memory mean
something then. On CPUs see docs/serving.md for the preload that speed depends on.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

KV_CACHE_BYTES = 2**31
LINES_SHOWN = 8  # of what the file goes on with


def split(file: Path) -> tuple[str, str]:
    """Cut a text at the end of a line, three quarters down."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) * 3 // 4
    return "".join(lines[:cut]), "".join(lines[cut:])


def held(llm, anchors: bool) -> str:
    """What the request holds of the KV cache at present."""
    from vllm_sparse.stats import live_figures

    if anchors:
        figures = live_figures(llm)
        size, back = figures.kv_bytes_held, figures.blocks_given_back
        return f"{size / 2**20:.2f} MiB of KV held, {back} blocks given back"
    # Live figures are of our backends; vLLM's own say a share of the cache.
    name = "vllm:kv_cache_usage_perc"
    (share,) = (m.value for m in llm.get_metrics() if m.name == name)
    return f"{share * KV_CACHE_BYTES / 2**20:.2f} MiB of KV held"


def complete(folder: str, text: str, tokens: int, anchors: bool) -> None:
    """Print what a model goes on with, and what that took."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    prompt = AutoTokenizer.from_pretrained(folder)(text).input_ids
    llm = LLM(
        folder,
        attention_backend="anchor" if anchors else None,
        max_model_len=len(prompt) + tokens,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        enforce_eager=True,  # compiling takes minutes on CPUs
        disable_log_stats=False,  # for the share of the cache
    )
    # Both arms take as many steps.
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    llm.enqueue({"prompt_token_ids": prompt}, params, use_tqdm=False)
    seconds, memory = [], ""
    while llm.llm_engine.has_unfinished_requests():
        if seconds:
            memory = held(llm, anchors)
        start = time.perf_counter()
        outputs = llm.llm_engine.step()
        seconds.append(time.perf_counter() - start)
    reading, decoding = seconds[: 1 - tokens], seconds[1 - tokens :]
    step = statistics.median(decoding)
    print(
        f"\n--- {'anchor' if anchors else 'control, dense attention'}: {folder}\n"
        f"{outputs[0].outputs[0].text}\n"
        f"--- {len(prompt)} tokens read in {sum(reading):.2f} s, "
        f"then {step * 1e3:.1f} ms a token ({1 / step:.1f} tokens/s); {memory}",
        flush=True,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--anchor", required=True, metavar="FOLDER", help="trained with anchors")
    add("--control", required=True, metavar="FOLDER", help="trained without")
    add("--file", type=Path, default=contextlib.__file__, help="default: %(default)s")
    add("--tokens", type=int, default=64, help="of a completion")
    args = parser.parse_args()
    if args.tokens < 2:
        parser.error("--tokens must be at least 2: steps after the first are timed")
    return args


def main() -> None:
    args = parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Asked in its own process, an engine waits; in another it runs ahead.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would replace KV_CACHE_BYTES
    text, rest = split(args.file)
    print(f"--- {args.file} goes on:\n{''.join(rest.splitlines(True)[:LINES_SHOWN])}")
    # vLLM gives memory back when its process ends.
    spawn = multiprocessing.get_context("spawn")
    for folder, anchors in (args.anchor, True), (args.control, False):
        process = spawn.Process(
            target=complete, args=(folder, text, args.tokens, anchors)
        )
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{folder} is not served, for the reason above")


if __name__ == "__main__":
    main()

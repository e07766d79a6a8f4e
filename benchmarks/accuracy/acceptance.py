# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How many drafted tokens dense attention accepts, by method, budget and context.

    python -m benchmarks.accuracy.acceptance --methods sparq sparq:rank=12 window \\
        --budgets 0.125 0.0625 --lengths 2000 4000 7500 --output FILE

Every sample's context is fresh text, and few tokens are generated after it: greedy
answers of small models repeat themselves, and repetition is easy to draft. One engine
serves all methods, as they are options of its drafts. ``--ngram`` measures vLLM's
prompt lookup with as many drafts. Acceptance is that of a drafted token where all
before it were accepted.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.accuracy.methods import ModelShape, options_for, parse_method
from benchmarks.accuracy.tasks import make_samples
from benchmarks.accuracy.text import TextSources
from benchmarks.environment import save
from scripts.get_model import get_model

PREFIX = "vllm:spec_decode_num_"


def start(args: argparse.Namespace, lossless: bool):
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    settings: dict[str, Any] = {
        "attention_backend": "sparq",
        "additional_config": {"sparse": drafting(args)},
        "worker_extension_cls": "vllm_sparse.worker.WorkerExtension",
    }
    if not lossless:
        settings = {
            "attention_backend": "cpu_attn" if on_cpu else "flash_attn",
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": args.drafts,
                "prompt_lookup_max": 4,
                "prompt_lookup_min": 2,
            },
        }
    return LLM(
        model=str(args.model),
        dtype=args.dtype or ("float32" if on_cpu else "bfloat16"),
        max_model_len=max(args.lengths) + args.tokens + 128,
        max_num_seqs=args.samples,
        kv_cache_memory_bytes=int(args.kv_cache_gib * 2**30),
        enforce_eager=True,
        disable_log_stats=False,
        seed=0,
        **settings,
    )


def drafting(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "lossless": True,
        "draft_tokens": args.drafts,
        "draft_adapt": False,
        "draft_above": 0,
    }


def counts(llm) -> dict[str, Any]:
    metrics = [m for m in llm.get_metrics() if m.name.startswith(PREFIX)]
    return {
        m.name.removeprefix(PREFIX): getattr(m, "value", getattr(m, "values", 0))
        for m in metrics
    }


def measure(llm, args, prompts: list[list[int]], temperature: float) -> dict[str, Any]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=temperature, max_tokens=args.tokens, ignore_eos=True
    )
    before = counts(llm)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    after = counts(llm)
    by_place = [
        now - then
        for now, then in zip(
            after["accepted_tokens_per_pos"],
            before.get("accepted_tokens_per_pos") or [0] * args.drafts,
        )
    ]
    verified = after["drafts"] - before["drafts"]
    drafted = after["draft_tokens"] - before["draft_tokens"]
    accepted = after["accepted_tokens"] - before["accepted_tokens"]
    # Verifications that did not accept all; the last one of an answer is cut.
    rejected = verified - by_place[-1]
    kinds = [len(set(output.outputs[0].token_ids)) for output in outputs]
    return {
        "temperature": temperature,
        "verified": verified,
        "drafted": drafted,
        "accepted": accepted,
        "accepted_by_place": by_place,
        "acceptance": accepted / max(1, accepted + rejected),
        "length": 1 + accepted / max(1, verified),
        "different_tokens": sum(kinds) / len(kinds) / args.tokens,
    }


def print_table(rows: list[dict[str, Any]], drafts: int) -> None:
    print(f"| context | text | T | method | KV budget | acceptance | of {drafts} |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['context']} | {row['task']} | {row['temperature']:g} "
            f"| {row['method']} | {row['budget'] or ''} | {row['acceptance']:.3f} "
            f"| {row['length'] - 1:.2f} |"
        )


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--methods", nargs="+", default=["sparq"], help="selector[:option=value]")
    add("--budgets", type=float, nargs="+", default=[0.125], help="of dense KV bytes")
    add("--lengths", type=int, nargs="+", default=[2000])
    add("--tasks", nargs="+", default=["prose", "code", "needle"])
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    add("--samples", type=int, default=16, help="contexts of each kind")
    add("--tokens", type=int, default=32, help="generated after each")
    add("--drafts", type=int, default=5)
    add("--ngram", action="store_true", help="vLLM's prompt lookup instead of ours")
    add("--dtype", help="default: float32 on CPUs, else bfloat16")
    add("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    add("--kv-cache-gib", type=float, default=6)
    add("--output", type=Path)
    args = parser.parse_args()
    args.model = args.model or get_model()
    llm = start(args, not args.ngram)
    config = llm.llm_engine.vllm_config.model_config.hf_text_config
    itemsize = 4 if llm.llm_engine.vllm_config.model_config.dtype.itemsize == 4 else 2
    head_size = config.hidden_size // config.num_attention_heads
    shape = ModelShape(head_size, config.num_hidden_layers, itemsize)
    sources = TextSources(llm.get_tokenizer())
    methods = [] if args.ngram else [parse_method(text) for text in args.methods]
    runs: list[tuple] = [("ngram", None, None)] if args.ngram else []
    for method in methods:
        budgets = args.budgets if method.takes_budget else [None]
        runs += [(method.label, budget, method) for budget in budgets]
    rows: list[dict[str, Any]] = []
    cases = [(length, task) for length in args.lengths for task in args.tasks]
    with tqdm(total=len(cases) * len(runs), disable=None) as bar:
        for length, task in cases:
            samples = make_samples(task, sources, length, args.samples)
            prompts = [sample.prompt_ids for sample in samples]
            for label, budget, method in runs:
                bar.update()
                if method is not None:
                    options = options_for(method, budget, length, shape)
                    if options is None:
                        continue
                    options |= drafting(args)
                    llm.collective_rpc("reconfigure_sparse", args=(options,))
                case = {"context": length, "task": task, "method": label}
                for temperature in args.temperatures:
                    found = measure(llm, args, prompts, temperature)
                    rows.append(case | {"budget": budget} | found)
                save(args, rows)
    print_table(rows, args.drafts)
    print(json.dumps(overall(rows), indent=1))


def overall(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Acceptance of each method over all texts and temperatures."""
    result = {}
    for key in {(r["method"], r["budget"], r["context"]) for r in rows}:
        own = [r for r in rows if (r["method"], r["budget"], r["context"]) == key]
        accepted = sum(r["accepted"] for r in own)
        tried = sum(r["accepted"] / max(r["acceptance"], 1e-9) for r in own)
        result[" ".join(map(str, key))] = round(accepted / max(tried, 1e-9), 4)
    return dict(sorted(result.items()))


if __name__ == "__main__":
    main()

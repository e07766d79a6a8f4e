# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Whole-engine decode speed and time to first token, backends side by side.

    python -m benchmarks.serving.decode --backends cpu_attn sparq \\
        --output benchmarks/results/serving_NAME.json

One engine per backend, alive at the same time and measured in turns, so that both see
the same machine. Prompts are random tokens; prefix caching keeps them, so a decode
measurement is (time of 1 + N tokens) - (time of 1 token), divided by N.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.accuracy.environment import describe
from scripts.get_model import get_model

OURS = ("sparq", "twilight")  # backends that take options of ours


class Timed:
    """One engine and its measurements."""

    def __init__(self, backend: str, **settings) -> None:
        """Start it; ``settings`` are those of ``vllm.LLM``."""
        from vllm import LLM

        self.backend = backend
        self.is_sparse = backend in OURS
        if self.is_sparse:
            settings["worker_extension_cls"] = "vllm_sparse.worker.WorkerExtension"
        self.llm = LLM(
            attention_backend=backend,
            dtype="bfloat16",
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            **{"disable_log_stats": True} | settings,
        )

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        """Time to generate ``tokens`` for every prompt, all prompts together."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": p} for p in prompts]
        start = time.perf_counter()
        self.llm.generate(inputs, params, use_tqdm=False)
        return time.perf_counter() - start

    def decode_step(
        self, prompts: list[list[int]], tokens: int, before: int = 1
    ) -> float:
        """Seconds per decode step; the prompts must be in the prefix cache.

        Args:
            before: tokens of the shorter run, which is subtracted. One is cheap; more
                than that decode while later prompts arrive in both runs, not in one.
        """
        first = self.seconds(prompts, before)
        return (self.seconds(prompts, before + tokens) - first) / tokens

    def steps(self, prompts: list[list[int]], tokens: int) -> list[float]:
        """Seconds between the outputs of steps in which all prompts decode.

        Their median is steadier than :meth:`decode_step` where a step takes few
        milliseconds: what happens before and after does not enter.

        Raises:
            RuntimeError: the prompts never decode all together.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        for i, prompt in enumerate(prompts):
            engine.add_request(f"timed-{i}", {"prompt_token_ids": prompt}, params)
        found, last = [], None
        while engine.has_unfinished_requests():
            outputs, now = engine.step(), time.perf_counter()
            everyone = len(outputs) == len(prompts)
            if everyone and last is not None:
                found.append(now - last)
            last = now if everyone else None
        if not found:
            raise RuntimeError("prompts do not decode together: more tokens are needed")
        return found

    def configure(self, options: dict | None) -> None:
        """Switch to other options of our backend; None where it is vLLM's own."""
        if options is not None:
            self.llm.collective_rpc("reconfigure_sparse", args=(options,))

    def kv_share(self) -> float | None:
        """Share of the dense KV bytes read since the last call."""
        if not self.is_sparse:
            return None
        (stats,) = self.llm.collective_rpc("sparse_stats")
        self.llm.collective_rpc("reset_sparse_stats")
        return stats["kv_bytes_read"] / max(1, stats["kv_bytes_dense"])


def make_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    # With the seed alone, longer prompts would begin as shorter ones do, and find them
    # in the prefix cache.
    generator = torch.Generator().manual_seed(seed * 10**6 + length)
    ids = torch.randint(1000, 40000, (count, length), generator=generator)
    return ids.tolist()


def run(args: argparse.Namespace) -> list[dict]:
    # Label, engine, options: our engine is measured once per set of options.
    variants: list[tuple[str, Timed, dict | None]] = []
    for backend in args.backends:
        engine = Timed(
            backend,
            model=str(args.model or get_model()),
            max_model_len=args.max_model_len,
            max_num_seqs=max(args.batches),
            kv_cache_memory_bytes=int(args.kv_cache_gib * 2**30),
            enforce_eager=not args.compile,
        )
        if not engine.is_sparse:
            variants.append((backend, engine, None))
            continue
        for text in args.sparse:
            label = f"{backend} {text}" if len(args.sparse) > 1 else backend
            variants.append((label, engine, json.loads(text)))
    cases = [("ttft", n, 1) for n in args.ttft_lengths]
    cases += [("decode", n, b) for n in args.lengths for b in args.batches]
    rows = []
    bar = tqdm(total=len(cases) * args.repeats)
    for kind, length, batch in cases:
        bar.set_description(f"{kind} {length} x {batch}")
        times: dict[str, list[float]] = {label: [] for label, *_ in variants}
        shares: dict[str, float | None] = {}
        prompts = make_prompts(batch, length, seed=length + batch)
        if kind == "decode":
            for engine in dict.fromkeys(engine for _, engine, _ in variants):
                engine.seconds(prompts, 1)
        for repeat in range(args.repeats):
            for number, (label, engine, options) in enumerate(variants):
                engine.configure(options)
                engine.kv_share()
                if kind == "ttft":  # prompts never seen before
                    seed = 10**6 + 100 * repeat + number
                    seconds = engine.seconds(make_prompts(1, length, seed), 1)
                else:
                    seconds = engine.decode_step(prompts, args.tokens)
                    shares[label] = engine.kv_share()
                times[label].append(seconds)
            bar.update()
        for label, _, options in variants:
            seconds = statistics.median(times[label])
            row = {
                "kind": kind,
                "backend": label,
                "sparse": options,
                "context": length,
                "batch": batch,
                "ms": seconds * 1e3,
                "all_ms": [t * 1e3 for t in times[label]],
            }
            if kind == "decode":
                row |= {
                    "tokens_per_s": batch / seconds,
                    "kv_share": shares[label],
                }
            rows.append(row)
    bar.close()
    return rows


def print_table(rows: list[dict]) -> None:
    print("| what | context | batch | backend | ms | vs first | KV read |")
    print("|---|---|---|---|---|---|---|")
    base = {}
    for row in rows:
        key = (row["kind"], row["context"], row["batch"])
        first = base.setdefault(key, row["ms"])
        share = row.get("kv_share")
        print(
            f"| {row['kind']} | {row['context']} | {row['batch']} | {row['backend']} "
            f"| {row['ms']:.1f} | {first / row['ms']:.2f}x "
            f"| {'' if share is None else f'{100 * share:.1f} %'} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backends", nargs="+", default=["cpu_attn", "sparq"])
    add = parser.add_argument
    add("--sparse", nargs="+", default=["{}"], help="options of sparq, as JSON each")
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8000])
    parser.add_argument("--ttft-lengths", type=int, nargs="*", default=[6000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=48, help="decode steps timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--kv-cache-gib", type=float, default=2.5)
    parser.add_argument("--compile", action="store_true", help="not enforce_eager")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    rows = run(args)
    print_table(rows)
    if args.output:
        options = {k: str(v) for k, v in vars(args).items() if k != "output"}
        header = describe() | {"options": options}
        args.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

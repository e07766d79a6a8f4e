# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Measure methods against dense decoding.

    python -m benchmarks.accuracy.run --tasks repetition needle --lengths 4096 \\
        --methods sparq exact quest window --budgets 0.125 0.0625 --samples 10 \\
        --output benchmarks/results/accuracy_4k.json
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from benchmarks.accuracy import metrics
from benchmarks.accuracy.methods import Method, options_for, parse_method
from benchmarks.accuracy.metrics import ForcedResult
from benchmarks.accuracy.tasks import TASKS, Sample, make_samples
from benchmarks.accuracy.text import TextSources
from vllm_sparse.config import SELECTOR_NAMES

if TYPE_CHECKING:  # imports vLLM, which only main() needs
    from benchmarks.accuracy.engine import Engine, EngineOptions

DENSE = Method("dense")


@dataclass(frozen=True)
class Plan:
    """What is measured: every method and budget on every task and length."""

    tasks: Sequence[str] = tuple(TASKS)
    lengths: Sequence[int] = (4096,)
    # As parse_method reads them. Dense always runs, first: it is the baseline.
    methods: Sequence[str] = ("sparq", "exact", "quest", "window")
    # Target shares of the dense KV bytes.
    budgets: Sequence[float] = (0.125, 0.0625)
    samples: int = 10

    def runs(self) -> list[tuple[Method, float | None]]:
        runs: list[tuple[Method, float | None]] = [(DENSE, None)]
        for method in map(parse_method, self.methods):
            if method.takes_budget:
                runs += [(method, budget) for budget in self.budgets]
            elif method != DENSE:
                runs.append((method, None))
        return runs


def run(
    plan: Plan,
    engine: "Engine",
    progress: bool = True,
    save: Callable[[list[dict]], None] = lambda records: None,
) -> list[dict]:
    """One record per task, length, method and budget; samples keep raw values.

    ``save`` gets the records so far after each task and length: runs take hours.
    A method that cannot meet a budget gets a record with ``skipped`` and no samples.
    """
    sources = TextSources(engine.tokenizer)
    records = []
    total = len(plan.tasks) * len(plan.lengths) * len(plan.runs())
    with tqdm(total=total, disable=not progress) as bar:
        for length in plan.lengths:
            for task in plan.tasks:
                samples = make_samples(task, sources, length, plan.samples)
                bar.set_description(f"{task} {length}: prefill")
                engine.configure(options_for(DENSE, None, length, engine.shape))
                engine.prefill(samples)
                dense: list[ForcedResult] | None = None
                for method, budget in plan.runs():
                    bar.set_description(f"{task} {length}: {method.label} {budget}")
                    record = {
                        "task": task,
                        "length": length,
                        "method": method.label,
                        "budget": budget,
                    }
                    options = options_for(method, budget, length, engine.shape)
                    if options is None:
                        record["skipped"] = (
                            "estimate, dense layers, sinks and window exceed it"
                        )
                    else:
                        measured, results = _measure(
                            engine, sources, samples, options, dense
                        )
                        record |= measured
                        dense = dense or results
                    records.append(record)
                    bar.update()
                save(records)
    return records


def _measure(
    engine: "Engine",
    sources: TextSources,
    samples: list[Sample],
    options: dict,
    dense: list[ForcedResult] | None,
) -> tuple[dict, list[ForcedResult]]:
    engine.configure(options)
    engine.reset_stats()
    start = time.perf_counter()
    results = engine.force(samples)
    asks = samples[0].answer is not None
    answers = engine.answer(samples) if asks else [None] * len(samples)
    seconds = time.perf_counter() - start
    stats = engine.stats()
    values = []
    for index, (sample, result, base, text) in enumerate(
        zip(samples, results, dense or results, answers, strict=True)
    ):
        chars = len(sources.decode(sample.forced_ids[1:]))
        value = {
            "index": index,
            "depth": sample.depth,
            "bits_per_char": metrics.bits_per_char(result, chars),
            "top1": metrics.top1(result, sample.forced_ids),
            "agreement": metrics.agreement(result, base),
            "kl": metrics.kl_nats(result, base),
        }
        if text is not None:
            value |= {"hit": float(sample.answer in text), "text": text}
        values.append(value)
    measured = {
        "options": options,
        "kv_share": stats and stats["kv_bytes_read"] / max(stats["kv_bytes_dense"], 1),
        "stats": stats,
        "seconds": round(seconds, 2),
        "samples": values,
    }
    return measured, results


def write_result(
    path: Path, plan: Plan, options: "EngineOptions", records: list[dict]
) -> None:
    from benchmarks.accuracy.environment import describe

    engine = asdict(options) | {"model": Path(options.model).name}
    header = describe() | {
        "engine": engine,
        "plan": asdict(plan),
        "kl": f"lower bound over dense's top {metrics.TOP_LOGPROBS} tokens, nats",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"header": header, "records": records}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    from benchmarks.accuracy.engine import Engine, EngineOptions

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=["repetition", "needle", "code"])
    add("--lengths", nargs="+", type=int, default=[4096])
    add(
        "--methods",
        nargs="+",
        default=Plan.methods,
        help=f"selector[:option=value]..., selector one of {', '.join(SELECTOR_NAMES)}",
    )
    add("--budgets", nargs="+", type=float, default=Plan.budgets)
    add("--samples", type=int, default=10)
    add("--model", help="a model in HF format; default: SmolLM2-135M-Instruct")
    add(
        "--attention-backend",
        default=EngineOptions.attention_backend,
        help="or one of vLLM's, for '--methods dense'",
    )
    add("--max-num-seqs", type=int, default=EngineOptions.max_num_seqs)
    add("--kv-cache-gib", type=float, default=EngineOptions.kv_cache_gib)
    add("--output", type=Path, required=True)
    args = parser.parse_args()
    plan = Plan(args.tasks, args.lengths, args.methods, args.budgets, args.samples)
    plan.runs()  # a typing error shows before the model loads
    options = EngineOptions(
        model=args.model or default_model(),
        attention_backend=args.attention_backend,
        max_num_seqs=args.max_num_seqs,
        kv_cache_gib=args.kv_cache_gib,
    )
    save = partial(write_result, args.output, plan, options)
    records = run(plan, Engine(options), save=save)

    from benchmarks.accuracy.report import markdown

    print(markdown(records))


def default_model() -> str:
    from scripts.get_model import get_model

    return str(get_model())


if __name__ == "__main__":
    main()

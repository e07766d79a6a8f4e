# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Measure methods against dense decoding.

    python -m benchmarks.accuracy.run --tasks repetition needle --lengths 4096 \\
        --methods sparq exact quest window --budgets 0.125 0.0625 --samples 10 \\
        --output benchmarks/results/accuracy_4k.json
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from benchmarks.accuracy import metrics
from benchmarks.accuracy.methods import Method, options_for, parse_method
from benchmarks.accuracy.metrics import ForcedResult
from benchmarks.accuracy.tasks import PACKED_TASKS, TASKS, Sample, make_samples
from benchmarks.accuracy.text import PackedTexts, TextSources
from vllm_sparse.cache.formats import FORMATS
from vllm_sparse.methods import METHODS
from vllm_sparse.selectors import SELECTORS

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
    # Per task and length, or one number for every length.
    samples: int | Sequence[int] = 10

    def samples_of(self, length: int) -> int:
        if isinstance(self.samples, int):
            return self.samples
        return self.samples[self.lengths.index(length)]

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
    sources: TextSources | None = None,
) -> list[dict]:
    """One record per task, length, method and budget; samples keep raw values.

    ``sources`` are where texts come from, by itself Python's own distribution.
    ``save`` gets the records so far after each method: runs take hours.
    A method that cannot meet a budget gets a record with ``skipped`` and no samples.
    """
    sources = sources or TextSources(engine.tokenizer)
    records = []
    cases = list(product(plan.lengths, plan.tasks))
    with tqdm(total=len(cases) * len(plan.runs()), disable=not progress) as bar:
        for length, task in cases:
            samples = make_samples(task, sources, length, plan.samples_of(length))
            bar.set_description(f"{task} {length}: prefill")
            engine.configure(options_for(DENSE, None, length, engine.shape))
            engine.prefill(samples)
            dense: list[ForcedResult] | None = None
            for method, budget in plan.runs():
                bar.set_description(f"{task} {length}: {method.label} {budget}")
                record = {"task": task, "length": length}
                record |= {"method": method.label, "budget": budget}
                options = options_for(method, budget, length, engine.shape)
                if options is None:
                    why = "estimate, dense layers, sinks and window exceed it"
                    record["skipped"] = why
                else:
                    measure = partial(_measure, engine, sources, samples)
                    measured, results = measure(options, dense)
                    record |= measured
                    dense = dense or results
                records.append(record)
                save(records)
                bar.update()
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
    stats, kept = engine.stats(), engine.kept_tokens()
    values = []
    for index, (sample, result, base, text) in enumerate(
        zip(samples, results, dense or results, answers, strict=True)
    ):
        chars = len(sources.decode(sample.forced_ids[1:]))
        value = {
            "index": index,
            "depth": sample.depth,
            "bits_per_char": metrics.bits_per_char(result, chars),
            "nats_per_token": metrics.nats_per_token(result),
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
        "kept_tokens": kept,
        "seconds": round(seconds, 2),
        "samples": values,
    }
    return measured, results


def write_result(
    path: Path,
    plan: Plan,
    options: "EngineOptions",
    texts: str,
    records: list[dict],
) -> None:
    from benchmarks.environment import describe

    engine = asdict(options) | {"model": Path(options.model).name}
    header = describe() | {
        "engine": engine,
        "plan": asdict(plan),
        "texts": texts,
        "kl": f"lower bound over dense's top {metrics.TOP_LOGPROBS} tokens, nats",
        "kept_tokens": "mean, p50, p99 of every KV head's sparse rows, by layer",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = to_json({"header": header, "records": records})
    path.write_text(text + "\n", encoding="utf-8")


def to_json(value: dict) -> str:
    """Indented, but lists and objects of plain values stand on one line."""

    def one_line(match: re.Match) -> str:
        return match[0][0] + re.sub(r"\n\s+", " ", match[1]) + match[0][-1]

    # A line break is never part of a string in JSON.
    text = json.dumps(_rounded(value), indent=1)
    text = re.sub(r"\[\n\s+([^][{}]*?)\n\s*\]", one_line, text)
    return re.sub(r"\{\n\s+([^][{}]*?)\n\s*\}", one_line, text)


def _rounded(value):
    """Numbers of five digits: a sample's error is larger, and files are read."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def main(text: str = __doc__) -> None:
    from benchmarks.accuracy.engine import Engine, EngineOptions

    parser = argparse.ArgumentParser(description=text.split("\n\n")[0])
    add = parser.add_argument
    tasks, usual = [*TASKS, *PACKED_TASKS], ["repetition", "needle", "code"]
    held_out = f"{' and '.join(PACKED_TASKS)} need --texts"
    add("--tasks", nargs="+", choices=tasks, default=usual, help=held_out)
    add("--lengths", nargs="+", type=int, default=[4096])
    names = ", ".join(SELECTORS)
    methods = f"selector[:option=value]..., selector one of {names}"
    add("--methods", nargs="+", default=Plan.methods, help=methods)
    add("--budgets", nargs="+", type=float, default=Plan.budgets)
    counts = "one number, or one for every length"
    add("--samples", nargs="+", type=int, default=[10], help=counts)
    packed = "folder of the training room's packed text, whose held-out streams to use"
    add("--texts", type=Path, help=packed)
    add("--model", help="a name of get_model.py's or a folder in HF format")
    add("--max-model-len", type=int, default=EngineOptions.max_model_len)
    backends = "or one of vLLM's, for '--methods dense'"
    add("--attention-backend", default=EngineOptions.attention_backend, help=backends)
    add("--max-num-seqs", type=int, default=EngineOptions.max_num_seqs)
    add("--kv-cache-gib", type=float, default=EngineOptions.kv_cache_gib)
    several = "of a GPU's; less than vLLM's default where engines share one"
    add("--gpu-memory-utilization", type=float, help=several)
    add("--kv-format", default="auto", choices=FORMATS, help="of our cache")
    add("--kv-cache-dtype", default="auto", help="of vLLM's, with its own backends")
    add("--output", type=Path, required=True)
    args = parser.parse_args()
    if len(args.samples) not in (1, len(args.lengths)):
        parser.error(f"--samples takes 1 or {len(args.lengths)} numbers")
    if args.texts is None and (packed_only := PACKED_TASKS.keys() & args.tasks):
        names = ", ".join(sorted(packed_only))
        parser.error(f"{names}: asked in packed text, give --texts DATA")
    counts = args.samples if len(args.samples) > 1 else args.samples[0]
    plan = Plan(args.tasks, args.lengths, args.methods, args.budgets, counts)
    plan.runs()  # a typing error shows before the model loads
    fields = EngineOptions.__dataclass_fields__.keys() & vars(args).keys()
    given = {name: getattr(args, name) for name in fields}
    options = EngineOptions(**given | {"model": model_path(args.model)})
    # Selectors that loop over rows on the host; they say so themselves.
    chosen = (METHODS[method.selector] for method, _ in plan.runs())
    compares = torch.cuda.is_available() and any(
        "cuda" not in m.devices for m in chosen
    )
    engine = Engine(options, compares)
    sources = TextSources(engine.tokenizer)
    if args.texts is not None:
        sources = PackedTexts(engine.tokenizer, args.texts, Path(options.model))
    save = partial(write_result, args.output, plan, options, sources.origin)
    records = run(plan, engine, save=save, sources=sources)

    from benchmarks.accuracy.report import markdown

    print(markdown(records))


def model_path(model: str | None) -> str:
    """Folder of a model that get_model.py knows, None being its default."""
    from scripts.get_model import DEFAULT, NAMES, get_model

    name = model or DEFAULT
    return str(get_model(name)) if name in NAMES else name


if __name__ == "__main__":
    main()

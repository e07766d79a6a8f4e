# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Compare result files sample by sample: KV formats, or backends.

    python -m benchmarks.accuracy.compare bf16.json int4.json ...

The dense records of the first file are the baseline; all files must have the same
samples (tasks, lengths, seed and Python version).
"""

import argparse
import json
from math import expm1, isfinite
from pathlib import Path
from statistics import mean, stdev


def engine_name(header: dict) -> str:
    engine = header["engine"]
    if engine["attention_backend"] != "sparq":
        return f"{engine['attention_backend']}, {engine['kv_cache_dtype']}"
    return engine.get("kv_format", "auto")


def change(record: dict, baseline: dict) -> str:
    """Mean change of perplexity, its standard error, and hits if any.

    Where a file has none, of bits per character.
    """
    pairs = list(zip(record["samples"], baseline["samples"], strict=True))
    if all("nats_per_token" in sample for pair in pairs for sample in pair):
        key, scale, what = "nats_per_token", 1.0, ""
    else:
        key, what = "bits_per_char", " bits"
        scale = 1 / mean(b[key] for _, b in pairs)
    deltas = [scale * (a[key] - b[key]) for a, b in pairs]
    finite = [delta for delta in deltas if isfinite(delta)]
    error = stdev(finite) / len(finite) ** 0.5 if len(finite) > 1 else 0.0
    middle = mean(finite) if what else expm1(mean(finite))
    text = f"{middle:+.1%} ± {error:.1%}{what}"
    if len(finite) < len(deltas):
        text += f" ({len(deltas) - len(finite)} of {len(deltas)} not finite)"
    if "hit" in record["samples"][0]:
        hits = sum(sample["hit"] for sample in record["samples"])
        text += f", {hits:.0f}/{len(pairs)}"
    return text


def table(files: list[dict]) -> str:
    """Markdown: a row for every file and method, a column for every task and length."""
    baseline = {
        (r["task"], r["length"]): r
        for r in files[0]["records"]
        if r["method"] == "dense"
    }
    lines = [
        "| cache | method | KV read | "
        + " | ".join(f"{task} {length}" for task, length in baseline)
        + " |",
        "|---" * (3 + len(baseline)) + "|",
    ]
    for data in files:
        rows: dict[str, dict] = {}
        for record in data["records"]:
            if "samples" not in record:
                continue
            budget = "" if record["budget"] is None else f" {record['budget']}"
            name = record["method"] + budget
            rows.setdefault(name, {})[record["task"], record["length"]] = record
        for name, records in rows.items():
            shares = [r["kv_share"] for r in records.values() if r["kv_share"]]
            share = f"{mean(shares):.3f}" if shares else "–"
            cells = [
                change(records[key], base) if key in records else "–"
                for key, base in baseline.items()
            ]
            cache = engine_name(data["header"])
            lines.append(f"| {cache} | {name} | {share} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    args = parser.parse_args()
    print(table([json.loads(path.read_text()) for path in args.results]))


if __name__ == "__main__":
    main()

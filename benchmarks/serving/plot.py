# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Bars of decode tokens per second from results of the two serving benchmarks.

python -m benchmarks.serving.plot benchmarks/results/serving_cpu.json
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PLOTS = Path(__file__).parents[1] / "plots"


def read(result: dict) -> tuple[str, list[dict]]:
    """Title and decode rows of either benchmark's result."""
    if "rows" in result:
        rows = [row for row in result["rows"] if row["kind"] == "decode"]
        return "SmolLM2-135M, 2 cores, bf16", rows
    rows = [
        row
        | {"backend": engine["engine"], "tokens_per_s": 1e3 * row["batch"] / row["ms"]}
        for engine in result["results"]
        for row in engine["rows"]
        if row["kind"] == "decode"
    ]
    header = result["header"]
    return f"{header['options']['model']}, {header['device']}, bf16", rows


def plot(result: dict, path: Path) -> None:
    """One group of bars per (context, batch), one bar per backend."""
    title, rows = read(result)
    groups = sorted({(row["context"], row["batch"]) for row in rows})
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    figure, axes = plt.subplots(figsize=(max(7, 1.3 * len(groups)), 3.5))
    width = 0.8 / len(backends)
    for i, backend in enumerate(backends):
        speed = {
            (row["context"], row["batch"]): row["tokens_per_s"]
            for row in rows
            if row["backend"] == backend
        }
        place = [g + i * width for g in range(len(groups))]
        bars = axes.bar(place, [speed[g] for g in groups], width, label=backend)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    centre = [g + 0.4 - width / 2 for g in range(len(groups))]
    axes.set_xticks(centre, [f"{n} tokens\nbatch {b}" for n, b in groups])
    axes.set_ylabel("decode tokens / s")
    axes.set_title(title)
    axes.margins(y=0.2)
    axes.legend(loc="upper center", ncols=len(backends), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    args = parser.parse_args()
    path = PLOTS / f"{args.result.stem}.png"
    plot(json.loads(args.result.read_text()), path)
    print(path)


if __name__ == "__main__":
    main()

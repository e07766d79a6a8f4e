# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Requests per second and time per output token of servers under load, as bars.

    python -m benchmarks.serving.plot_load shared=load.json cold=load.json \\
        --output load.png

Every KIND=FILE adds the cases of that kind in the file. Only rates at which every
engine was measured are shown.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PANELS = {
    "request_throughput": ("requests / s", "%.2f"),
    "median_tpot_ms": ("median ms per output token", "%.0f"),
}


def read(sources: list[str]) -> dict[tuple[str, float], dict[str, dict]]:
    """By case and rate (inf: all at once): rows by engine.

    Raises:
        SystemExit: a file has no case of the kind.
    """
    groups: dict[tuple[str, float], dict[str, dict]] = {}
    for source in sources:
        kind, _, path = source.partition("=")
        if not path:
            raise SystemExit(f"{source!r}: expected KIND=FILE")
        rows = json.loads(Path(path).read_text())["results"]
        rows = [r for r in rows if r.get("case", "").partition(":")[0] == kind]
        if not rows:
            raise SystemExit(f"{path} has no case of the kind {kind!r}")
        for row in rows:
            rate = round(row["rate"] or float("inf"), 2)
            groups.setdefault((row["case"], rate), {})[row["engine"]] = row
    most = max(map(len, groups.values()))
    return {key: rows for key, rows in groups.items() if len(rows) == most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+", metavar="KIND=FILE")
    parser.add_argument("--title", default="")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    groups = read(args.sources)
    engines = list(next(iter(groups.values())))
    labels = []
    for case, rate in groups:
        kind, length, count = case.split(":")
        pace = "all at once" if rate == float("inf") else f"{rate:g}/s"
        labels.append(f"{count} {kind} ones\nof {int(length):,} tokens\n{pace}")
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.5))
    width = 0.8 / len(engines)
    for axes, (name, (label, form)) in zip(panels, PANELS.items(), strict=True):
        for i, engine in enumerate(engines):
            values = [rows[engine][name] for rows in groups.values()]
            place = [g + i * width for g in range(len(groups))]
            bars = axes.bar(place, values, width, label=engine)
            axes.bar_label(bars, fmt=form, fontsize=7)
        centre = [g + 0.4 - width / 2 for g in range(len(groups))]
        axes.set_xticks(centre, labels, fontsize=8)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
    panels[0].legend(fontsize=8)
    figure.suptitle(args.title, fontsize=10)
    figure.tight_layout()
    figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main()

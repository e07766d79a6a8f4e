# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Turn result files into Markdown tables and a plot.

python -m benchmarks.accuracy.report benchmarks/results/accuracy_4k.json

Of several files the first one's dense records are the baseline; the others have other
caches, which their methods are named after. Agreement and KL stay as they were
measured: to dense attention with the record's own cache.
"""

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

# metric -> (heading, digits)
COLUMNS = {
    "bits_per_char": ("bits/char", 3),
    "top1": ("top-1", 2),
    "hit": ("hit", 2),
}
PLOTTED = ("bits_per_char", "hit")
PLOTS = Path(__file__).parents[1] / "plots"


def paired(record: dict, dense: dict, metric: str) -> tuple[float, float, int]:
    """Mean over samples of method minus dense, its standard error, and n."""
    base = {s["index"]: s[metric] for s in dense["samples"]}
    diffs = [s[metric] - base[s["index"]] for s in record["samples"]]
    return *difference(diffs), len(diffs)


def difference(diffs: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences and its standard error."""
    error = stdev(diffs) / math.sqrt(len(diffs)) if len(diffs) > 1 else math.nan
    return fmean(diffs), error


def mean(record: dict, metric: str) -> float:
    return fmean(sample[metric] for sample in record["samples"])


def groups(records: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Records by task and length, dense first, in the order of the run."""
    grouped: dict[tuple[str, int], list[dict]] = {}
    for record in records:
        grouped.setdefault((record["task"], record["length"]), []).append(record)
    return grouped


def markdown(records: list[dict]) -> str:
    """A table per task and length: dense values, then paired differences ± s.e.

    "kept" is the mean number of tokens of the KV head that keeps fewest and of the one
    that keeps most.
    """
    parts = []
    for (task, length), group in groups(records).items():
        dense = group[0]
        metrics = [m for m in COLUMNS if m in dense["samples"][0]]
        heads = [COLUMNS[m][0] for m in metrics]
        head = ["method", "target", "KV read", *heads, "agreement", "KL (nats)", "kept"]
        lines = [
            f"### {task}, {length} tokens, n = {len(dense['samples'])}",
            "",
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
        ]
        for record in group:
            target = "–" if record["budget"] is None else f"{record['budget']:.4g}"
            cells = [record["method"], target]
            if "skipped" in record:
                cells += [record["skipped"]] + [""] * (len(metrics) + 3)
            else:
                cells += _cells(record, dense, metrics)
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cells(record: dict, dense: dict, metrics: list[str]) -> list[str]:
    share = record["kv_share"]
    cells = ["–" if share is None else f"{share:.3f}"]
    for metric in metrics:
        digits = COLUMNS[metric][1]
        if record is dense:
            cells.append(f"{mean(record, metric):.{digits}f}")
        else:
            diff, error, _ = paired(record, dense, metric)
            cells.append(f"{diff:+.{digits}f} ± {error:.{digits}f}")
    agreement, kl = mean(record, "agreement"), mean(record, "kl")
    return [*cells, f"{agreement:.3f}", f"{kl:.4f}", _kept(record)]


def _kept(record: dict) -> str:
    layers = record.get("kept_tokens", {}).values()
    means = [head[0] for layer in layers for head in layer]
    return f"{min(means):.0f} to {max(means):.0f}" if means else "–"


def plot(result: dict, path: Path, metrics: Sequence[str] = PLOTTED) -> None:
    """Metric against the measured share of KV bytes: a row per task and metric, a
    column per length (one length: three panels a row); error bars are standard errors
    of the paired difference. Methods that differ in ``top_p`` alone share a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grouped = groups(result["records"])
    lengths = sorted({length for _, length in grouped})
    rows = [
        (task, metric)
        for task in dict.fromkeys(task for task, _ in grouped)
        for metric in metrics
        if any(
            metric in group[0]["samples"][0]
            for (name, _), group in grouped.items()
            if name == task
        )
    ]
    panels = [(*row, length) for row in rows for length in lengths]
    columns = len(lengths) if len(lengths) > 1 else min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        height,
        columns,
        figsize=(4 * columns + 2, 3 * height),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    # A line keeps its colour in panels that others are missing from.
    lines = (_line(r) for group in grouped.values() for r in group[1:] if _measures(r))
    colors = {line: f"C{i}" for i, line in enumerate(dict.fromkeys(lines))}
    for axis, (task, metric, length) in zip(axes.flat, panels, strict=False):
        if (task, length) in grouped:
            _panel(axis, grouped[task, length], metric, colors)
        axis.set_title(f"{task}, {length} tokens", fontsize=9)
        axis.set_ylabel(COLUMNS.get(metric, (f"{metric} to dense", 0))[0])
        axis.set_xlabel("share of KV bytes read")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(_subtitle(result["header"]), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _measures(record: dict) -> bool:
    return "skipped" not in record and bool(record["kv_share"])


def _panel(axis, group: list[dict], metric: str, colors: dict[str, str]) -> None:
    dense = group[0]
    axis.axhline(mean(dense, metric), color="black", lw=1, label="dense")
    measured = [r for r in group[1:] if _measures(r)]
    for method in dict.fromkeys(_line(r) for r in measured):
        points = sorted(
            (r["kv_share"], mean(r, metric), paired(r, dense, metric)[1])
            for r in measured
            if _line(r) == method
        )
        shares, values, errors = zip(*points, strict=True)
        label = method + " (oracle)" * method.startswith("exact")
        style = {"color": colors[method], "marker": "o", "ms": 3}
        axis.errorbar(shares, values, yerr=errors, label=label, **style)
    axis.set_xscale("log", base=2)
    if metric == "hit":
        axis.set_ylim(0, 1.05)
    if metric == "kl":
        axis.set_yscale("log")
    shares = [r["kv_share"] for r in measured]
    if shares:
        # Fractions as people say them; ticks widen the limits, so they come first.
        axis.set_xticks([2**-n for n in range(8)], [f"1/{2**n}" for n in range(8)])
        axis.set_xlim(min(shares) / 1.5, max(shares) * 1.5)
    axis.grid(alpha=0.3)


def _line(record: dict) -> str:
    method = record["method"]
    if record["budget"] is not None and "top_p" not in method:
        return f"{method}, fixed budgets"
    return re.sub(r":top_p=[^:,]*", "", method) + ", top_p" * ("top_p" in method)


def _subtitle(header: dict) -> str:
    engine, machine = header["engine"], header["machine"]
    device = machine.get("gpu", f"{machine['cpu']} x {machine['cores']}")
    return (
        f"{engine['model']}, {engine['dtype']}, vLLM {header['versions']['vllm']}, "
        f"commit {header['commit']},\n{device}, "
        f"n = {header['plan']['samples']}"
    )


def joined(results: Sequence[dict], tasks=None, lengths=None) -> dict:
    """The first result with the records of all.

    Args:
        tasks, lengths: those that are kept; None: all.

    Raises:
        ValueError: no record is kept; one has no counterpart in the first result, of
            the same model and texts, that it could be paired with.
    """
    first, records = results[0], []
    baseline = {
        (record["task"], record["length"]): _indices(record)
        for record in first["records"]
        if record["method"] == "dense"
    }
    for number, result in enumerate(results):
        if _measured(result) != _measured(first):
            raise ValueError(
                f"samples differ: one file is of {' on '.join(_measured(first))}, "
                f"another of {' on '.join(_measured(result))}"
            )
        cache = f", {result['header']['engine'].get('kv_format', 'auto')}"
        for record in result["records"]:
            task, length = record["task"], record["length"]
            if (tasks and task not in tasks) or (lengths and length not in lengths):
                continue
            known = baseline.get((task, length))
            if known is None or not _indices(record) <= known:
                raise ValueError(
                    f"the first file has no dense baseline for all samples of {task} "
                    f"at {length} tokens: leave them out by --tasks or --lengths"
                )
            records.append(record | {"method": record["method"] + cache * (number > 0)})
    if not records:
        raise ValueError("no record is of these tasks and lengths")
    return first | {"records": records}


def _indices(record: dict) -> set[int]:
    return {sample["index"] for sample in record.get("samples", ())}


def _measured(result: dict) -> tuple[str, str]:
    """Model and texts: what samples are functions of."""
    header = result["header"]
    return header["engine"]["model"], header.get("texts", "unnamed texts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--plots", type=Path, default=PLOTS)
    parser.add_argument("--metrics", nargs="+", default=PLOTTED, help="in the plot")
    parser.add_argument("--tasks", nargs="+", help="not all")
    parser.add_argument("--lengths", nargs="+", type=int, help="not all")
    args = parser.parse_args()
    read = [json.loads(path.read_text("utf-8")) for path in args.results]
    try:
        result = joined(read, args.tasks, args.lengths)
    except ValueError as error:
        parser.error(str(error))
    print(_subtitle(result["header"]).replace("\n", " ") + "\n")
    print(markdown(result["records"]))
    plot(result, args.plots / f"{args.results[0].stem}.png", args.metrics)


if __name__ == "__main__":
    main()

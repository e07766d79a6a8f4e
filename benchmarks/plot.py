# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Bars of results, of ``kernels.decode_attention``, ``serving.decode`` or
``serving.load``; the file says which.

    python -m benchmarks.plot benchmarks/results/serving_cpu.json
    python -m benchmarks.plot shared=load.json cold=load.json --output load.png

KIND=FILE adds the cases of that kind of a load; only rates at which every engine was
measured are shown. Without ``--output`` the plot goes to benchmarks/plots, under the
result's name.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHAPE = ("num_heads", "num_kv_heads", "head_size")  # in older results
PLOTS = Path(__file__).parent / "plots"
PEERS = {
    "cpu_attn": "CPU_ATTN",
    "fa3": "FlashAttention-3",
    "triton": "TRITON_ATTN",
    "xformers": "xformers",
}
LOAD_PANELS = {
    "request_throughput": ("requests / s", "%.2f"),
    "median_tpot_ms": ("median ms per output token", "%.0f"),
}


def bars(axes, groups: list[str], values: dict[str, list[float]], form: str) -> None:
    """A group of bars for every name in ``groups``; ``values`` by legend."""
    width = 0.8 / len(values)
    for i, (legend, heights) in enumerate(values.items()):
        place = [g + i * width for g in range(len(groups))]
        drawn = axes.bar(place, heights, width, label=legend)
        axes.bar_label(drawn, fmt=form, fontsize=7)
    centre = [g + 0.4 - width / 2 for g in range(len(groups))]
    axes.set_xticks(centre, groups, fontsize=8)
    axes.margins(y=0.2)


def device(result: dict) -> str:
    header = result.get("header", result)
    machine = header.get("machine", {})
    cpu = f"{machine.get('cores')} cores"
    return header.get("device") or machine.get("gpu") or cpu


def plot_kernels(result: dict):
    """Microseconds per layer, logarithmic: of each dense peer, and ours."""
    rows = result.get("rows") or result["results"]
    peers = [name for name in PEERS if name in rows[0]]
    values = {PEERS[name]: [r.get(name, math.nan) for r in rows] for name in peers}
    values["sparq"] = [r["sparq"] for r in rows]
    figure, axes = plt.subplots(figsize=(7.5, 3.5))
    groups = [f"{r['case']}\n{r['ratio']:.1f}x" for r in rows]
    bars(axes, [name.replace("+", "\n+ ") for name in groups], values, "%.0f")
    axes.set_yscale("log")  # hence whole bars: stacked ones would mislead
    axes.set_ylabel("us per layer")
    shape = result.get("conditions") or result["header"]["options"]
    heads = shape.get("shape") or "x".join(str(shape[k]) for k in SHAPE)
    title = f"{device(result)}, heads {heads}, rank {shape['rank']}, top_k "
    axes.set_title(title + str(shape["top_k"]), fontsize=9)
    axes.set_ylim(bottom=10)
    axes.legend(fontsize=8)
    return figure


def plot_decode(result: dict):
    """Decode tokens per second by context, batch and engine."""
    speed: dict[str, dict[tuple[int, int], float]] = {}
    for engine in result.get("results") or [result]:
        for row in engine["rows"]:
            if row["kind"] == "decode":
                of_engine = speed.setdefault(row.get("backend") or engine["engine"], {})
                group = row["context"], row["batch"]
                of_engine[group] = 1e3 * row["batch"] / row["ms"]
    groups = sorted({group for of_engine in speed.values() for group in of_engine})
    figure, axes = plt.subplots(figsize=(max(7, 1.3 * len(groups)), 3.5))
    names = [f"{n} tokens\nbatch {b}" for n, b in groups]
    values = {k: [v.get(g, math.nan) for g in groups] for k, v in speed.items()}
    bars(axes, names, values, "%.0f")
    axes.set_ylabel("decode tokens / s")
    model = result["header"]["options"]["model"]
    model = "SmolLM2-135M" if model == "None" else model
    axes.set_title(f"{model}, {device(result)}, bf16")
    axes.legend(loc="upper center", ncols=len(speed), fontsize=8)
    return figure


def read_load(sources: list[str]) -> dict[tuple[str, float], dict[str, dict]]:
    """By case and rate (inf: all at once): rows by engine.

    Raises:
        SystemExit: a file has no case of the kind.
    """
    groups: dict[tuple[str, float], dict[str, dict]] = {}
    for source in sources:
        kind, _, path = source.partition("=")
        rows = json.loads(Path(path).read_text())["results"]
        rows = [r for r in rows if r.get("case", "").partition(":")[0] == kind]
        if not rows:
            raise SystemExit(f"{path} has no case of the kind {kind!r}")
        for row in rows:
            rate = round(row["rate"] or math.inf, 2)
            groups.setdefault((row["case"], rate), {})[row["engine"]] = row
    most = max(map(len, groups.values()))
    return {key: rows for key, rows in groups.items() if len(rows) == most}


def plot_load(sources: list[str]):
    """Requests per second and time per output token of servers under load."""
    groups = read_load(sources)
    names = []
    for case, rate in groups:
        kind, length, count = case.split(":")
        pace = "all at once" if rate == math.inf else f"{rate:g}/s"
        names.append(f"{count} {kind} ones\nof {int(length):,} tokens\n{pace}")
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.5))
    for axes, (name, (label, form)) in zip(panels, LOAD_PANELS.items(), strict=True):
        engines = next(iter(groups.values()))
        values = {e: [rows[e][name] for rows in groups.values()] for e in engines}
        bars(axes, names, values, form)
        axes.set_ylabel(label)
    panels[0].legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+", metavar="FILE or KIND=FILE")
    parser.add_argument("--title", default="")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    path = Path(args.sources[0])
    if "=" in args.sources[0]:
        path = Path(args.sources[0].partition("=")[2])
        figure = plot_load(args.sources)
    else:
        result = json.loads(path.read_text())
        rows = result.get("rows") or result["results"]
        figure = (plot_kernels if "sparq" in rows[0] else plot_decode)(result)
    if args.title:
        figure.suptitle(args.title, fontsize=10)
    figure.tight_layout()
    output = args.output or PLOTS / f"{path.stem}.png"
    figure.savefig(output, dpi=120)
    print(output)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Times of one layer's decode attention from benchmarks.kernels.decode_attention_cuda.

python -m benchmarks.kernels.plot benchmarks/results/decode_attention_h100.json
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PLOTS = Path(__file__).parents[1] / "plots"
PEERS = {"fa3": "FlashAttention-3", "triton": "TRITON_ATTN", "xformers": "xformers"}


def label(row: dict) -> str:
    if "+" in row["case"]:
        return row["case"].replace("+", "\n+ ")
    return f"batch {row['batch']}\n{round(row['context'] / 1024)}K"


def plot(result: dict, path: Path) -> None:
    """Per batch and context: one bar per dense peer, and ours."""
    rows = result["rows"]
    peers = [name for name in PEERS if name in rows[0]]
    width = 0.8 / (len(peers) + 1)
    figure, axes = plt.subplots(figsize=(7.5, 3.5))
    for i, name in enumerate(peers):
        place = [g + i * width for g in range(len(rows))]
        times = [r.get(name, math.nan) for r in rows]
        bars = axes.bar(place, times, width, label=PEERS[name])
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    place = [g + len(peers) * width for g in range(len(rows))]
    bars = axes.bar(place, [r["sparq"] for r in rows], width, label="sparq")
    ratios = [f"{r['sparq']:.0f} ({r['ratio']:.1f}x)" for r in rows]
    axes.bar_label(bars, ratios, fontsize=7)
    names = [label(r) for r in rows]
    axes.set_xticks([g + 0.4 - width / 2 for g in range(len(rows))], names)
    axes.set_yscale("log")  # hence whole bars: stacked ones would mislead
    axes.set_ylabel("us per layer")
    shape = result["conditions"]
    axes.set_title(
        f"{result['device']}, {shape['num_heads']}/{shape['num_kv_heads']} heads, "
        f"head size {shape['head_size']}, rank {shape['rank']}, "
        f"{shape['top_k']} tokens per KV head",
        fontsize=9,
    )
    axes.set_ylim(bottom=10)
    axes.margins(y=0.15)
    axes.legend(fontsize=8)
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

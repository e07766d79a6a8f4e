# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Time adaptive budgets on a GPU, with the numbers of tokens that a real model keeps.

    python -m benchmarks.kernels.top_p_cuda --kept KEPT.json --output RESULT.json

``benchmarks.kernels.record_kept`` makes KEPT.json. Every (row, KV head) draws a count
from it; its query is sharpened until top-p keeps that many. Beside it, fixed budgets of
the mean count on the same data, and FlashAttention-3, in one run. Every case runs with
the recorded numbers, and with the recorded shares of the context.
"""

import argparse
import json
import os
from pathlib import Path

import torch

from benchmarks.kernels.decode_attention_cuda import Layer, time_graph
from benchmarks.kernels.peers import PEERS
from vllm_sparse import ops
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout


class AdaptiveLayer(Layer):
    """A layer whose (row, KV head)s keep given numbers of tokens."""

    def __init__(self, args, seq_lens: list[int], wanted: torch.Tensor) -> None:
        """``wanted``: [rows, num_kv_heads] tokens."""
        super().__init__(args, seq_lens, dense=True)
        shape = (*self.counts.shape, max(seq_lens))
        self.lists["indices"] = torch.zeros(shape, dtype=torch.int32, device="cuda")
        self.budgets = self.lens - 1
        self.options |= dict(top_p=args.top_p, min_tokens=0)
        self._sharpen(wanted.cuda())
        self.mean = max(BLOCK_SIZE, round(self.counts.float().mean().item()))

    def _sharpen(self, wanted: torch.Tensor) -> None:
        base, heads = self.query.clone(), self.args.num_kv_heads
        low = torch.full(wanted.shape, 1e-3, device="cuda")
        high = torch.full(wanted.shape, 30.0, device="cuda")
        for _ in range(16):
            middle = (low * high).sqrt()
            factor = middle[:, :, None, None].to(base.dtype)
            scaled = base.view(len(base), heads, -1, base.shape[-1]) * factor
            self.query.copy_(scaled.view_as(base))
            self.select()
            many = self.counts > wanted
            low, high = torch.where(many, middle, low), torch.where(many, high, middle)

    def fixed(self) -> None:
        """Plain top-k of the mean count."""
        options = self.options | dict(top_p=1.0)
        budgets = torch.full_like(self.lens, self.mean)
        lists, space = self.lists, Layer.workspace
        inputs = (*self.context, budgets)
        ops.sparq_attend(*inputs, **options, **lists, out=self.out, workspace=space)

    def fixed_select(self) -> None:
        options = self.options | dict(top_p=1.0)
        budgets = torch.full_like(self.lens, self.mean)
        inputs = (*self.context, budgets)
        ops.sparq_select(*inputs, **options, **self.lists, workspace=Layer.workspace)


def draw(recorded: dict, rows: int, heads: int, length: int, share: bool, seed: int):
    """[rows, heads] tokens, from quantiles of recorded counts."""
    values = torch.tensor(recorded["quantiles"])
    if share:
        values = values * (length / recorded["context"])
    generator = torch.Generator().manual_seed(seed)
    chosen = values[torch.randint(len(values), (rows, heads), generator=generator)]
    return chosen.clamp(BLOCK_SIZE, length - BLOCK_SIZE)


def measure(args, recorded: dict, batch: int, length: int, share: bool) -> dict:
    seq_lens = batch * [length - 64]
    row_bytes = BlockLayout(args.head_size, 2).row_bytes
    layer_bytes = batch * length * args.num_kv_heads * row_bytes
    layers = max(2, min(8, args.rotate_bytes // layer_bytes))
    stack = [
        AdaptiveLayer(
            args, seq_lens, draw(recorded, batch, args.num_kv_heads, length, share, i)
        )
        for i in range(layers)
    ]
    result = {"batch": batch, "context": length, "share": share, "layers": layers}
    counts = torch.cat([layer.counts.flatten() for layer in stack]).float()
    for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        result[f"kept_{name}"] = counts.quantile(q).item()
    result["kept_mean"] = counts.mean().item()
    result["top_p"] = time_graph([layer.sparq for layer in stack], args.repeats)
    for name in ("fixed", "select", "fixed_select"):
        calls = [getattr(layer, name) for layer in stack]
        result[name] = time_graph(calls, args.repeats)
    peer = [PEERS["fa3"](layer.dense_cache) for layer in stack]
    result["fa3"] = time_graph(peer, args.repeats)
    result["ratio"] = result["fa3"] / result["top_p"]
    layout = BlockLayout(args.head_size, 2)
    scores = layout.score_bytes(seq_lens[0] // BLOCK_SIZE, args.rank)
    tokens = counts.sum().item() / layers * row_bytes
    result["bytes"] = batch * args.num_kv_heads * scores + tokens
    result["gb_per_s"] = result["bytes"] / result["top_p"] / 1e3
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kept", type=Path, required=True)
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--cases", nargs="+", default=["1x32768", "16x32768"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rotate-bytes", type=int, default=2**30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.top_k, args.dense_below = 1024, 0  # of Layer
    recorded = json.loads(args.kept.read_text())
    rows = []
    for case in args.cases:
        for share in (False, True):
            batch, length = map(int, case.split("x"))
            rows.append(measure(args, recorded, batch, length, share))
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()
    if args.output:
        header = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": os.environ.get("VLLM_SPARSE_COMMIT", "unknown"),
            "conditions": {k: str(v) for k, v in vars(args).items() if k != "output"}
            | {"kept": args.kept.name},
            "kept": {k: v for k, v in recorded.items() if k != "quantiles"},
        }
        args.output.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")
    columns = ["kept_mean", "kept_p99", "top_p", "fixed"]
    columns += ["select", "fixed_select", "fa3", "ratio", "gb_per_s"]
    print("| case | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for r in rows:
        figures = " | ".join(f"{r[c]:.4g}" for c in columns)
        share = " (shares)" if r["share"] else ""
        print(f"| {r['batch']}x{r['context']}{share} | {figures} |")


if __name__ == "__main__":
    main()

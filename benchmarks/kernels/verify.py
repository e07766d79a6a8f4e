# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Time the verification of drafts: 1 + k positions of every request in one step.

    python -m benchmarks.kernels.verify --cases 1x32768 16x32768 --output NAME.json

``sparse``: a row and a list of its own for every position; ``rows``: dense, likewise;
``together``: dense, one varlen call, as the layers do it. ``decode`` and
``decode_dense`` are one position per request.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from benchmarks.environment import save
from benchmarks.kernels.clocks import by_graphs, in_turns
from benchmarks.kernels.layer import DTYPE, Layer
from vllm_sparse import ops
from vllm_sparse.layer.plan import plan_dense
from vllm_sparse.methods import LayerShape

CALLS = ("decode", "sparse", "decode_dense", "rows", "together")


class Verified:
    """A layer whose requests verify drafts at the ends of their contexts."""

    def __init__(self, args: argparse.Namespace, seq_lens: list[int]) -> None:
        self.layer = layer = Layer(args, seq_lens)
        positions, device = args.drafts + 1, layer.device
        self.table = layer.table.repeat_interleave(positions, 0)
        ahead = torch.arange(positions, device=device, dtype=torch.int32) - args.drafts
        self.lens = (layer.lens[:, None] + ahead).flatten()
        rows = len(self.lens)
        shape = (rows, args.heads, args.head_size)
        self.query = torch.randn(shape, device=device, dtype=DTYPE)
        self.out = torch.empty_like(self.query)
        self.budgets = layer.budgets.repeat_interleave(positions)
        self.indices = layer.indices.repeat_interleave(positions, 0)
        self.counts = layer.counts.repeat_interleave(positions, 0)
        shape = (args.kv_heads, args.heads // args.kv_heads, self.table.shape[1])
        needed = ops.workspace_bytes(rows, *shape, args.head_size, device)
        if needed and len(Layer.workspace) < needed:
            Layer.workspace = torch.zeros(needed, dtype=torch.uint8, device=device)
        version = 3 if device.type == "cuda" else None
        self.shape = LayerShape(
            args.heads,
            args.kv_heads,
            args.head_size,
            DTYPE,
            layer.options.scale,
            flash_attention=version,
        )
        self.plans = [self._plan(1), self._plan(positions)]

    def _plan(self, positions: int):
        layer = self.layer
        starts = torch.arange(len(layer.lens) + 1, dtype=torch.int32) * positions
        common = SimpleNamespace(
            query_start_loc=starts.to(layer.device),
            query_start_loc_cpu=starts,
            seq_lens=layer.lens,
            block_table_tensor=layer.table,
            max_query_len=positions,
            max_seq_len=max(layer.seq_lens),
        )
        (plan,) = plan_dense(
            common, slice(0, len(layer.lens)), self.shape, ops.Ops(), 0
        )
        return plan

    def decode(self) -> None:
        self.layer.sparq()

    def sparse(self) -> None:
        ops.sparq_attend(
            self.query,
            self.layer.cache,
            self.table,
            self.lens,
            self.budgets,
            self.layer.options,
            indices=self.indices,
            counts=self.counts,
            out=self.out,
            workspace=Layer.workspace,
        )

    def rows(self) -> None:
        ops.attend(
            self.query,
            self.layer.cache,
            self.table,
            self.lens,
            scale=self.layer.options.scale,
            out=self.out,
            workspace=Layer.workspace,
        )

    def decode_dense(self) -> None:
        self._dense(self.plans[0], self.layer.query, self.layer.out)

    def together(self) -> None:
        self._dense(self.plans[1], self.query, self.out)

    def _dense(self, plan, query: torch.Tensor, out: torch.Tensor) -> None:
        plan.attend(query, None, None, None, self.layer.cache, self.shape, out)

    def check(self) -> None:
        self.rows()
        expected = self.out.clone()
        self.together()
        error = (self.out - expected).float().norm() / expected.float().norm()
        assert error < 1e-2, f"together differs from rows by {error:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    on_gpu = torch.cuda.is_available()
    add("--cases", nargs="+", default=["1x32768", "16x32768"] if on_gpu else ["2x8192"])
    add("--shape", default="32x8x128" if on_gpu else "9x3x64")
    add("--rank", type=int, default=32 if on_gpu else 24)
    add("--top-k", type=int, default=1024 if on_gpu else 512)
    add("--drafts", type=int, default=4)
    add("--repeats", type=int, default=30)
    add("--output", type=Path)
    given = parser.parse_args()
    args = argparse.Namespace(**vars(given), kv_format="auto", peers=[], dense_below=0)
    args.device = torch.device("cuda" if on_gpu else "cpu")
    args.heads, args.kv_heads, args.head_size = map(int, given.shape.split("x"))
    args.budget = lambda length: args.top_k
    clock, results = by_graphs if on_gpu else in_turns, []
    print("| case | " + " | ".join(CALLS) + " |\n" + "|---" * (len(CALLS) + 1) + "|")
    for case in tqdm(args.cases, disable=None):
        batch, length = map(int, case.split("x"))
        stack = [Verified(args, [length - 64] * batch) for _ in range(2)]
        stack[0].check()
        times = clock(
            {name: [getattr(layer, name) for layer in stack] for name in CALLS},
            args.repeats,
        )
        results.append({"case": case, "drafts": args.drafts} | times)
        tqdm.write(f"| {case} | " + " | ".join(f"{times[n]:.4g}" for n in CALLS) + " |")
        save(given, results)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Time one layer's decode attention on a GPU beside FlashAttention-3, in one run.

    python -m benchmarks.kernels.decode_attention_cuda --output NAME.json

Both sides are CUDA graphs over several layers, so that neither finds its data in
the L2, with random block tables and own pages per request. Selection is part of our
time. ``VLLM_SPARSE_COMMIT`` names the commit where there is no git.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import torch

from vllm_sparse import ops
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout
from vllm_sparse.testing.compare import assert_close

FA3_PAGE = 64


class Layer:
    """One layer's contexts in our cache and, unless left out, in FlashAttention's."""

    workspace: torch.Tensor | None = None  # of all layers, as in an engine

    def __init__(self, args, batch: int, seq_len: int, dense: bool) -> None:
        self.args, self.batch, self.seq_len = args, batch, seq_len
        heads, size, dtype = args.num_kv_heads, args.head_size, torch.bfloat16
        blocks = -(-seq_len // BLOCK_SIZE)
        content = BlockLayout(size, 2).content_bytes // 2
        shape = (batch * blocks + 1, heads, BLOCK_SIZE, content)
        self.cache = torch.empty(shape, dtype=dtype, device="cuda")
        order = torch.randperm(batch * blocks, device="cuda") + 1
        self.table = order.view(batch, blocks).int()
        self.lens = torch.full((batch,), seq_len, dtype=torch.int32, device="cuda")
        pages = -(-seq_len // FA3_PAGE)
        if dense:
            shape = (2, batch * pages, FA3_PAGE, heads, size)
            self.dense_cache = torch.zeros(shape, dtype=dtype, device="cuda")
            order = torch.randperm(batch * pages, device="cuda")
            self.dense_table = order.view(batch, pages).int()
        position = torch.arange(seq_len, device="cuda")
        strength = torch.rand(heads, size, device="cuda") * 2
        for row in range(batch):
            key = torch.randn(seq_len, heads, size, device="cuda", dtype=dtype)
            key = (key * strength).to(dtype)
            value = torch.randn_like(key)
            block = self.table[row][position // BLOCK_SIZE].long()
            slots = block * BLOCK_SIZE + position % BLOCK_SIZE
            ops.store_kv(key, value, self.cache, slots)
            sealed = self.table[row, : seq_len // BLOCK_SIZE].contiguous()
            before = torch.cat([torch.full_like(sealed[:1], -1), sealed[:-1]])
            index = torch.arange(len(sealed), device="cuda", dtype=torch.int32)
            ops.seal_blocks(self.cache, sealed, before, index, size)
            if dense:
                page = self.dense_table[row][position // FA3_PAGE].long()
                self.dense_cache[0][page, position % FA3_PAGE] = key
                self.dense_cache[1][page, position % FA3_PAGE] = value
        shape = (batch, args.num_heads, size)
        self.query = torch.randn(shape, device="cuda", dtype=dtype)
        self.out = torch.empty_like(self.query)
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        kept = (batch, heads)
        self.counts = torch.empty(kept, dtype=torch.int32, device="cuda")
        shape = (*kept, args.top_k + BLOCK_SIZE)
        self.indices = torch.zeros(shape, dtype=torch.int32, device="cuda")
        self.budgets = torch.full_like(self.lens, args.top_k)
        self.context = (self.query, self.cache, self.table, self.lens)
        self.lists = dict(indices=self.indices, counts=self.counts)
        group = args.num_heads // heads
        size_of = ops.workspace_bytes(batch, heads, group, blocks, size)
        if Layer.workspace is None or len(Layer.workspace) < size_of:
            Layer.workspace = torch.zeros(size_of, dtype=torch.uint8, device="cuda")
        self.options = dict(
            rank=args.rank,
            local_window=32,
            sink_tokens=4,
            scale=size**-0.5,
            soft_cap=0.0,
        )

    def fa3(self) -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        flash_attn_varlen_func(
            q=self.query,
            k=self.dense_cache[0],
            v=self.dense_cache[1],
            out=self.out,
            cu_seqlens_q=self.starts,
            max_seqlen_q=1,
            seqused_k=self.lens,
            max_seqlen_k=self.seq_len,
            softmax_scale=self.options["scale"],
            causal=True,
            block_table=self.dense_table,
            num_splits=self.args.num_splits,
            fa_version=3,
        )

    def sparq(self) -> None:
        inputs = (*self.context, self.budgets)
        options, space = self.options, Layer.workspace
        ops.sparq_attend(
            *inputs, **options, **self.lists, out=self.out, workspace=space
        )

    def select(self) -> None:
        inputs = (*self.context, self.budgets)
        options, space = self.options, Layer.workspace
        ops.sparq_select(*inputs, **options, **self.lists, workspace=space)

    def attend(self, **lists) -> None:
        scale, space = self.options["scale"], Layer.workspace
        lists = self.lists if lists == {} else lists
        ops.attend(*self.context, **lists, scale=scale, out=self.out, workspace=space)

    def dense(self) -> None:
        self.attend(indices=None)

    def bytes_needed(self) -> tuple[int, int]:
        """(sparse, dense) bytes of one call."""
        layout = BlockLayout(self.args.head_size, 2)
        items = self.batch * self.args.num_kv_heads
        scores = layout.score_bytes(self.seq_len // BLOCK_SIZE, self.args.rank) * items
        rows = int(self.counts.sum()) * layout.row_bytes
        return scores + rows, self.seq_len * layout.row_bytes * items


def time_graph(calls, repeats: int) -> float:
    """Median microseconds of one call, from replays of a graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def measure(args, batch: int, seq_len: int) -> dict:
    """Medians in microseconds, bytes, and the ratio of FlashAttention-3 to us."""
    row_bytes = BlockLayout(args.head_size, 2).row_bytes
    layer_bytes = batch * seq_len * args.num_kv_heads * row_bytes
    layers = max(1, min(16, args.rotate_bytes // layer_bytes))
    stack = [Layer(args, batch, seq_len, args.fa3) for _ in range(layers)]
    names = ["sparq", "select", "attend"] + (["dense"] if args.dense else [])
    if args.fa3:
        names.append("fa3")
        stack[0].dense()
        expected = stack[0].out.clone()
        stack[0].fa3()
        assert_close(expected, stack[0].out, 1e-2)
    result = {
        name: time_graph([getattr(layer, name) for layer in stack], args.repeats)
        for name in names
    }
    sparse, dense = stack[0].bytes_needed()
    result |= {"bytes_sparse": sparse, "bytes_dense": dense, "layers": layers}
    result["gb_per_s"] = sparse / result["sparq"] / 1e3
    if args.fa3:
        result["ratio"] = result["fa3"] / result["sparq"]
        result["gb_per_s_fa3"] = dense / result["fa3"] / 1e3
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=1024)
    parser.add_argument(
        "--cases", nargs="+", default=[], help="batch x length: 16x32768"
    )
    parser.add_argument(
        "--tail", type=int, default=64, help="tokens short of the length"
    )
    parser.add_argument("--num-splits", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--rotate-bytes", type=int, default=2**30)
    parser.add_argument("--no-fa3", dest="fa3", action="store_false")
    parser.add_argument("--dense", action="store_true", help="time our dense path, too")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    default = [f"{b}x{n}" for b in (1, 16) for n in (8192, 32768, 131072)]
    rows = []
    for case in args.cases or default:
        batch, length = map(int, case.split("x"))
        got = measure(args, batch, length - args.tail)
        rows.append({"batch": batch, "context": length - args.tail, **got})
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    if args.output:
        header = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": os.environ.get("VLLM_SPARSE_COMMIT", "unknown"),
            "conditions": {k: v for k, v in vars(args).items() if k != "output"},
        }
        if args.fa3:
            import vllm

            header["vllm"] = vllm.__version__
        args.output.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")
    columns = [
        "batch",
        "context",
        "FA3",
        "ours",
        "select",
        "attend",
        "dense",
        "ratio",
        "GB/s",
    ]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for r in rows:
        print(
            f"| {r['batch']} | {r['context']} | {r.get('fa3', 0):.1f} "
            f"| {r['sparq']:.1f} | {r['select']:.1f} | {r['attend']:.1f} "
            f"| {r.get('dense', 0):.1f} "
            f"| {r.get('ratio', 0):.2f} | {r['gb_per_s']:.0f} |"
        )


if __name__ == "__main__":
    main()

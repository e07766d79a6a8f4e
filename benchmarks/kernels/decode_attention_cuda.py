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

from benchmarks.kernels.peers import PEERS, DenseCache
from vllm_sparse import ops
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout
from vllm_sparse.testing.compare import assert_close

DENSE_PAGE = 64


class Layer:
    """One layer's contexts in our cache and, unless left out, in vLLM's dense one."""

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
        pages = -(-seq_len // DENSE_PAGE)
        if dense:
            shape = (2, batch * pages, DENSE_PAGE, heads, size)
            dense_cache = torch.zeros(shape, dtype=dtype, device="cuda")
            order = torch.randperm(batch * pages, device="cuda")
            dense_table = order.view(batch, pages).int()
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
                page = dense_table[row][position // DENSE_PAGE].long()
                dense_cache[0][page, position % DENSE_PAGE] = key
                dense_cache[1][page, position % DENSE_PAGE] = value
        shape = (batch, args.num_heads, size)
        self.query = torch.randn(shape, device="cuda", dtype=dtype)
        self.out = torch.empty_like(self.query)
        if dense:
            self.dense_cache = DenseCache(
                query=self.query,
                out=self.out,
                key=dense_cache[0],
                value=dense_cache[1],
                block_table=dense_table,
                seq_lens=self.lens,
                seq_len=seq_len,
            )
        kept = (batch, heads)
        self.counts = torch.empty(kept, dtype=torch.int32, device="cuda")
        shape = (*kept, args.top_k + BLOCK_SIZE)
        self.indices = torch.zeros(shape, dtype=torch.int32, device="cuda")
        self.budgets = torch.full_like(self.lens, args.top_k)
        self.context = (self.query, self.cache, self.table, self.lens)
        self.lists = dict(indices=self.indices, counts=self.counts)
        group = args.num_heads // heads
        device = torch.device("cuda")
        size_of = ops.workspace_bytes(batch, heads, group, blocks, size, device)
        if Layer.workspace is None or len(Layer.workspace) < size_of:
            Layer.workspace = torch.zeros(size_of, dtype=torch.uint8, device="cuda")
        self.options = dict(
            rank=args.rank,
            local_window=32,
            sink_tokens=4,
            scale=size**-0.5,
            soft_cap=0.0,
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
    stack = [Layer(args, batch, seq_len, bool(args.peers)) for _ in range(layers)]
    names = ["sparq", "select", "attend"] + (["dense"] if args.dense else [])
    calls = {name: [getattr(layer, name) for layer in stack] for name in names}
    for name in args.peers:
        calls[name] = [PEERS[name](layer.dense_cache) for layer in stack]
        if name != "xformers":  # which attends to other contexts
            stack[0].dense()
            expected = stack[0].out.clone()
            calls[name][0]()
            assert_close(expected, stack[0].out, 1e-2)
    result = {name: time_graph(calls[name], args.repeats) for name in calls}
    sparse, dense = stack[0].bytes_needed()
    result |= {"bytes_sparse": sparse, "bytes_dense": dense, "layers": layers}
    result["gb_per_s"] = sparse / result["sparq"] / 1e3
    if "fa3" in result:
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
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--rotate-bytes", type=int, default=2**30)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["fa3"])
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
        if args.peers:
            import vllm

            header["vllm"] = vllm.__version__
        args.output.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")
    columns = ["batch", "context", "sparq", "select", "attend", "dense", *args.peers]
    columns += ["ratio", "gb_per_s"]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for r in rows:
        print("| " + " | ".join(f"{r.get(c, 0):.4g}" for c in columns) + " |")


if __name__ == "__main__":
    main()

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
from vllm_sparse.cache.formats import FORMATS, resolve_format
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout
from vllm_sparse.config import DENSE_BELOW
from vllm_sparse.testing.compare import assert_close

DENSE_PAGE = 64


class Layer:
    """One layer's contexts in our cache and, unless left out, in vLLM's dense one."""

    workspace: torch.Tensor | None = None  # of all layers, as in an engine

    def __init__(self, args, seq_lens: list[int], dense: bool) -> None:
        self.args, self.seq_lens, batch = args, seq_lens, len(seq_lens)
        heads, size, dtype = args.num_kv_heads, args.head_size, torch.bfloat16
        self.fmt = resolve_format(
            getattr(args, "kv_format", "auto"), None, size, has_mean=False
        )
        layout = BlockLayout(size, 2, self.fmt)
        content = layout.content_bytes // 2
        self.table = random_table(seq_lens, BLOCK_SIZE, layout.lookahead_blocks)
        shape = (int(self.table.max()) + 1, heads, BLOCK_SIZE, content)
        self.cache = torch.empty(shape, dtype=dtype, device="cuda")
        self.lens = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")
        if dense:
            dense_table = random_table(seq_lens, DENSE_PAGE)
            shape = (2, int(dense_table.max()) + 1, DENSE_PAGE, heads, size)
            dense_cache = torch.zeros(shape, dtype=dtype, device="cuda")
        strength = torch.rand(heads, size, device="cuda") * 2
        for row, seq_len in enumerate(seq_lens):
            position = torch.arange(seq_len, device="cuda")
            key = torch.randn(seq_len, heads, size, device="cuda", dtype=dtype)
            key = (key * strength).to(dtype)
            value = torch.randn_like(key)
            self.store(row, key, value)
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
                seq_len=max(seq_lens),
            )
        kept = (batch, heads)
        self.counts = torch.empty(kept, dtype=torch.int32, device="cuda")
        shape = (*kept, args.top_k + BLOCK_SIZE)
        self.indices = torch.zeros(shape, dtype=torch.int32, device="cuda")
        self.budgets = torch.full_like(self.lens, args.top_k)
        self.budgets[self.lens < args.dense_below] = -1
        self.context = (self.query, self.cache, self.table, self.lens)
        self.lists = dict(indices=self.indices, counts=self.counts)
        group = args.num_heads // heads
        device = torch.device("cuda")
        blocks = self.table.shape[1]
        shape = (batch, heads, group, blocks, size, device)
        size_of = ops.workspace_bytes(*shape, adapts=True)
        if Layer.workspace is None or len(Layer.workspace) < size_of:
            Layer.workspace = torch.zeros(size_of, dtype=torch.uint8, device="cuda")
        self.options = dict(
            rank=args.rank,
            local_window=32,
            sink_tokens=4,
            scale=size**-0.5,
            soft_cap=0.0,
        )

    def store(self, row: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """A whole context."""
        table, length = self.table[row], len(key)
        if self.fmt.quantised:
            starts = torch.tensor([0, length], dtype=torch.int32, device="cuda")
            context = (self.cache, table[None], self.lens[row : row + 1], starts)
            return ops.store_quantised(key, value, *context, self.fmt)
        position = torch.arange(length, device="cuda")
        slots = table[position // BLOCK_SIZE].long() * BLOCK_SIZE
        ops.store_kv(key, value, self.cache, slots + position % BLOCK_SIZE)
        sealed = table[: length // BLOCK_SIZE].contiguous()
        before = torch.cat([torch.full_like(sealed[:1], -1), sealed[:-1]])
        index = torch.arange(len(sealed), device="cuda", dtype=torch.int32)
        ops.seal_blocks(self.cache, sealed, before, index, key.shape[-1])

    def sparq(self) -> None:
        inputs = (*self.context, self.budgets)
        options = dict(self.options, fmt=self.fmt, workspace=Layer.workspace)
        ops.sparq_attend(*inputs, **options, **self.lists, out=self.out)

    def select(self) -> None:
        inputs = (*self.context, self.budgets)
        options = dict(self.options, fmt=self.fmt, workspace=Layer.workspace)
        ops.sparq_select(*inputs, **options, **self.lists)

    def attend(self, **lists) -> None:
        options = dict(scale=self.options["scale"], workspace=Layer.workspace)
        lists = self.lists if lists == {} else lists
        ops.attend(*self.context, **lists, **options, out=self.out, fmt=self.fmt)

    def dense(self) -> None:
        self.attend(indices=None)

    def bytes_needed(self) -> tuple[int, int]:
        """(sparse, dense) bytes of one call; lists may touch every block."""
        layout = BlockLayout(self.args.head_size, 2, self.fmt)
        heads, sparse, dense = self.args.num_kv_heads, 0, 0
        for length, budget in zip(self.seq_lens, self.budgets.tolist(), strict=True):
            blocks = self.fmt.sealed_blocks(length)
            old = blocks * BLOCK_SIZE * self.fmt.quantised
            whole = layout.attended_bytes(length, old, blocks) * heads
            dense += whole
            if budget < 0:
                sparse += whole
                continue
            old = min(budget, old)
            listed = layout.attended_bytes(budget, old, min(old, blocks))
            sparse += (layout.score_bytes(blocks, self.args.rank) + listed) * heads
        return sparse, dense


def random_table(seq_lens: list[int], page: int, ahead: int = 0) -> torch.Tensor:
    """[rows, pages] int32: every row has pages of its own, in random order; 0 pads."""
    pages = [-(-length // page) + ahead for length in seq_lens]
    order = torch.randperm(sum(pages), device="cuda", dtype=torch.int32) + 1
    return torch.nn.utils.rnn.pad_sequence(order.split(pages), batch_first=True)


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


def measure(args, seq_lens: list[int]) -> dict:
    """Medians in microseconds, bytes, and the ratio of FlashAttention-3 to us."""
    row_bytes = BlockLayout(args.head_size, 2).row_bytes
    layer_bytes = sum(seq_lens) * args.num_kv_heads * row_bytes
    # Two at least, so that a call does not pay for the graph's start alone.
    layers = max(2, min(16, args.rotate_bytes // layer_bytes))
    stack = [Layer(args, seq_lens, bool(args.peers)) for _ in range(layers)]
    names = ["sparq", "select", "attend"] + (["dense"] if args.dense else [])
    calls = {name: [getattr(layer, name) for layer in stack] for name in names}
    stack[0].sparq()
    ours = stack[0].out.clone()
    stack[0].attend()  # over the lists that sparq has written
    assert_close(ours, stack[0].out, 1e-2)
    result = {name: time_graph(calls[name], args.repeats) for name in calls}
    for name in args.peers:
        try:
            peer = [PEERS[name](layer.dense_cache) for layer in stack]
            # Codes give other results; xformers attends to other contexts.
            if name != "xformers" and not stack[0].fmt.quantised:
                stack[0].dense()
                expected = stack[0].out.clone()
                peer[0]()
                assert_close(expected, stack[0].out, 1e-2)
            result[name] = time_graph(peer, args.repeats)
        except Exception as error:
            print(f"{name} cannot be timed here: {error}", flush=True)
            result[f"{name}_error"] = str(error)[:200]
    sparse, dense = stack[0].bytes_needed()
    result |= {"bytes_sparse": sparse, "bytes_dense": dense, "layers": layers}
    result["gb_per_s"] = sparse / result["sparq"] / 1e3
    if "fa3" in result:
        result["ratio"] = result["fa3"] / result["sparq"]
        result["gb_per_s_fa3"] = layer_bytes / result["fa3"] / 1e3
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=1024)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        help="rows x length, joined by +: 16x32768 or 1x131072+30x1024",
    )
    parser.add_argument(
        "--dense-below",
        type=int,
        default=DENSE_BELOW["cuda"],
        help="shorter contexts are dense",
    )
    parser.add_argument(
        "--tail", type=int, default=64, help="tokens short of the length"
    )
    parser.add_argument("--kv-format", choices=FORMATS, default="auto")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--rotate-bytes", type=int, default=2**30)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["fa3"])
    parser.add_argument("--dense", action="store_true", help="time our dense path, too")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    default = [f"{b}x{n}" for b in (1, 16) for n in (8192, 32768, 131072)]
    rows = []
    for case in args.cases or default:
        lens = []
        for part in case.split("+"):
            batch, length = map(int, part.split("x"))
            lens += batch * [length - args.tail]
        shape = {"batch": len(lens), "context": max(lens), "case": case}
        rows.append(shape | measure(args, lens))
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
    columns = ["sparq", "select", "attend", "dense", *args.peers]
    columns += ["ratio", "gb_per_s"]
    print("| case | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for r in rows:
        figures = " | ".join(f"{r.get(c, 0):.4g}" for c in columns)
        print(f"| {r['case']} | {figures} |")


if __name__ == "__main__":
    main()

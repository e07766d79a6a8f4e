# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Time one layer's decode attention beside others', in one run.

    python -m benchmarks.kernels.decode_attention --cases 1x32768 16x32768 \\
        --output NAME.json

Random block tables, own pages per request, several layers' caches in rotation. A case
is rows x length, joined by +: 16x32768 or 1x131072+30x1024. Selection is part of our
time; storing is timed by itself: a token of every row, and a prefill step of the first
row. Outputs are checked against each other before anything is timed.

With ``--kept KEPT.json`` of ``benchmarks.kernels.record_kept`` budgets are adaptive:
every case runs with the recorded numbers of tokens and with the recorded shares of the
context; ``fixed`` is top-k of the mean number on the same data.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.environment import save
from benchmarks.kernels.adaptive import AdaptiveLayer
from benchmarks.kernels.clocks import by_graphs, in_turns
from benchmarks.kernels.layer import Layer
from benchmarks.kernels.peers import PEERS
from vllm_sparse import ops
from vllm_sparse.cache.formats import FORMATS
from vllm_sparse.cache.layout import BlockLayout
from vllm_sparse.config import DENSE_BELOW, default_rank

CALLS = ("sparq", "select", "attend", "dense", "store", "store_prompt")
ADAPTIVE = ("top_p", "fixed", "select", "fixed_select")
# Of SmolLM2-135M, and of Llama-3.1-8B with the options that GPUs are measured with.
DEFAULTS = {
    "cpu": {
        "shape": "9x3x64",
        "top_k": 1 / 16,
        "dense_below": 0,
        "repeats": 60,
        "cases": [f"{b}x{n}" for n in (2048, 8192) for b in (1, 4, 8)],
        "peers": ["cpu_attn"],
    },
    "cuda": {
        "shape": "32x8x128",
        "rank": 32,
        "top_k": 1024,
        "dense_below": DENSE_BELOW["cuda"],
        "repeats": 30,
        "cases": [f"{b}x{n}" for b in (1, 16) for n in (8192, 32768, 131072)],
        "peers": ["fa3"],
    },
}


def num_layers(args: argparse.Namespace, seq_lens: list[int]) -> int:
    if args.device.type == "cpu":
        return 4
    row_bytes = BlockLayout(args.head_size, 2).row_bytes
    # Two at least, so that a call does not pay for the graph's start alone.
    return max(2, min(16, 2**30 // (sum(seq_lens) * args.kv_heads * row_bytes)))


def check(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    error = (got - expected).float().norm() / expected.float().norm()
    if not error < 1e-2:
        raise RuntimeError(f"{what} differs by {error:.3g} of the result")


def measure(args: argparse.Namespace, seq_lens: list[int]) -> dict:
    """Medians in microseconds, bytes, and the ratio of the first peer to us."""
    kind, names = (AdaptiveLayer, ADAPTIVE) if args.kept else (Layer, CALLS)
    stack = [kind(args, seq_lens) for _ in range(num_layers(args, seq_lens))]
    first, result = stack[0], {"layers": len(stack)}
    first.sparq()
    ours = first.out.clone()
    first.attend()  # over the lists that sparq has written
    check("attend", ours, first.out)
    sparse, dense = first.bytes_needed()
    if args.kept:
        counts = torch.cat([layer.counts.flatten() for layer in stack]).float()
        result["kept_mean"] = counts.mean().item()
        for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            result[f"kept_{name}"] = counts.quantile(q).item()
    calls = {name: [getattr(layer, name) for layer in stack] for name in names}
    first.dense()
    expected = first.out.clone()
    for name in args.peers:
        try:
            calls[name] = [PEERS[name](layer.peers) for layer in stack]
            calls[name][0]()
            # Codes give other results; xformers attends to other contexts.
            if name != "xformers" and not first.fmt.quantised:
                check(name, first.out, expected)
        except Exception as error:
            print(f"{name} cannot be timed here: {error}", flush=True)
            result[f"{name}_error"] = str(error)[:200]
            calls.pop(name, None)
    clock = in_turns if args.device.type == "cpu" else by_graphs
    result |= clock(calls, args.repeats)
    time = result[names[0]]
    result |= {"bytes_sparse": sparse, "bytes_dense": dense}
    result["gb_per_s"] = sparse / time / 1e3
    peer = args.peers[0] if args.peers else None
    if peer in result:
        result["ratio"] = result[peer] / time
        rows = sum(seq_lens) * args.kv_heads * BlockLayout(args.head_size, 2).row_bytes
        result["gb_per_s_peer"] = rows / result[peer] / 1e3
    return result


def print_table(args: argparse.Namespace, rows: list[dict]) -> None:
    columns = ["kept_mean", "kept_p99", *ADAPTIVE] if args.kept else [*CALLS]
    columns += [*args.peers, "ratio", "gb_per_s"]
    print("| case | " + " | ".join(columns) + " | KV bytes read |")
    print("|---" * (len(columns) + 2) + "|")
    for r in rows:
        figures = " | ".join(f"{r.get(c, math.nan):.4g}" for c in columns)
        share = r["bytes_sparse"] / r["bytes_dense"]
        print(f"| {r['case']} | {figures} | {100 * share:.1f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=torch.device, default=device)
    add("--shape", help="query heads x KV heads x head size")
    add("--rank", type=int, help="channels read; default: as in the backend, or 32")
    add("--top-k", type=float, help="tokens kept, or a fraction of the context")
    add("--cases", nargs="+")
    add("--dense-below", type=int, help="shorter contexts are dense")
    add("--tail", type=int, default=64, help="tokens short of the length")
    add("--kv-format", choices=FORMATS, default="auto")
    add("--repeats", type=int)
    add("--peers", nargs="*", choices=PEERS)
    add("--kept", type=Path, help="adaptive budgets, as recorded there")
    add("--top-p", type=float, default=0.95)
    add("--output", type=Path)
    device = parser.parse_known_args()[0].device
    parser.set_defaults(**DEFAULTS[device.type])
    given = parser.parse_args()
    shape = tuple(map(int, given.shape.split("x")))
    given.rank = given.rank or default_rank(shape[2])
    args = argparse.Namespace(**vars(given))
    args.heads, args.kv_heads, args.head_size = shape
    args.kept = json.loads(given.kept.read_text()) if given.kept else None

    def budget(length: int) -> int:
        if args.top_k >= 1:
            return int(args.top_k)
        return max(160, int(args.top_k * (length + args.tail)))

    args.budget = budget
    if args.device.type == "cpu":
        given.isa, given.threads = ops.cpu_isa(), torch.get_num_threads()
    torch.manual_seed(0)
    rows: list[dict] = []
    shares = (False, True) if args.kept else (False,)
    runs = [(case, share) for case in args.cases for share in shares]
    for case, args.share in tqdm(runs, disable=None):
        parts = [tuple(map(int, part.split("x"))) for part in case.split("+")]
        lens = [length - args.tail for batch, length in parts for _ in range(batch)]
        found = {"batch": len(lens), "context": max(lens), "share": args.share}
        name = f"{case} (shares)" if args.share else case
        rows.append({"case": name} | found | measure(args, lens))
        tqdm.write(str(rows[-1]))
        save(given, rows)
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
    print_table(args, rows)


if __name__ == "__main__":
    main()

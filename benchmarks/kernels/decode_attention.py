# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Time one layer's decode attention on the CPU beside vLLM's own kernel, in one run.

    python -m benchmarks.kernels.decode_attention --output benchmarks/results/NAME.json

Both sides read the same K and V through their own cache layouts, with random block
tables; calls alternate between the two and rotate over several layers' caches, so that
neither finds its data in the processor's caches. Selection is part of our time. Outputs
are checked against each other before anything is timed.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks.accuracy.environment import describe
from vllm_sparse import ops
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout
from vllm_sparse.config import default_rank
from vllm_sparse.testing.compare import assert_close
from vllm_sparse.testing.generate import paged_context


@dataclass(frozen=True)
class Case:
    """A layer shape and a batch of equal contexts."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    batch: int
    seq_len: int
    rank: int
    top_k: int


class Layer:
    """One layer's context in our cache and in vLLM's."""

    def __init__(self, case: Case, dtype: torch.dtype, seed: int) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        # A few tokens into a block, so that there is an unsealed tail.
        lens = [case.seq_len - 64] * case.batch
        ctx = paged_context(lens, case.num_kv_heads, case.head_size, dtype, generator)
        for row in range(case.batch):
            ops.store_kv(ctx.keys[row], ctx.values[row], ctx.kv_cache, ctx.slots(row))
        ops.seal_blocks(ctx.kv_cache, *ctx.seal_jobs(), case.head_size)
        shape = (case.batch, case.num_heads, case.head_size)
        self.query = torch.randn(shape, generator=generator).to(dtype)
        self.out = torch.empty_like(self.query)
        self.ctx = ctx
        self.scale = case.head_size**-0.5
        self._fill_vllm_cache(dtype)
        kept = (case.batch, case.num_kv_heads)
        self.indices = torch.empty((*kept, case.top_k + 128), dtype=torch.int32)
        self.counts = torch.empty(kept, dtype=torch.int32)
        self.budgets = torch.full((case.batch,), case.top_k, dtype=torch.int32)
        ctx.keys = ctx.values = []

    def _fill_vllm_cache(self, dtype: torch.dtype) -> None:
        case, ctx = self.case, self.ctx
        isa = _get_attn_isa(dtype, BLOCK_SIZE, case.head_size)
        blocks = ctx.kv_cache.shape[0]
        cache = torch.zeros(
            blocks, case.num_kv_heads, 2 * BLOCK_SIZE, case.head_size, dtype=dtype
        )
        self.key_cache, self.value_cache = cache.chunk(2, dim=2)
        for row in range(case.batch):
            vllm_ops.cpu_attn_reshape_and_cache(
                ctx.keys[row],
                ctx.values[row],
                self.key_cache,
                self.value_cache,
                ctx.slots(row),
                isa,
            )
        self.starts = torch.arange(case.batch + 1, dtype=torch.int32)
        self.plan = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=case.batch,
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_size,
            seq_lens=ctx.seq_lens,
            dtype=dtype,
            query_start_loc=self.starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )

    def cpu_attn(self) -> None:
        vllm_ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            output=self.out,
            query_start_loc=self.starts,
            seq_lens=self.ctx.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.ctx.block_table,
            softcap=0.0,
            scheduler_metadata=self.plan,
            s_aux=None,
        )

    def dense(self) -> None:
        ops.attend(*self._context(), scale=self.scale, out=self.out)

    def _context(self) -> tuple[torch.Tensor, ...]:
        ctx = self.ctx
        return self.query, ctx.kv_cache, ctx.block_table, ctx.seq_lens

    def _selection(self) -> dict:
        return {
            "rank": self.case.rank,
            "local_window": 32,
            "sink_tokens": 4,
            "scale": self.scale,
            "soft_cap": 0.0,
            **self._lists(),
        }

    def _lists(self) -> dict:
        return {"indices": self.indices, "counts": self.counts}

    def select(self) -> None:
        ops.sparq_select(*self._context(), self.budgets, **self._selection())

    def attend(self) -> None:
        ops.attend(*self._context(), **self._lists(), scale=self.scale, out=self.out)

    def sparq(self) -> None:
        selection = self._selection()
        ops.sparq_attend(*self._context(), self.budgets, **selection, out=self.out)

    def bytes_moved(self) -> tuple[int, int]:
        """(sparse, dense) unique bytes of one call."""
        case = self.case
        layout = BlockLayout(case.head_size, self.query.element_size())
        items = case.batch * case.num_kv_heads
        sealed = (case.seq_len - 64) // BLOCK_SIZE
        scores = layout.score_bytes(sealed, case.rank) * items
        rows = int(self.counts.sum()) * layout.row_bytes
        return scores + rows, (case.seq_len - 64) * layout.row_bytes * items


def measure(case: Case, dtype: torch.dtype, layers: int, repeats: int) -> dict:
    """Medians in microseconds, and the ratio of CPU_ATTN to the whole sparse op."""
    stack = [Layer(case, dtype, seed) for seed in range(layers)]
    stack[0].cpu_attn()
    expected = stack[0].out.clone()
    stack[0].dense()
    assert_close(stack[0].out, expected)
    names = ("cpu_attn", "sparq", "select", "attend", "dense")
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats):
        for name in names:
            call = getattr(stack[i % layers], name)
            start = time.perf_counter()
            call()
            if i >= layers:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    result = {name: statistics.median(t) * 1e6 for name, t in times.items()}
    sparse, dense = stack[0].bytes_moved()
    ours = result["sparq"]
    result |= {
        "ratio": result["cpu_attn"] / ours,
        "bytes_read": sparse,
        "bytes_dense": dense,
        "gb_per_s": sparse / ours / 1e3,
        "gb_per_s_cpu_attn": dense / result["cpu_attn"] / 1e3,
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-heads", type=int, default=9)
    parser.add_argument("--num-kv-heads", type=int, default=3)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rank", type=int, help="default: as in the backend")
    parser.add_argument("--fraction", type=float, default=1 / 16, help="tokens kept")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=4, help="caches to rotate over")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    current_platform.import_kernels()
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
    dtype = getattr(torch, args.dtype)
    rows = []
    print("| batch | context | CPU_ATTN us | sparq us | ratio | KV bytes read |")
    print("|---|---|---|---|---|---|")
    for seq_len in args.lengths:
        for batch in args.batches:
            case = Case(
                num_heads=args.num_heads,
                num_kv_heads=args.num_kv_heads,
                head_size=args.head_size,
                batch=batch,
                seq_len=seq_len,
                rank=args.rank or default_rank(args.head_size),
                top_k=max(160, int(args.fraction * seq_len)),
            )
            got = measure(case, dtype, args.layers, args.repeats)
            rows.append({"case": vars(case) | {"dtype": args.dtype}, **got})
            share = got["bytes_read"] / got["bytes_dense"]
            print(
                f"| {batch} | {seq_len} | {got['cpu_attn']:.0f} | {got['sparq']:.0f} "
                f"| {got['ratio']:.2f} | {100 * share:.1f} % |"
            )
    if args.output:
        header = describe() | {
            "isa": ops.cpu_isa(),
            "threads": torch.get_num_threads(),
        }
        args.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

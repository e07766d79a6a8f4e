# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""One layer's contexts in our cache, and the calls on them that are timed."""

import argparse
from functools import cached_property

import torch

from benchmarks.kernels.peers import DenseCache
from vllm_sparse import ops
from vllm_sparse.cache.formats import resolve_format
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout

DTYPE = torch.bfloat16
PROMPT_CHUNK = 8192  # tokens of a prefill step


class Layer:
    """A layer of ``args.heads`` query and ``args.kv_heads`` KV heads."""

    workspace: torch.Tensor | None = None  # of all layers, as in an engine

    def __init__(self, args: argparse.Namespace, seq_lens: list[int]) -> None:
        """Random keys, a few strong channels among theirs as in real models."""
        self.args, self.seq_lens = args, seq_lens
        heads, size, self.device = args.kv_heads, args.head_size, args.device
        self.fmt = resolve_format(args.kv_format, None, size, has_mean=False)
        self.layout = BlockLayout(size, DTYPE.itemsize, self.fmt)
        ahead = self.layout.lookahead_blocks
        self.table = random_table(seq_lens, BLOCK_SIZE, self.device, ahead)
        content = self.layout.content_bytes // DTYPE.itemsize
        shape = (int(self.table.max()) + 1, heads, BLOCK_SIZE, content)
        self.cache = torch.empty(shape, dtype=DTYPE, device=self.device)
        self.lens = self._ints(seq_lens)
        self.query = torch.randn(
            (len(seq_lens), args.heads, size), device=self.device, dtype=DTYPE
        )
        self.out = torch.empty_like(self.query)
        self.peers = self._dense_cache() if args.peers else None
        strength = torch.rand(heads, size, device=self.device) * 2
        newest = []
        for row, length in enumerate(seq_lens):
            shape = (length, heads, size)
            key = torch.randn(shape, device=self.device, dtype=DTYPE) * strength
            key, value = key.to(DTYPE), torch.randn(shape, device=self.device).to(DTYPE)
            newest.append((key[-1], value[-1]))
            ops.store(*self._new_tokens(key, value, row))
            if self.peers:
                self.peers.put(row, key, value)
            if row == 0:
                tail = length % BLOCK_SIZE
                sealed = (min(length, PROMPT_CHUNK) - tail) // BLOCK_SIZE
                chunk = tail + sealed * BLOCK_SIZE
                self.prompt = self._new_tokens(key[-chunk:], value[-chunk:], 0)
        keys, values = map(torch.stack, zip(*newest))
        self.token = self._new_tokens(keys, values)
        budgets = [args.budget(length) for length in seq_lens]
        self.budgets = self._ints(budgets)
        self.budgets[self.lens < args.dense_below] = -1
        shape = (len(seq_lens), heads)
        self.counts = torch.empty(shape, dtype=torch.int32, device=self.device)
        shape = (*shape, max(budgets) + BLOCK_SIZE)
        self.indices = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self.options = ops.SparqOptions(
            rank=args.rank, local_window=32, sink_tokens=4, scale=size**-0.5
        )
        group, blocks = args.heads // heads, self.table.shape[1]
        shape = (len(seq_lens), heads, group, blocks, size, self.device)
        needed = ops.workspace_bytes(*shape, adapts=True)
        if needed and (Layer.workspace is None or len(Layer.workspace) < needed):
            Layer.workspace = torch.zeros(needed, dtype=torch.uint8, device=self.device)

    def _ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _dense_cache(self) -> DenseCache:
        page = 64 if self.device.type == "cuda" else BLOCK_SIZE
        table = random_table(self.seq_lens, page, self.device)
        shape = (2, int(table.max()) + 1, page, self.args.kv_heads, self.args.head_size)
        key, value = torch.zeros(shape, dtype=DTYPE, device=self.device)
        return DenseCache(
            self.query, self.out, key, value, table, self.lens, max(self.seq_lens)
        )

    def _new_tokens(
        self, key: torch.Tensor, value: torch.Tensor, row: int | None = None
    ) -> tuple:
        """Arguments of ``ops.store``: the last tokens of a row, or one of every row."""
        rows = slice(None) if row is None else slice(row, row + 1)
        if row is None:
            place, which = self.lens.long() - 1, range(len(self.lens))
            starts = range(len(self.lens) + 1)
        else:
            length = self.seq_lens[row]
            place = torch.arange(length - len(key), length, device=self.device)
            which, starts = row, [0, len(key)]
        block = self.table[which, place // BLOCK_SIZE].long()
        slots = block * BLOCK_SIZE + place % BLOCK_SIZE
        context = self.table[rows], self.lens[rows], self._ints(list(starts))
        return key, value, self.cache, slots, *context, self.fmt

    @cached_property
    def context(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.cache, self.table, self.lens

    @cached_property
    def lists(self) -> dict[str, torch.Tensor]:
        return {"indices": self.indices, "counts": self.counts}

    def choose(
        self, budgets: torch.Tensor, options: ops.SparqOptions, out: torch.Tensor | None
    ) -> None:
        """Choose tokens and, into ``out``, attend to them."""
        space = Layer.workspace
        given = (*self.context, budgets, options)
        ops.sparq_attend(*given, **self.lists, out=out, workspace=space, fmt=self.fmt)

    def sparq(self) -> None:
        self.choose(self.budgets, self.options, self.out)

    def select(self) -> None:
        self.choose(self.budgets, self.options, None)

    def attend(self) -> None:
        """Over the lists that were chosen last."""
        self._attend(self.lists)

    def dense(self) -> None:
        self._attend({})

    def _attend(self, lists: dict[str, torch.Tensor]) -> None:
        given = {"scale": self.options.scale, "workspace": Layer.workspace}
        ops.attend(*self.context, **lists, **given, out=self.out, fmt=self.fmt)

    def store(self) -> None:
        """One new token of every row, as in a decode step."""
        ops.store(*self.token)

    def store_prompt(self) -> None:
        """A prefill step of the first row, whose blocks are sealed."""
        ops.store(*self.prompt)

    def bytes_needed(self) -> tuple[int, int]:
        """(sparse, dense) bytes of the last call; lists may touch every block."""
        sparse = dense = 0
        for length, counts in zip(self.seq_lens, self.counts.tolist(), strict=True):
            blocks = self.fmt.sealed_blocks(length)
            coded = blocks * BLOCK_SIZE * self.fmt.quantised
            whole = self.layout.attended_bytes(length, coded, blocks)
            scores = self.layout.score_bytes(blocks, self.options.rank)
            for kept in counts:
                old = min(kept, coded)
                listed = self.layout.attended_bytes(kept, old, min(old, blocks))
                sparse += whole if kept < 0 else scores + listed
                dense += whole
        return sparse, dense


def random_table(
    seq_lens: list[int], page: int, device: torch.device, ahead: int = 0
) -> torch.Tensor:
    """[rows, pages] int32: every row has pages of its own, in random order; 0 pads."""
    pages = [-(-length // page) + ahead for length in seq_lens]
    order = torch.randperm(sum(pages), device=device, dtype=torch.int32) + 1
    return torch.nn.utils.rnn.pad_sequence(order.split(pages), batch_first=True)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Builder and layer, driven step by step as vLLM's model runner drives them.

A :class:`Driver` keeps every request's full history, so what a step must produce is
known from plain attention (dense rows) or from ops/reference (sparse rows), however
the history was split into prompts, chunks, decodes and drafts.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.ops.compare import assert_close
from tests.ops.generate import empty_cache
from vllm_sparse import plugin
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout
from vllm_sparse.ops import SparqOptions, reference

from .plain import causal_attention, softmax_with

plugin.register()

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Relative error of a step's outputs against fp32 attention over the rounded inputs;
# vLLM's prefill kernel rounds probabilities to the model's dtype.
TOLERANCE = {FP32: 1e-5, FP16: 2e-3, BF16: 1e-2}
LAYER = SimpleNamespace(layer_name="model.layers.1.self_attn.attn")


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    size: int
    dtype: torch.dtype = FP32
    soft_cap: float = 0.0
    spec_tokens: int = 0
    sinks: bool = False


GQA = Shape(6, 2, 64)
MHA = Shape(3, 3, 80)
MQA = Shape(5, 1, 128)
DENSE = {"top_k": 1.0}
SPARSE = {"top_k": 60, "local_window": 16, "sink_tokens": 4, "dense_below": 130}


@dataclass(frozen=True)
class Part:
    """One request's share of a step.

    Args:
        request: its number.
        new: query tokens.
        prompt: whether they belong to the prompt (vLLM's is_prefilling).
        rewind: tokens of the step before that were rejected drafts.
        hit: (request, blocks) of another request that start this one's context.
    """

    request: int
    new: int
    prompt: bool = True
    rewind: int = 0
    hit: tuple[int, int] | None = None


def decode(request: int, new: int = 1, rewind: int = 0) -> Part:
    return Part(request, new, False, rewind)


class Request:
    def __init__(self, blocks: list[int]) -> None:
        self.blocks = blocks
        self.key = self.value = None  # [tokens, kv_heads, size]

    @property
    def length(self) -> int:
        return 0 if self.key is None else len(self.key)


class Driver:
    BLOCKS_PER_REQUEST = 6

    def __init__(self, path, shape, vllm_config, num_requests, **layer_arguments):
        from vllm_sparse.layer.impl import SparseAttentionImpl
        from vllm_sparse.stats.recorder import recorder
        from vllm_sparse.step.builder import SparseMetadataBuilder

        self.path = path
        self.device = torch.device("cuda" if path == "gpu" else "cpu")
        recorder.counters.clear()
        self.shape = shape
        self.random = torch.Generator().manual_seed(0)
        self.sinks = None
        if shape.sinks:  # before those of a checkpoint are loaded
            self.sinks = torch.zeros(shape.heads, dtype=shape.dtype, device=self.device)
            layer_arguments["sinks"] = self.sinks
        self.impl = SparseAttentionImpl(
            shape.heads,
            shape.size,
            shape.size**-0.5,
            shape.kv_heads,
            logits_soft_cap=shape.soft_cap or None,
            **layer_arguments,
        )
        self.builder = SparseMetadataBuilder(
            FullAttentionSpec(
                block_size=BLOCK_SIZE,
                num_kv_heads=shape.kv_heads,
                head_size=shape.size,
                dtype=shape.dtype,
            ),
            [LAYER.layer_name],
            vllm_config,
            self.device,
        )
        if shape.sinks:
            loaded = torch.randn(shape.heads, generator=self.random) * 3
            self.sinks.copy_(loaded)
            self.sinks = self.sinks.cpu()
        self.fmt = self.impl.fmt
        layout = BlockLayout(shape.size, shape.dtype.itemsize, self.fmt)
        self.blocks = self.BLOCKS_PER_REQUEST + layout.lookahead_blocks
        count = num_requests * self.blocks
        # Block 0 is vLLM's null block: it pads tables and is never written.
        cache = empty_cache(
            1 + count, shape.kv_heads, shape.size, shape.dtype, self.fmt
        )
        if path == "gpu" and not self.fmt.quantised:
            # FlashAttention multiplies rows that it masks by zero, and vLLM's caches
            # start as zeros. The sidecar stays poisoned: nothing but we may read it.
            reference.kv_rows(cache, shape.size).zero_()
        self.cache = cache.to(self.device)
        order = (torch.randperm(count, generator=self.random) + 1).tolist()
        self.requests = [
            Request([order.pop() for _ in range(self.blocks)])
            for _ in range(num_requests)
        ]
        recorder.reset()
        self.recorder = recorder
        self.sparse_rows = 0
        self.dense_layer = False

    def random_tokens(self, heads: int, tokens: int) -> torch.Tensor:
        shape = (tokens, heads, self.shape.size)
        return torch.randn(shape, generator=self.random)

    def step(self, *parts: Part) -> None:
        """Run one step and compare every row with what it must be."""
        shape = self.shape
        total = sum(part.new for part in parts)
        padding = 3  # rows that vLLM adds; they carry no tokens
        widths = [shape.heads, shape.kv_heads, shape.kv_heads]
        qkv = self.random_tokens(sum(widths), total + padding).to(shape.dtype)
        query, key, value = qkv.split(widths, dim=1)
        # Some channels stronger than others, as in real models.
        key.mul_(torch.linspace(0.2, 2, shape.size).to(shape.dtype))

        starts = [0]
        for part in parts:
            starts.append(starts[-1] + part.new)
        # Owners of shared blocks first: their users copy from them.
        for row, part in sorted(enumerate(parts), key=lambda item: bool(item[1].hit)):
            rows = slice(starts[row], starts[row + 1])
            self.append(part, key[rows], value[rows])
        slots = []
        table = torch.zeros(len(parts), self.blocks + 2, dtype=torch.int32)
        ahead = self.blocks - self.BLOCKS_PER_REQUEST
        for row, part in enumerate(parts):
            request = self.requests[part.request]
            used = -(-request.length // BLOCK_SIZE) + ahead
            table[row, :used] = torch.tensor(request.blocks[:used])
            for position in range(request.length - part.new, request.length):
                block = request.blocks[position // BLOCK_SIZE]
                slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
        lens = [self.requests[part.request].length for part in parts]
        starts = torch.tensor(starts, dtype=torch.int32)
        slots = torch.tensor(slots + [-1] * padding)
        metadata = self.builder.build(
            common_prefix_len=0,
            common_attn_metadata=CommonAttentionMetadata(
                query_start_loc=starts.to(self.device),
                query_start_loc_cpu=starts,
                seq_lens=torch.tensor(lens, dtype=torch.int32).to(self.device),
                seq_lens_cpu_upper_bound=torch.tensor(lens, dtype=torch.int32),
                num_reqs=len(parts),
                num_actual_tokens=total,
                max_query_len=max(part.new for part in parts),
                max_seq_len=max(lens),
                block_table_tensor=table.to(self.device),
                slot_mapping=slots.to(self.device),
                is_prefilling=torch.tensor([part.prompt for part in parts]),
            ),
        )
        if self.impl.kv_sharing_target_layer_name is None:
            key, value = (t.to(self.device) for t in (key, value))
        else:
            # Another layer has stored and sealed; this one has no K and V at all.
            cache = self.cache.cpu()
            lens = torch.tensor(lens)
            reference.store(key, value, cache, slots, table, lens, starts)
            self.cache.copy_(cache)
            key = value = None
        output = torch.full_like(query, torch.nan, device=self.device)
        there = query.to(self.device)
        self.impl.forward(LAYER, there, key, value, self.cache, metadata, output)
        assert output[total:].isnan().all()
        self.lists = None
        if self.path == "gpu" and metadata.decode and metadata.together is None:
            (rows,) = metadata.decode
            self.lists = rows.indices.cpu(), rows.counts.cpu()
        want = []
        for part, start in zip(parts, starts.tolist()):
            rows = query[start : start + part.new]
            want.append(self.expected(part, rows, start))
        got = output[:total].float().cpu()
        assert_close(got, torch.cat(want), TOLERANCE[shape.dtype])

    def append(self, part: Part, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add a step's tokens to a request's history."""
        request = self.requests[part.request]
        if part.hit is not None:
            source, blocks = part.hit
            owner = self.requests[source]
            request.blocks[:blocks] = owner.blocks[:blocks]
            request.key = owner.key[: blocks * BLOCK_SIZE]
            request.value = owner.value[: blocks * BLOCK_SIZE]
        kept = request.length - part.rewind
        if request.key is None:
            request.key, request.value = key[:0], value[:0]
        request.key = torch.cat([request.key[:kept], key])
        request.value = torch.cat([request.value[:kept], value])

    def expected(self, part: Part, query: torch.Tensor, start: int) -> torch.Tensor:
        """What a request's rows, from ``start``, must yield: [rows, heads, size]."""
        want = self.dense(part.request, query)
        if part.prompt or self.dense_layer:
            return want
        length = self.requests[part.request].length - part.new
        for row in range(part.new):
            length += 1
            budget = self.budget(length)
            if budget >= 0:
                self.sparse_rows += 1
                want[row] = self.sparse(
                    part.request, query[row], length, budget, start + row
                )
        return want

    def budget(self, length: int) -> int:
        """Tokens that a decode row keeps; -1: all."""
        config, kept = self.builder.config, self.builder.config.top_k
        if isinstance(kept, float):
            kept = math.ceil(kept * length)
        tail = self.fmt.tail_tokens(length)
        kept = max(kept, config.sink_tokens + max(config.local_window, tail))
        return -1 if length < config.dense_below or kept >= length else kept

    def dense(self, number: int, query: torch.Tensor) -> torch.Tensor:
        """Causal attention of the last tokens: [rows, heads, size] fp32."""
        request, shape = self.requests[number], self.shape
        if self.fmt.quantised:
            # Chunks, hits and drafts make no difference: every row is a decode row.
            return self.over_codes(number, query)
        scaling = (shape.size**-0.5, shape.soft_cap, self.sinks)
        return causal_attention(query, request.key, request.value, *scaling)

    def over_codes(self, number: int, query: torch.Tensor) -> torch.Tensor:
        """Attention of the last tokens to codes of the blocks before their own, and to
        their own block: [rows, heads, size] fp32."""
        request, shape = self.requests[number], self.shape
        length = request.length
        cache, table = self.reference_cache(number, length)
        known = [torch.empty(length, shape.kv_heads, shape.size) for _ in range(2)]
        lens, start = torch.tensor([length]), torch.tensor([0])
        reference.gather_kv(cache, table, lens, start, *known, self.fmt)
        group = shape.heads // shape.kv_heads
        key, value, old_key, old_value = (
            t.float().transpose(0, 1).repeat_interleave(group, 0)
            for t in (request.key, request.value, *known)
        )
        q = query.float().transpose(0, 1)
        position = torch.arange(length)
        own = position[length - len(query) :, None]
        old = own // BLOCK_SIZE > position // BLOCK_SIZE
        logits = torch.where(old, q @ old_key.mT, q @ key.mT) * shape.size**-0.5
        if shape.soft_cap:
            logits = shape.soft_cap * torch.tanh(logits / shape.soft_cap)
        logits = logits.masked_fill(own < position, -torch.inf)
        weights = softmax_with(self.sinks, logits)
        out = (weights * old) @ old_value + (weights * ~old) @ value
        return out.transpose(0, 1)

    def attend(self, number, query, length, lists=(None,) * 3) -> torch.Tensor:
        """The reference's attention over a cache that it wrote: [heads, size]."""
        cache, blocks = self.reference_cache(number, length)
        lens = torch.tensor([length], dtype=torch.int32)
        q = query[None].float()
        out = torch.empty_like(q)
        names = ("indices", "counts", "kept_mass")
        options = dict(zip(names, lists), fmt=self.fmt, out=out)
        options |= {"scale": self.shape.size**-0.5, "soft_cap": self.shape.soft_cap}
        options["sinks"] = self.sinks
        reference.attend(q, cache, blocks, lens, **options)
        return out[0]

    def sparse(self, number, query, length, budget, row) -> torch.Tensor:
        """The reference's selection and attention over a cache that it wrote."""
        request, shape, config = self.requests[number], self.shape, self.impl.config
        # The reference reads what vLLM would have stored by this position.
        cache, blocks = self.reference_cache(number, length)
        lens = torch.tensor([length], dtype=torch.int32)
        q = query[None].float()
        indices = torch.zeros(1, shape.kv_heads, length, dtype=torch.int32)
        counts = torch.zeros(1, shape.kv_heads, dtype=torch.int32)
        mass = torch.ones(1, shape.heads) if config.mean_value else None
        where = (q, cache, blocks, lens)
        scaling = (shape.size**-0.5, shape.soft_cap)
        options = SparqOptions(
            config.rank,
            config.local_window,
            config.sink_tokens,
            *scaling,
            top_p=1.0 if config.top_p is None else config.top_p,
            min_tokens=config.min_tokens,
        )
        reference.sparq_attend(
            *where,
            torch.tensor([budget]),
            options,
            indices=indices,
            counts=counts,
            kept_mass=mass,
            fmt=self.fmt,
        )
        assert (counts > 0).all() and (counts < length).all(), (counts, request.length)
        if self.lists is not None:
            indices, counts, mass = self.chosen(
                row, where, options, length, indices, counts, mass
            )
        return self.attend(number, query, length, (indices, counts, mass))

    def chosen(self, row, where, options, length, indices, counts, mass):
        """The GPU's own lists, once they are known to be as good as the reference's.

        Its scores are rounded, so that tokens of nearly equal score may change places.
        """
        query, cache, blocks, _ = where
        got_indices, got_counts = (t[row : row + 1] for t in self.lists)
        assert torch.equal(got_counts, counts)
        group = self.shape.heads // self.shape.kv_heads
        for head in range(self.shape.kv_heads):
            q = query[0].view(self.shape.kv_heads, group, -1)[head]
            where = (q, cache, blocks[0], length, head)
            probs = reference.sparq_probabilities(*where, options, self.fmt)
            count = int(counts[0, head])
            best, got = (t[0, head, :count].long() for t in (indices, got_indices))
            assert (got.diff() > 0).all()
            assert probs[:, got].sum() >= 0.99 * probs[:, best].sum()
            if mass is not None:
                heads = slice(head * group, (head + 1) * group)
                mass[0, heads] = probs[:, got].sum(-1)
        return got_indices, got_counts, mass

    def reference_cache(self, number, length) -> tuple[torch.Tensor, torch.Tensor]:
        """A cache of ``length`` tokens that the reference stored and sealed, and its
        block table."""
        request, shape = self.requests[number], self.shape
        ahead = self.blocks - self.BLOCKS_PER_REQUEST
        blocks = -(-length // BLOCK_SIZE) + ahead
        size = (shape.kv_heads, shape.size, shape.dtype, self.fmt)
        cache = empty_cache(1 + blocks, *size)
        table = torch.arange(1, 1 + blocks, dtype=torch.int32)[None]
        position = torch.arange(length)
        slots = (1 + position // BLOCK_SIZE) * BLOCK_SIZE + position % BLOCK_SIZE
        new = (request.key[:length], request.value[:length])
        where = (table, torch.tensor([length]), torch.tensor([0, length]))
        reference.store(*new, cache, slots, *where, self.fmt)
        return cache, table

    def check_sealed(self) -> int:
        """Compare the sidecars of all full blocks with the reference's."""
        layout = BlockLayout(self.shape.size, self.shape.dtype.itemsize, self.fmt)
        cache = self.cache.cpu()
        end = layout.prefix_mean_offset
        blocks = 0
        for number, request in enumerate(self.requests):
            want, _ = self.reference_cache(number, request.length)
            for i in range(request.length // BLOCK_SIZE):
                chunk = cache[request.blocks[i]].flatten(1).view(torch.uint8)
                expected = want[1 + i].flatten(1).view(torch.uint8)
                assert torch.equal(chunk[:, :end], expected[:, :end]), (number, i)
                blocks += 1
                if not self.fmt.has_mean:
                    continue
                mean, expected_mean = (
                    c[:, end : end + 2 * self.shape.size].view(torch.float16)
                    for c in (chunk, expected)
                )
                assert_close(mean.contiguous(), expected_mean.contiguous(), 1e-3)
        # The null block is never written.
        null = cache[0].flatten(1).view(torch.uint8)[:, layout.codes_offset :]
        assert (null == 0xFF).all()
        return blocks

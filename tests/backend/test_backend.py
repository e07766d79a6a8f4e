# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Builder and layer, driven step by step as vLLM's model runner drives them.

A :class:`Driver` keeps every request's full history, so what a step must produce is
known from plain attention (dense rows) or from ops/reference.py (sparse rows), however
the history was split into prompts, chunks, decodes and drafts.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import (  # noqa: E402
    AttentionConfig,
    CacheConfig,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.config.compilation import CUDAGraphMode  # noqa: E402
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from vllm_sparse import plugin  # noqa: E402
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout  # noqa: E402
from vllm_sparse.config import SparseConfig, SparseConfigError  # noqa: E402
from vllm_sparse.ops import reference  # noqa: E402
from vllm_sparse.testing.compare import assert_close  # noqa: E402
from vllm_sparse.testing.generate import empty_cache  # noqa: E402

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


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Config files of tiny Llamas, by shape."""

    def make(shape: Shape) -> str:
        folder = tmp_path_factory.mktemp("model")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.heads * shape.size,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.size,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "vocab_size": 128,
            "max_position_embeddings": 4096,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


@pytest.fixture(
    params=[
        "cpu",
        "gpu-on-cpu",  # the GPU's layer and builder over the CPU's kernels
        pytest.param("triton-on-cpu", marks=pytest.mark.interpreted),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def drive(model_folder, request, monkeypatch):
    path = request.param
    if path == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if path == "triton-on-cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    if path in ("gpu-on-cpu", "triton-on-cpu"):
        from vllm_sparse.attention import gpu_impl

        monkeypatch.setattr(gpu_impl, "flash_attention_version", lambda shape: 0)
        monkeypatch.setattr(gpu_impl, "prefill", plain_prefill)

    def make(shape: Shape, options: dict, num_requests: int, **layer_arguments):
        if path == "gpu" and shape.dtype == FP32:
            shape = replace(shape, dtype=BF16)
        if path == "triton-on-cpu":
            options = options | {"kernels": "triton"}
        model = ModelConfig(
            model=model_folder(shape), skip_tokenizer_init=True, dtype=shape.dtype
        )
        vllm_config = VllmConfig(
            model_config=model,
            cache_config=CacheConfig(),
            attention_config=AttentionConfig(backend="SPARQ"),
            compilation_config={"cudagraph_mode": "NONE"},
            additional_config={"sparse": options},
        )
        if shape.spec_tokens:
            vllm_config.speculative_config = SimpleNamespace(
                num_speculative_tokens=shape.spec_tokens, parallel_drafting=False
            )
        with set_current_vllm_config(vllm_config):
            return Driver(path, shape, vllm_config, num_requests, **layer_arguments)

    return make


def plain_prefill(query, kv_cache, rows, shape, version, out) -> None:
    """What FlashAttention computes, from the views that it is given."""
    from vllm_sparse.attention.gpu_prefill import key_value_views

    key, value = key_value_views(kv_cache, shape.head_size)
    starts = rows.query_start_loc.tolist()
    for row, length in enumerate(rows.seq_lens.tolist()):
        tokens = slice(starts[row], starts[row + 1])
        blocks = rows.block_table[row, : -(-length // BLOCK_SIZE)].long()
        k, v = (t[blocks].flatten(0, 1)[:length] for t in (key, value))
        assert length <= rows.max_seq_len
        assert tokens.stop - tokens.start <= rows.max_query_len
        out[tokens] = causal_attention(
            query[tokens], k, v, shape.scale, shape.soft_cap
        ).to(out.dtype)


def causal_attention(query, key, value, scale, soft_cap) -> torch.Tensor:
    """The last tokens of one context: [tokens, heads, size] fp32."""
    group = query.shape[1] // key.shape[1]
    key, value = (
        t.float().transpose(0, 1).repeat_interleave(group, 0) for t in (key, value)
    )
    logits = query.float().transpose(0, 1) @ key.mT * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    future = torch.ones(logits.shape[1:], dtype=torch.bool)
    future = future.triu(key.shape[1] - len(query) + 1)
    weights = logits.masked_fill(future, -torch.inf).softmax(-1)
    return (weights @ value).transpose(0, 1)


class Driver:
    BLOCKS_PER_REQUEST = 6

    def __init__(self, path, shape, vllm_config, num_requests, **layer_arguments):
        from vllm_sparse.attention.stats import recorder

        if path == "cpu":
            from vllm_sparse.attention.cpu_impl import CpuSparseAttentionImpl as Impl
            from vllm_sparse.attention.cpu_metadata import (
                CpuSparseMetadataBuilder as Builder,
            )
        else:
            from vllm_sparse.attention.gpu_impl import GpuSparseAttentionImpl as Impl
            from vllm_sparse.attention.gpu_metadata import (
                GpuSparseMetadataBuilder as Builder,
            )
        self.path = path
        self.device = torch.device("cuda" if path == "gpu" else "cpu")
        recorder.counters.clear()
        self.shape = shape
        self.random = torch.Generator().manual_seed(0)
        self.impl = Impl(
            shape.heads,
            shape.size,
            shape.size**-0.5,
            shape.kv_heads,
            logits_soft_cap=shape.soft_cap or None,
            **layer_arguments,
        )
        self.builder = Builder(
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
        count = num_requests * self.BLOCKS_PER_REQUEST
        # Block 0 is vLLM's null block: it pads tables and is never written.
        cache = empty_cache(1 + count, shape.kv_heads, shape.size, shape.dtype)
        if path == "gpu":
            # FlashAttention multiplies rows that it masks by zero, and vLLM's caches
            # start as zeros. The sidecar stays poisoned: nothing but we may read it.
            reference.kv_rows(cache, shape.size).zero_()
        self.cache = cache.to(self.device)
        order = (torch.randperm(count, generator=self.random) + 1).tolist()
        self.requests = [
            Request([order.pop() for _ in range(self.BLOCKS_PER_REQUEST)])
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
        table = torch.zeros(len(parts), self.BLOCKS_PER_REQUEST + 2, dtype=torch.int32)
        for row, part in enumerate(parts):
            request = self.requests[part.request]
            used = -(-request.length // BLOCK_SIZE)
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
            if self.path == "cpu":
                self.impl.do_kv_cache_update(LAYER, key, value, self.cache, slots)
        else:
            # Another layer has stored and sealed; this one has no K and V at all.
            cache = self.cache.cpu()
            reference.store_kv(key, value, cache, slots)
            self.seal_by_reference(cache, parts)
            self.cache.copy_(cache)
            key = value = None
        output = torch.full_like(query, torch.nan, device=self.device)
        there = query.to(self.device)
        self.impl.forward(LAYER, there, key, value, self.cache, metadata, output)
        assert output[total:].isnan().all()
        self.lists = None
        if self.path == "gpu" and metadata.decode:
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
        tail = length % BLOCK_SIZE
        kept = max(kept, config.sink_tokens + max(config.local_window, tail))
        return -1 if length < config.dense_below or kept >= length else kept

    def dense(self, number: int, query: torch.Tensor) -> torch.Tensor:
        """Causal attention of the last tokens: [rows, heads, size] fp32."""
        request, shape = self.requests[number], self.shape
        scaling = (shape.size**-0.5, shape.soft_cap)
        return causal_attention(query, request.key, request.value, *scaling)

    def sparse(self, number, query, length, budget, row) -> torch.Tensor:
        """The reference's selection and attention over a cache that it wrote."""
        request, shape, config = self.requests[number], self.shape, self.impl.config
        # The reference reads what vLLM would have stored by this position.
        cache = self.reference_cache(number, length)
        blocks = torch.arange(len(cache), dtype=torch.int32)[None]
        lens = torch.tensor([length], dtype=torch.int32)
        q = query[None].float()
        indices = torch.zeros(1, shape.kv_heads, length, dtype=torch.int32)
        counts = torch.zeros(1, shape.kv_heads, dtype=torch.int32)
        mass = torch.ones(1, shape.heads) if config.mean_value else None
        where = (q, cache, blocks, lens)
        scaling = (shape.size**-0.5, shape.soft_cap)
        assert config.selector == "sparq"
        reference.sparq_select(
            *where,
            torch.tensor([budget]),
            config.rank,
            config.local_window,
            config.sink_tokens,
            *scaling,
            indices,
            counts,
            mass,
        )
        assert (counts > 0).all() and (counts < length).all(), (counts, request.length)
        if self.lists is not None:
            indices, counts, mass = self.chosen(
                row, where, scaling, length, indices, counts, mass
            )
        out = torch.empty_like(q)
        reference.attend(*where, indices, counts, mass, *scaling, out)
        return out[0]

    def chosen(self, row, where, scaling, length, indices, counts, mass):
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
            probs = reference.sparq_probabilities(
                *where, self.impl.config.rank, *scaling
            )
            count = int(counts[0, head])
            best, got = (t[0, head, :count].long() for t in (indices, got_indices))
            assert (got.diff() > 0).all()
            assert probs[:, got].sum() >= 0.99 * probs[:, best].sum()
            if mass is not None:
                heads = slice(head * group, (head + 1) * group)
                mass[0, heads] = probs[:, got].sum(-1)
        return got_indices, got_counts, mass

    def reference_cache(self, number, length) -> torch.Tensor:
        """A cache of ``length`` tokens that the reference stored and sealed."""
        request, shape = self.requests[number], self.shape
        blocks = -(-length // BLOCK_SIZE)
        cache = empty_cache(blocks, shape.kv_heads, shape.size, shape.dtype)
        position = torch.arange(length)
        rows = torch.cat([request.key[:length], request.value[:length]], dim=-1)
        stored = reference.kv_rows(cache, shape.size)
        stored[position // BLOCK_SIZE, :, position % BLOCK_SIZE] = rows
        full = torch.arange(length // BLOCK_SIZE)
        reference.seal_blocks(cache, full, full - 1, full, shape.size)
        return cache

    def seal_by_reference(self, cache, parts) -> None:
        for part in parts:
            request = self.requests[part.request]
            full = torch.arange(request.length // BLOCK_SIZE)
            ids = torch.tensor(request.blocks)[full]
            previous = torch.cat([full[:1] - 1, ids[:-1]])
            reference.seal_blocks(cache, ids, previous, full, self.shape.size)

    def check_sealed(self) -> int:
        """Compare the sidecars of all full blocks with the reference's."""
        layout = BlockLayout(self.shape.size, self.shape.dtype.itemsize)
        cache = self.cache.cpu()
        end = layout.prefix_mean_offset
        blocks = 0
        for number, request in enumerate(self.requests):
            want = self.reference_cache(number, request.length)
            for i in range(request.length // BLOCK_SIZE):
                chunk = cache[request.blocks[i]].flatten(1).view(torch.uint8)
                expected = want[i].flatten(1).view(torch.uint8)
                assert torch.equal(chunk[:, :end], expected[:, :end]), (number, i)
                mean, expected_mean = (
                    c[:, end : end + 2 * self.shape.size].view(torch.float16)
                    for c in (chunk, expected)
                )
                assert_close(mean.contiguous(), expected_mean.contiguous(), 1e-3)
                blocks += 1
        # The null block is never written.
        null = cache[0].flatten(1).view(torch.uint8)[:, layout.codes_offset :]
        assert (null == 0xFF).all()
        return blocks


# A scenario is a list of steps; requests are numbered from 0. Decodes come first in a
# step, as vLLM orders its batches.
SCENARIOS = {
    "prefill-only": [
        [Part(0, 1), Part(1, 127), Part(2, 128), Part(3, 129), Part(4, 256)],
    ],
    "decode-only-across-block-boundaries": [
        [Part(0, 126), Part(1, 127), Part(2, 128), Part(3, 255), Part(4, 1)],
        *[[decode(i) for i in range(5)]] * 3,
    ],
    "mixed": [
        [Part(0, 200), Part(1, 130)],
        [decode(1), decode(0), Part(2, 300)],
        [decode(2), decode(0), decode(1), Part(3, 131), Part(4, 2)],
        [decode(4), decode(3), decode(2)],
    ],
    "chunked-prefill": [
        [Part(0, 100), Part(1, 140)],
        [decode(1), Part(0, 100)],
        [decode(1), Part(0, 57)],
        [decode(1), Part(0, 255)],
        [decode(1), decode(0)],
    ],
    "prompt-tail-of-one-token": [
        [Part(0, 256), Part(1, 200)],
        [decode(1), Part(0, 1)],
        [decode(0), decode(1), Part(2, 1)],
        [decode(0), decode(2)],
    ],
    "single-token-contexts": [
        [Part(0, 1), Part(1, 1)],
        [decode(0), Part(2, 1)],
    ],
}


def run_scenario(driver: Driver, steps) -> None:
    for parts in steps:
        driver.step(*parts)
    sealed = driver.check_sealed()
    assert sealed == sum(r.length // BLOCK_SIZE for r in driver.requests)
    totals = driver.recorder.snapshot()
    assert totals["sparse_rows"] == driver.sparse_rows


def num_requests(steps) -> int:
    return 1 + max(part.request for step in steps for part in step)


def scenario_cases():
    for name, steps in SCENARIOS.items():
        yield pytest.param(GQA, steps, id=f"gqa-fp32-{name}")
    for name in ("mixed", "chunked-prefill"):
        steps = SCENARIOS[name]
        yield pytest.param(replace(GQA, dtype=BF16), steps, id=f"gqa-bf16-{name}")
        yield pytest.param(MHA, steps, id=f"mha-fp32-{name}")
        yield pytest.param(replace(MQA, dtype=FP16), steps, id=f"mqa-fp16-{name}")
        yield pytest.param(replace(GQA, soft_cap=3.0), steps, id=f"gqa-soft-cap-{name}")
    yield pytest.param(
        replace(MHA, dtype=BF16, soft_cap=3.0),
        SCENARIOS["mixed"],
        id="mha-bf16-soft-cap-mixed",
    )
    yield pytest.param(
        Shape(4, 1, 256, BF16), SCENARIOS["mixed"], id="mqa-256-bf16-mixed"
    )


@pytest.mark.parametrize(("shape", "steps"), list(scenario_cases()))
def test_budget_covering_the_context_is_dense_attention(drive, shape, steps):
    driver = drive(shape, DENSE, num_requests(steps))
    run_scenario(driver, steps)
    assert driver.sparse_rows == 0


@pytest.mark.parametrize(("shape", "steps"), list(scenario_cases()))
def test_sparse_rows_equal_the_reference_and_prompts_stay_dense(drive, shape, steps):
    driver = drive(shape, SPARSE, num_requests(steps))
    run_scenario(driver, steps)
    lengths = [request.length for request in driver.requests]
    if max(lengths) > 130 and any(not p.prompt for step in steps for p in step):
        assert driver.sparse_rows > 0


SPEC = replace(GQA, spec_tokens=3)
DRAFT_STEPS = {
    # Contexts of 140 and 254 tokens grow by one verified token and three drafts.
    "all-accepted": [
        [Part(0, 140), Part(1, 254)],
        [decode(0, 4), decode(1, 4)],
        [decode(0, 4), decode(1, 4)],
    ],
    # The block boundary at 256 is crossed by drafts that are then rejected.
    "rejected-across-a-block-boundary": [
        [Part(0, 140), Part(1, 253)],
        [decode(1, 4), decode(0, 4)],
        [decode(1, 4, rewind=3), decode(0, 1, rewind=2)],
        [decode(1, 2, rewind=1), decode(0, 4)],
    ],
    "beside-prefill-and-short-prompt-tails": [
        [Part(0, 140), Part(1, 256)],
        [decode(0, 4), Part(1, 3), Part(2, 300)],
        [decode(0, 1), decode(1, 2), Part(2, 1), Part(3, 4)],
        [decode(1, 4), decode(3, 4), decode(2, 4)],
    ],
}


@pytest.mark.parametrize("options", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("steps", DRAFT_STEPS.values(), ids=DRAFT_STEPS)
def test_drafts_are_served_one_row_per_position(drive, steps, options):
    driver = drive(SPEC, options, num_requests(steps))
    run_scenario(driver, steps)
    assert (driver.sparse_rows > 0) == (options is SPARSE)
    decoded = sum(
        part.new for step in steps for part in step if not part.prompt or part.new <= 4
    )
    assert driver.recorder.snapshot()["decode_tokens"] == decoded


@pytest.mark.parametrize("user_first", [False, True])
@pytest.mark.parametrize("shape", [GQA, MHA], ids=["gqa", "mha"])
def test_a_block_that_one_request_fills_and_another_reads_in_one_step(
    drive, shape, user_first
):
    driver = drive(shape, SPARSE, 4)
    driver.step(Part(2, 150))
    owner, user = Part(0, 300), Part(1, 172, hit=(0, 1))
    prompts = (user, owner) if user_first else (owner, user)
    driver.step(decode(2), *prompts)
    requests = driver.requests
    assert requests[0].blocks[0] == requests[1].blocks[0]
    assert requests[0].blocks[1] != requests[1].blocks[1]
    # A later hit on two sealed blocks, as a tail of one token.
    driver.step(decode(2), decode(1), decode(0), Part(3, 1, hit=(0, 2)))
    driver.step(*[decode(i) for i in range(4)])
    assert driver.check_sealed() == 2 + 2 + 1 + 2
    assert driver.sparse_rows == 1 + 3 + 4


@pytest.mark.parametrize(("dense_layers", "sparse"), [(0, 1), (1, 1), (2, 0), (9, 0)])
def test_first_layers_stay_dense(drive, dense_layers, sparse):
    # The layer that is driven has index 1.
    driver = drive(GQA, SPARSE | {"dense_layers": dense_layers}, 1)
    driver.dense_layer = not sparse
    driver.step(Part(0, 300))
    driver.step(decode(0))
    assert driver.recorder.snapshot()["sparse_rows"] == driver.sparse_rows == sparse


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 8},
        {"local_window": 50},
        {"sink_tokens": 30},
        {"top_k": 0.25},
        {"dense_below": 301},
        {"mean_value": True},
        {"local_window": 1, "sink_tokens": 0, "top_k": 1},
    ],
    ids=str,
)
def test_options_reach_the_rows(drive, options):
    driver = drive(GQA, SPARSE | options, 2)
    run_scenario(driver, [[Part(0, 299), Part(1, 500)], *[[decode(0), decode(1)]] * 2])
    assert driver.sparse_rows == (3 if "dense_below" in options else 4)


def test_dense_selector_reads_everything(drive):
    driver = drive(GQA, {"selector": "dense", "dense_below": 0}, 2)
    driver.dense_layer = True
    run_scenario(driver, SCENARIOS["mixed"][:1] + [[decode(0), decode(1)]])
    totals = driver.recorder.snapshot()
    assert totals["kv_bytes_read"] == totals["kv_bytes_dense"] > 0
    assert totals["sparse_rows"] == 0


def test_reconfigured_layer_uses_the_new_options(drive):
    driver = drive(GQA, DENSE, 1)
    driver.step(Part(0, 300))
    driver.step(decode(0))
    assert driver.sparse_rows == 0
    for change in (SPARSE, SPARSE | {"rank": 8}, SPARSE | {"dense_layers": 2}, DENSE):
        config = SparseConfig.from_additional_config({"sparse": change})
        driver.impl.configure(config)
        driver.builder.configure(config)
        driver.dense_layer = "dense_layers" in change
        driver.step(decode(0))
    assert driver.recorder.snapshot()["sparse_rows"] == driver.sparse_rows == 2


def test_statistics_are_bytes_of_rows_codes_and_parameters(drive):
    driver = drive(GQA, SPARSE, 2)
    driver.step(Part(0, 299), Part(1, 100))
    assert driver.recorder.snapshot() == dict.fromkeys(driver.recorder.snapshot(), 0)
    driver.step(decode(0), decode(1))
    row_bytes = 2 * 64 * driver.shape.dtype.itemsize
    # Request 0: 300 tokens, two sealed blocks scored with 24 channels of 64 code and 4
    # parameter bytes; 60 tokens attended. Request 1: 101 tokens, dense.
    scores = 2 * 24 * (64 + 4)
    assert driver.recorder.snapshot() == {
        "decode_tokens": 2,
        "decode_rows": 2,
        "sparse_rows": 1,
        "kv_bytes_read": 2 * (scores + (60 + 101) * row_bytes),
        "kv_bytes_dense": 2 * (300 + 101) * row_bytes,
    }


@pytest.mark.parametrize("steps", [SCENARIOS["mixed"], SCENARIOS["chunked-prefill"]])
@pytest.mark.parametrize("options", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_layer_that_reads_another_layers_cache(drive, options, steps):
    """As in Gemma 3n and 4: such a layer has no K and V and must not seal."""
    driver = drive(
        GQA,
        options,
        num_requests(steps),
        kv_sharing_target_layer_name="model.layers.0.self_attn.attn",
    )
    run_scenario(driver, steps)
    assert (driver.sparse_rows > 0) == (options is SPARSE)


def padded_batch(driver: Driver, lengths: list[int], padding: int):
    """A decode step of one token each, as vLLM pads it to the size of a CUDA graph."""
    size = len(lengths) + padding
    table = torch.zeros(size, driver.BLOCKS_PER_REQUEST, dtype=torch.int32)
    for row in range(len(lengths)):
        blocks = driver.requests[row].blocks
        table[row, : len(blocks)] = torch.tensor(blocks)
    starts = torch.arange(size + 1, dtype=torch.int32).clamp(max=len(lengths))
    slots = [
        driver.requests[row].blocks[(n - 1) // BLOCK_SIZE] * BLOCK_SIZE
        + (n - 1) % BLOCK_SIZE
        for row, n in enumerate(lengths)
    ]
    lens = torch.tensor(lengths + [0] * padding, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(driver.device),
        query_start_loc_cpu=starts,
        seq_lens=lens.to(driver.device),
        seq_lens_cpu_upper_bound=lens,
        num_reqs=size,
        num_actual_tokens=size,
        max_query_len=1,
        max_seq_len=max(lengths),
        block_table_tensor=table.to(driver.device),
        slot_mapping=torch.tensor(slots + [-1] * padding).to(driver.device),
        is_prefilling=torch.zeros(len(lengths), dtype=torch.bool),
    )


@pytest.mark.parametrize("spec_tokens", [0, 3])
def test_steps_that_are_padded_to_a_cuda_graph(drive, spec_tokens):
    """Same addresses at every step, real rows as without padding, padding is finite."""
    driver = drive(replace(GQA, spec_tokens=spec_tokens), SPARSE, 2)
    if driver.path == "cpu":
        pytest.skip("no graphs on the CPU")
    shape, lengths = driver.shape, [300, 257]
    driver.step(Part(0, lengths[0]), Part(1, lengths[1]))
    query = driver.random_tokens(shape.heads, 5).to(driver.device, shape.dtype)
    rows = [
        torch.stack([getattr(driver.requests[i], name)[-1] for i in (0, 1, 0, 0, 0)])
        for name in ("key", "value")
    ]
    rows = [t.to(driver.device) for t in rows]

    def addresses(metadata) -> set[int]:
        (part,) = metadata.decode
        names = ("budgets", "indices", "counts", "kept_mass", "workspace")
        if spec_tokens:
            names += ("block_table", "seq_lens")
        return {getattr(part, name).data_ptr() for name in names}

    outputs, places = [], []
    for padding in (3, 0):
        metadata = driver.builder.build(0, padded_batch(driver, lengths, padding))
        places.append(addresses(metadata))
        (part,) = metadata.decode
        assert part.seq_lens.tolist() == lengths + [0] * padding
        assert part.budgets.tolist() == [60, 60] + [-1] * padding
        if padding and driver.path != "gpu":
            continue  # the CPU's kernels refuse rows without context
        size = 2 + padding
        output = torch.full_like(query[:size], torch.nan)
        given = (query[:size], *(t[:size] for t in rows))
        driver.impl.forward(LAYER, *given, driver.cache, metadata, output)
        assert output.isfinite().all()
        outputs.append(output[:2])
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert places[0] == places[1]
    totals = driver.recorder.snapshot()
    assert totals["decode_tokens"] == 4 and totals["sparse_rows"] == 4


def test_graphs_hold_options_that_a_running_engine_cannot_change(drive, monkeypatch):
    driver = drive(GQA, SPARSE, 1)
    if driver.path == "cpu":
        pytest.skip("no graphs on the CPU")
    driver.step(Part(0, 300))
    driver.step(decode(0))
    compilation = driver.builder.vllm_config.compilation_config
    monkeypatch.setattr(compilation, "cudagraph_mode", CUDAGraphMode.FULL)
    before = driver.builder.config
    for change, message in (
        ({"rank": 8}, "top_k and dense_below"),
        ({"selector": "dense"}, "top_k and dense_below"),
        ({"top_k": 200}, "captured for"),
        ({"kernels": "cpu"}, "sparse.kernels"),
    ):
        config = SparseConfig.from_additional_config({"sparse": SPARSE | change})
        with pytest.raises(SparseConfigError, match=message):
            driver.builder.check(config)
    assert driver.builder.config == before
    for change in ({"top_k": 50}, {"dense_below": 0}):
        config = SparseConfig.from_additional_config({"sparse": SPARSE | change})
        driver.builder.check(config)


def test_missing_is_prefilling_means_that_single_tokens_decode(drive):
    driver = drive(GQA, SPARSE, 1)
    driver.step(Part(0, 300))
    build = driver.builder.build
    driver.builder.build = lambda common_prefix_len, common_attn_metadata: build(
        common_prefix_len, replace(common_attn_metadata, is_prefilling=None)
    )
    driver.step(decode(0))
    assert driver.recorder.snapshot()["sparse_rows"] == driver.sparse_rows == 1


def test_warm_up_without_metadata_and_unsupported_output_scales(drive):
    driver = drive(GQA, SPARSE, 1)
    query = torch.zeros(2, 6, 64)
    key = torch.zeros(2, 2, 64)
    output = torch.full_like(query, 7.0)
    arguments = (LAYER, query, key, key, driver.cache)
    assert driver.impl.forward(*arguments, None, output) is output
    assert (output == (7 if driver.path == "cpu" else 0)).all()
    with pytest.raises(NotImplementedError, match="output quantisation"):
        driver.impl.forward(*arguments, None, output, output_scale=torch.ones(1))


def test_rank_beyond_the_head_size_stops_the_layer(drive):
    with pytest.raises(SparseConfigError, match=r"sparse\.rank = 65 exceeds"):
        drive(GQA, {"rank": 65}, 1)


def test_gpu_layer_over_interpreted_triton_kernels():
    """Some of the above in a process of its own: Triton decides when it is imported."""
    chosen = "triton-on-cpu and sparse and (gqa-bf16-mixed or rejected)"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-x", __file__]
    command += ["-m", "interpreted", "-k", chosen]
    environment = dict(os.environ, TRITON_INTERPRET="1")
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout

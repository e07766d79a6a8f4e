# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""LESS: what has left the window stays in a small learned state (arXiv 2402.09398,
section 3).

A token that left is answered for by psi(k)^T v and psi(k), summed over all that left: a
query adds phi(q) times these sums to its exact attention. Here the sums are prefix sums
over blocks, kept behind each block's rows: the state of block i is that of block i - 1
plus what block i's tokens give, so it is a function of the prefix as the rows are, and
prefix caching, preemption and tensor layouts need know nothing of it. Sinks give
nothing. The state of the last block that left is that of all that left.
"""

import re
from dataclasses import dataclass, fields
from functools import cache
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ..cache.layout import BLOCK_SIZE, STATE_RANK, state_bytes
from ..checkpoint import TENSORS
from ..config import SparseConfig
from ..ops import Ops
from .base import DecodeRows, LayerShape, ScoreBytes
from .streaming import Streaming

KIND = "less"  # of its checkpoints
SAMPLED = 16  # steps, of which one is counted in a layer
_made = count()
LEAST = 1e-30  # of phi(q) . z, before its logarithm


@dataclass(frozen=True)
class Kernels:
    """phi of every query head and psi of every KV head of a layer, fp32; or of all
    layers at once, each tensor with a dimension of layers in front, and so what phi and
    psi are given and give.

    Attributes:
        q1, q2: [num_heads, D, hidden], [num_heads, hidden, STATE_RANK].
        k1, k2: [num_kv_heads, D, hidden], [num_kv_heads, hidden, STATE_RANK].
        k3: [num_kv_heads, STATE_RANK, STATE_RANK].
        s1, s2: [num_kv_heads, STATE_RANK].
    """

    q1: torch.Tensor
    q2: torch.Tensor
    k1: torch.Tensor
    k2: torch.Tensor
    k3: torch.Tensor
    s1: torch.Tensor
    s2: torch.Tensor

    def phi(self, query: torch.Tensor) -> torch.Tensor:
        """[num_heads, n, D] queries after RoPE -> [num_heads, n, STATE_RANK]."""
        return F.gelu(F.gelu(query.float() @ self.q1) @ self.q2).abs()

    def psi(self, key: torch.Tensor) -> torch.Tensor:
        """[num_kv_heads, n, D] keys after RoPE -> [num_kv_heads, n, STATE_RANK]."""
        u = F.gelu(F.gelu(key.float() @ self.k1) @ self.k2)
        u = u * self.s1.abs()[..., None, :]
        return (u + u @ self.k3 * self.s2[..., None, :]).abs()


def state_of_blocks(kv_cache: torch.Tensor, head_size: int) -> torch.Tensor:
    """The states behind the rows of all blocks, a view: [num_blocks, num_kv_heads,
    STATE_RANK, head_size + 1] fp32, the last column psi alone."""
    chunks = kv_cache.flatten(2)
    first, size = BLOCK_SIZE * 2 * head_size, state_bytes(head_size)
    part = chunks[..., first : first + size // kv_cache.element_size()]
    return part.view(torch.float32).unflatten(-1, (STATE_RANK, head_size + 1))


def add_state(
    kernels: Kernels,
    query: torch.Tensor,
    state: torch.Tensor,
    lse: torch.Tensor,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention, merged with what the state says: [n, num_heads, D] fp32, and its
    lse, [n, num_heads].

    Args:
        query, out: [n, num_heads, D]; ``out`` is the exact part's result.
        state: [n, num_kv_heads, STATE_RANK, D + 1].
        lse: [n, num_heads] fp32, the exact part's.
    """
    phi = kernels.phi(query.transpose(0, 1)).transpose(
        0, 1
    )  # [n, num_heads, STATE_RANK]
    grouped = phi.unflatten(1, (state.shape[1], -1))
    sums = (grouped @ state).flatten(1, 2)  # [n, num_heads, D + 1]
    total = torch.logaddexp(lse, sums[..., -1].clamp(min=LEAST).log())
    exact = out.float() * (lse - total).exp()[..., None]
    return exact + sums[..., :-1] * (-total).exp()[..., None], total


def seal(
    kernels: Kernels,
    kv_cache: torch.Tensor,
    filled: list[tuple[int, int, int]],
    sink_blocks: int,
    head_size: int,
) -> None:
    """Write the states of filled blocks.

    Args:
        filled: place in the context, block id and id of the block before, by place.
        sink_blocks: the first blocks of a context, which give nothing.
    """
    if not filled:
        return
    states = state_of_blocks(kv_cache, head_size)
    index, block, before = torch.tensor(filled).unbind(1)
    rows = kv_cache[block].flatten(2)[..., : BLOCK_SIZE * 2 * head_size]
    rows = rows.unflatten(-1, (BLOCK_SIZE, 2 * head_size))
    key, value = rows.split(head_size, dim=-1)
    # A batch of KV heads for the weights, of blocks and tokens for the rest.
    psi = kernels.psi(key.transpose(0, 1).flatten(1, 2))
    psi = psi.unflatten(1, (len(filled), BLOCK_SIZE)).transpose(0, 1)
    ones = torch.ones_like(value[..., :1])
    given = psi.mT @ torch.cat([value, ones], -1).float()
    given[index < sink_blocks] = 0
    # Also of blocks that this very call fills, for requests with one prefix.
    for place in index.unique().tolist():
        these = index == place
        state = given[these]
        if place > 0:
            state = state + states[before[these]]
        states[block[these]] = state


def described(model, hidden: int, sinks: int, window: int) -> dict:
    """What a checkpoint says of the model and the options that it is for, JSON.

    Args:
        model: the text model's configuration, as transformers has it.
        hidden: numbers between a feature's two layers.
    """
    heads = model.num_attention_heads
    size = getattr(model, "head_dim", None) or model.hidden_size // heads
    rope = getattr(model, "rope_parameters", None) or {}
    return {
        "rank": STATE_RANK,
        "hidden": hidden,
        "sink_tokens": sinks,
        "local_window": window,
        "block": BLOCK_SIZE,
        "num_layers": model.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": getattr(model, "num_key_value_heads", None) or heads,
        "head_size": size,
        "rope": dict(rope),
    }


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Of a checkpoint's tensors, as what it says of itself (:func:`described`) has
    them."""
    heads, groups, size = (
        config[name] for name in ("num_heads", "num_kv_heads", "head_size")
    )
    hidden, rank = config["hidden"], config["rank"]
    shapes = {
        "q1": (heads, size, hidden),
        "q2": (heads, hidden, rank),
        "k1": (groups, size, hidden),
        "k2": (groups, hidden, rank),
        "k3": (groups, rank, rank),
        "s1": (groups, rank),
        "s2": (groups, rank),
    }
    return {
        f"layers.{layer}.{name}": shape
        for layer in range(config["num_layers"])
        for name, shape in shapes.items()
    }


def load_kernels(folder: str, device: torch.device | str = "cpu") -> list[Kernels]:
    """Of every layer, from a checkpoint's ``layers.NUMBER.q1`` and so on.

    Raises:
        FileNotFoundError: there is none.
    """
    file = Path(folder) / TENSORS
    # Another engine of this process may have read what has been trained anew since.
    return _load_kernels(file, file.stat().st_mtime_ns, device)


@cache
def _load_kernels(file: Path, written: int, device) -> list[Kernels]:
    tensors = load_file(file)
    names = [field.name for field in fields(Kernels)]
    num_layers = len(tensors) // len(names)
    return [
        Kernels(*(tensors[f"layers.{i}.{n}"].float().to(device) for n in names))
        for i in range(num_layers)
    ]


class Less(Streaming):
    """Streaming, with a state for what has left."""

    prompts_as_rows = True

    def __init__(self, config: SparseConfig, shape: LayerShape, ops: Ops) -> None:
        super().__init__(config, shape, ops)
        self._kernels: dict[str, Kernels] = {}
        # Layers begin at different steps.
        self._calls = next(_made)

    @property
    def score_bytes(self) -> ScoreBytes:
        """A row's state."""
        return ScoreBytes(per_row=state_bytes(self.shape.head_size))

    def kernels_of(self, layer_name: str, device: torch.device) -> Kernels:
        """What was learnt for a layer of the model."""
        if layer_name not in self._kernels:
            (number,) = re.findall(r"\.layers\.(\d+)\.", layer_name)
            layers = load_kernels(self.config.checkpoint, device)
            self._kernels[layer_name] = self._of_rank(layers[int(number)])
        return self._kernels[layer_name]

    def _of_rank(self, kernels: Kernels) -> Kernels:
        """Those of the heads that this rank of tensor parallelism has."""
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        if len(kernels.q1) == heads:
            return kernels
        from vllm.distributed import get_tensor_model_parallel_rank

        rank, ranks = get_tensor_model_parallel_rank(), len(kernels.q1) // heads
        # vLLM gives several ranks the same KV head where there are fewer of them.
        first = rank * len(kernels.k1) // ranks
        parts = {"q": slice(rank * heads, (rank + 1) * heads)}
        return Kernels(
            **{
                f.name: getattr(kernels, f.name)[
                    parts.get(f.name[0], slice(first, first + kv_heads))
                ]
                for f in fields(Kernels)
            }
        )

    def seal(self, layer_name: str, kv_cache: torch.Tensor, meta, key, value) -> None:
        """Write the states of the blocks that this step has filled."""
        kernels = self.kernels_of(layer_name, kv_cache.device)
        sinks = self.kept.sink_blocks
        if self.ops.kernels == "cpu":
            return seal(kernels, kv_cache, meta.filled, sinks, self.shape.head_size)
        from ..kernels.triton.less import seal_states

        seal_states(kv_cache, kernels, meta.jobs, sinks, self.shape.layout)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: DecodeRows,
        out: torch.Tensor,
        layer_name: str,
    ) -> None:
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        super().attend(query, kv_cache, rows, out, layer_name, lse)
        compact, kernels = rows.compact, self.kernels_of(layer_name, out.device)
        sinks = self.kept.sink_blocks
        if self.ops.kernels != "cpu":
            from ..kernels.triton.less import add_states

            where = (compact.skipped, rows.block_table, kv_cache)
            add_states(
                query, out, lse, *where, kernels, sinks, LEAST, self.shape.layout
            )
            return
        left = compact.skipped.nonzero().squeeze(1)
        if not len(left):
            return
        last = sinks + compact.skipped[left] - 1
        blocks = rows.block_table[left].gather(1, last[:, None].long()).squeeze(1)
        state = state_of_blocks(kv_cache, self.shape.head_size)[blocks]
        merged, total = add_state(kernels, query[left], state, lse[left], out[left])
        out[left] = merged.to(out.dtype)
        self._count(lse[left], total, rows)

    def _count(self, lse: torch.Tensor, total: torch.Tensor, rows: DecodeRows) -> None:
        """Count what share of the attention mass the state carries, now and then."""
        self._calls += 1
        if self._calls % SAMPLED == 0:
            share = -torch.expm1(lse - total).mean(1)
            rows.states["state_rows"] += len(share)
            rows.states["state_share_ppm"] += round(float(share.sum()) * 1e6)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""One decode row of one layer: what every setting would keep, and how far off it is.

The rules are those of :mod:`vllm_sparse.ops.reference`, for all KV heads at once, with
K and the exact attention computed once for all settings.
"""

from dataclasses import dataclass, replace

import torch

from ...cache.layout import BLOCK_SIZE
from ...config import SparseConfig
from ...methods import LayerShape
from ...methods.budgets import budget
from ...methods.sparq import Sparq
from ...ops import Ops
from ...ops.reference import forced_ranges, unpack_codes


@dataclass(frozen=True, order=True)
class Setting:
    """A point of the grid."""

    rank: int
    top_p: float


@dataclass(frozen=True)
class Context:
    """What one layer holds of one request, all fp32.

    Attributes:
        key, value: [num_kv_heads, seq_len, head_size].
        codes: [num_kv_heads, head_size, seq_len] the keys once more, those of sealed
            blocks from their 4-bit codes.
    """

    key: torch.Tensor
    value: torch.Tensor
    codes: torch.Tensor

    @property
    def seq_len(self) -> int:
        return self.key.shape[1]


@dataclass(frozen=True)
class RowResult:
    """Attributes:
    kept: [num_settings][num_kv_heads] tokens.
    error: [num_settings] |o - o_dense| / |o_dense|, o being the output of all heads.
    read: [num_settings] bytes of the layer, all KV heads; dense: those of dense
        attention.
    """

    kept: list[list[int]]
    error: list[float]
    read: list[int]
    dense: int


def read_context(
    kv_cache: torch.Tensor, blocks: torch.Tensor, seq_len: int, shape: LayerShape
) -> Context:
    """One request's K, V and dequantised K.

    Args:
        kv_cache: [num_blocks, num_kv_heads, BLOCK_SIZE, C].
        blocks: [>= blocks of the context] int block ids.
    """
    layout, size = shape.layout, shape.head_size
    count, sealed = -(-seq_len // BLOCK_SIZE), seq_len // BLOCK_SIZE
    chunks = kv_cache[blocks[:count].long()].contiguous().flatten(2)
    rows = chunks[..., : BLOCK_SIZE * 2 * size].unflatten(-1, (BLOCK_SIZE, -1))
    rows = rows.transpose(0, 1).flatten(1, 2)[:, :seq_len].float()
    key, value = rows.split(size, dim=-1)
    raw = chunks[:sealed].view(torch.uint8)  # [sealed, num_kv_heads, bytes]
    packed = raw[..., layout.codes_offset : layout.params_offset]
    codes = unpack_codes(packed.reshape(-1, layout.channel_code_bytes)).T
    codes = codes.unflatten(0, (sealed, shape.num_kv_heads, size)).float()
    params = raw[..., layout.params_offset : layout.prefix_mean_offset]
    params = params.contiguous().view(torch.float16).float().unflatten(-1, (size, 2))
    known = codes * params[..., :1] + params[..., 1:]
    known = known.permute(1, 2, 0, 3).flatten(2)
    tail = key[:, sealed * BLOCK_SIZE :].mT
    return Context(key, value, torch.cat([known, tail], dim=-1))


def measure_row(
    query: torch.Tensor,
    context: Context,
    shape: LayerShape,
    config: SparseConfig,
    settings: list[Setting],
) -> RowResult:
    """Every setting on one query.

    Args:
        query: [num_kv_heads, group, head_size] fp32.
        config: resolved; its rank and top_p give way to each setting's.
    """
    seq_len, row_bytes = context.seq_len, shape.layout.row_bytes
    logits = _capped(query @ context.key.mT * shape.scale, shape.soft_cap)
    want = logits.softmax(-1) @ context.value
    mean = context.value.mean(1, keepdim=True)
    kept, error, read = [], [], []
    estimates: dict[int, Estimate] = {}
    for setting in settings:
        chosen = replace(config, rank=setting.rank, top_p=setting.top_p)
        if setting.rank not in estimates:
            estimates[setting.rank] = estimate(query, context, shape, chosen)
        guess = estimates[setting.rank]
        keep = choose(guess, chosen)
        out = logits.masked_fill(~keep[:, None], -torch.inf).softmax(-1) @ context.value
        if chosen.mean_value:
            mass = (guess.probs * keep[:, None]).sum(-1, keepdim=True)
            alpha = mass.clamp(max=1.0)
            out = alpha * out + (1 - alpha) * mean
        counts = keep.sum(-1).tolist()
        scores = Sparq(chosen, shape, Ops()).score_bytes.of_row(seq_len)
        kept.append(counts)
        error.append(float((out - want).norm() / want.norm()))
        read.append(sum(counts) * row_bytes + scores * len(counts))
    return RowResult(kept, error, read, seq_len * row_bytes * shape.num_kv_heads)


@dataclass(frozen=True)
class Estimate:
    """What one rank says about one query.

    Attributes:
        probs: [num_kv_heads, group, seq_len].
        order: [num_kv_heads, candidates] from the best candidate to the worst, counted
            from the first that is not a sink; candidates are what no setting forces.
        outside: [num_kv_heads, candidates] mass of the worst one, two, ... candidates.
    """

    probs: torch.Tensor
    order: torch.Tensor
    outside: torch.Tensor


def estimate(
    query: torch.Tensor, context: Context, shape: LayerShape, config: SparseConfig
) -> Estimate:
    """``reference.sparq_probabilities`` of all KV heads, without its temperature."""
    magnitude = query.abs().sum(1)
    channels = magnitude.argsort(dim=-1, descending=True, stable=True)
    read = torch.zeros_like(magnitude).scatter_(1, channels[:, : config.rank], 1.0)
    logits = (query * read[:, None]) @ context.codes * shape.scale
    probs = _capped(logits, shape.soft_cap).softmax(-1)
    sinks, recent = forced_ranges(
        context.seq_len, config.local_window, config.sink_tokens
    )
    scores, order = probs.sum(1)[:, sinks:recent].sort(
        dim=-1, descending=True, stable=True
    )
    return Estimate(probs, order, scores.flip(-1).cumsum(-1))


def choose(guess: Estimate, config: SparseConfig) -> torch.Tensor:
    """Which tokens ``reference.sparq_attend`` keeps: [num_kv_heads, seq_len] bool."""
    num_kv_heads, _, seq_len = guess.probs.shape
    device = guess.probs.device
    keep = torch.ones(num_kv_heads, seq_len, dtype=torch.bool, device=device)
    most = budget(seq_len, config)
    if most < 0:
        return keep
    sinks, recent = forced_ranges(seq_len, config.local_window, config.sink_tokens)
    forced = sinks + seq_len - recent
    enough = (guess.outside > 1 - config.top_p).sum(-1, keepdim=True)
    wanted = enough.clamp(min=config.min_tokens - forced)
    wanted = wanted.clamp(max=max(0, most - forced))
    place = torch.arange(recent - sinks, device=device)
    keep[:, sinks:recent] = keep[:, sinks:recent].scatter(
        1, guess.order, place < wanted
    )
    return keep


def _capped(logits: torch.Tensor, soft_cap: float) -> torch.Tensor:
    return soft_cap * (logits / soft_cap).tanh() if soft_cap > 0 else logits

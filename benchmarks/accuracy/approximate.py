# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Forced decoding with coarser selections than serving has, before kernels are built
for them.

    python -m benchmarks.accuracy.approximate --tasks repetition --budgets 0.125 \\
        --methods sparq sampled sampled_params --output NAME.json

Takes the options of ``benchmarks.accuracy.run``, and these methods besides; in plain
PyTorch, for the CPU, in the engine's process. All read what ``sparq`` reads.

- ``sampled``: every head's normaliser comes from the first block, the last sealed one,
  the tail, and two blocks that stand for all in between; pooled probabilities are keys
  of 8 bits, 5 of exponent and 3 of mantissa, and of equal keys later tokens are kept.
- ``sampled_ends``: the same without blocks in between.
- ``sampled_params``: besides, a channel's scale (5 + 3 bits) and zero point (an integer
  of 8 bits) lie in the lowest bits of 16 of its 128 codes.
"""

import os
from math import log2

import torch

from benchmarks.accuracy import run
from vllm_sparse.cache.layout import BLOCK_SIZE, CODE_MAX
from vllm_sparse.methods import METHODS, DecodeRows
from vllm_sparse.methods.base import SelectingMethod
from vllm_sparse.methods.sparq import Sparq
from vllm_sparse.ops.reference import context_rows, forced_ranges
from vllm_sparse.ops.reference.codes import quantise
from vllm_sparse.selectors import SELECTORS

LOG2E = 1.4426950408889634
# Powers of two: a head's sampled tokens together become the first, no token of a head
# more than the second.
SHIFT, MOST = 6, 13
# Codes whose lowest bits hold parameters.
HOSTS = slice(0, BLOCK_SIZE, 8)


def keys_of(probabilities: torch.Tensor) -> torch.Tensor:
    """[heads, tokens] logits in units of log2, less their normalisers, to [tokens]."""
    pooled = (probabilities + SHIFT).clamp(max=MOST).exp2().sum(-2).half()
    return pooled.view(torch.int16).int() >> 7


def with_8_bit_params(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., BLOCK_SIZE] K of a channel: codes, and (scale, minimum) in the last
    dimension."""
    low, high = key.amin(-1), key.amax(-1)
    scale = torch.maximum((high - low) / CODE_MAX, low.abs().maximum(high.abs()) / 127)
    bits = scale.half().view(torch.int16).int()
    scale = ((bits + 127) >> 7 << 7).short().view(torch.float16).float()
    scale = scale.clamp(min=2.0**-24)
    zero = (low / scale).round().clamp(-128, 127)
    codes = (key / scale[..., None]).round() - zero[..., None]
    codes = codes.clamp(0, CODE_MAX).to(torch.uint8)
    held = torch.stack([(bits >> 7) & 255, zero.int() & 255], dim=-1)
    shifts = torch.arange(8, dtype=torch.int32)
    params = (held[..., None] >> shifts & 1).flatten(-2).to(torch.uint8)
    codes[..., HOSTS] = codes[..., HOSTS] & (CODE_MAX - 1) | params
    return codes, torch.stack([scale, zero * scale], dim=-1)


class Sampled(Sparq):
    """Fixed budgets over blocks with rows; see the module."""

    quantise = staticmethod(lambda key: quantise(key, 4))
    between = 2  # sampled blocks

    def __init__(self, *given) -> None:
        super().__init__(*given)
        # By cache: the last token of each block as it was read, codes and params.
        self.blocks: dict[int, tuple[torch.Tensor, ...]] = {}

    attend = SelectingMethod.attend  # not Sparq's, which asks one op for both

    def sealed_codes(self, kv_cache, blocks):
        """Codes [blocks, KV heads, head_size, BLOCK_SIZE] and params of sealed blocks,
        which are quantised once."""
        shape = self.shape
        rows = self.shape.layout.row_bytes // kv_cache.element_size() // 2
        count, heads = kv_cache.shape[:2]
        k = kv_cache.as_strided(
            (count, heads, BLOCK_SIZE, rows), (*kv_cache.stride()[:2], 2 * rows, 1)
        )
        if kv_cache.data_ptr() not in self.blocks:
            self.blocks[kv_cache.data_ptr()] = (
                torch.full((count, heads, 2, rows), torch.nan),
                torch.zeros(
                    count, heads, shape.head_size, BLOCK_SIZE, dtype=torch.uint8
                ),
                torch.zeros(count, heads, shape.head_size, 2),
            )
        seen, codes, params = self.blocks[kv_cache.data_ptr()]
        ends = k[blocks][:, :, [0, -1]].float()
        stale = blocks[(seen[blocks] != ends).flatten(1).any(1)]
        if len(stale):
            key = k[stale].float().transpose(2, 3)
            codes[stale], fresh = self.quantise(key)
            params[stale] = fresh.float()
            seen[stale] = k[stale][:, :, [0, -1]].float()
        return codes, params

    def select(self, query: torch.Tensor, kv_cache: torch.Tensor, rows: DecodeRows):
        shape, config = self.shape, self.config
        grouped = query.float().unflatten(1, (shape.num_kv_heads, -1))
        heads = torch.arange(shape.num_kv_heads)[:, None]
        for row, (length, budget) in enumerate(
            zip(rows.seq_lens.tolist(), rows.budgets.tolist())
        ):
            sinks, recent = forced_ranges(
                length, config.local_window, config.sink_tokens
            )
            if budget < 0 or budget >= length or recent <= config.sink_tokens:
                rows.counts[row] = -1
                continue
            wanted = max(0, budget - sinks - (length - recent))
            q, sealed = grouped[row], length // BLOCK_SIZE
            blocks = rows.block_table[row][:sealed].long()
            all_codes, all_params = self.sealed_codes(kv_cache, blocks)
            magnitude = q.abs().sum(1)
            channels = magnitude.argsort(dim=-1, descending=True, stable=True)
            channels = channels[:, : config.rank].sort(dim=-1).values
            read = q.gather(2, channels[:, None].expand(-1, q.shape[1], -1))
            share = q.abs().sum(-1, keepdim=True) / read.abs().sum(-1, keepdim=True)
            read = read * (LOG2E * shape.scale * share.sqrt())
            at = (blocks[:, None, None], heads[None], channels[None])
            scale, minimum = all_params[at].unbind(-1)
            logits = (read * scale[:, :, None]) @ all_codes[at].float()
            logits += (read * minimum[:, :, None]).sum(-1, keepdim=True)
            logits = logits.permute(1, 2, 0, 3).flatten(2)
            position = torch.arange(sealed * BLOCK_SIZE, length)
            tail = context_rows(kv_cache, rows.block_table[row], position, shape.layout)
            tail = tail[..., : shape.head_size].float().transpose(0, 1)
            tail = tail.gather(2, channels[:, None].expand(-1, tail.shape[1], -1))
            sample = [logits[..., :BLOCK_SIZE], read @ tail.transpose(1, 2)]
            if sealed > 1:
                sample.append(logits[..., -BLOCK_SIZE:])
            inner = max(sealed - 2, 0)
            between = min(self.between, inner)
            for i in range(between):
                at = (1 + inner * (2 * i + 1) // (2 * between)) * BLOCK_SIZE
                sample.append(logits[..., at : at + BLOCK_SIZE] + log2(inner / between))
            total = (torch.cat(sample, dim=-1) / LOG2E).logsumexp(-1, keepdim=True)
            keys = keys_of(logits - total * LOG2E)
            # The position decides between equal keys.
            keys = keys.long() << 32 | torch.arange(keys.shape[-1])
            best = keys[:, sinks:recent].topk(wanted).indices.sort().values + sinks
            first, last = torch.arange(sinks), torch.arange(recent, length)
            count = sinks + wanted + length - recent
            kept = rows.indices[row, :, :count]
            kept.copy_(
                torch.cat(
                    [
                        first.expand(len(q), -1),
                        best,
                        last.expand(len(q), -1),
                    ],
                    dim=1,
                )
            )
            rows.counts[row] = count
        return None


class SampledEnds(Sampled):
    between = 0


class SampledParams(Sampled):
    quantise = staticmethod(with_8_bit_params)


def register() -> None:
    methods = {
        "sampled": Sampled,
        "sampled_ends": SampledEnds,
        "sampled_params": SampledParams,
    }
    for name, method in methods.items():
        SELECTORS[name] = f"{__name__}:{method.__name__}"
        METHODS[name] = method


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    register()
    run.main(__doc__)

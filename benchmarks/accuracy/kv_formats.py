# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Perplexity of KV formats, without an engine: which one to build.

    python -m benchmarks.accuracy.kv_formats [--tokens 1280] [--windows 3]

Every position is treated as a decode step: it attends to the quantised tokens of the
blocks before its own, and to the exact ones of its own block (where the format says
so). vLLM's formats quantise every token, the current one too, as vLLM does. Attention
is dense. Positions from 256 on are scored.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from benchmarks.accuracy.environment import describe
from benchmarks.accuracy.text import TextSources
from scripts.get_model import get_model
from vllm_sparse.cache.layout import BLOCK_SIZE

FIRST_SCORED = 256
Quantiser = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Format:
    """One way to keep the cache.

    Attributes:
        key, value: [heads, tokens, head_size] to what is read back.
        bits: of an element, parameters included, K and V averaged.
        exact_block: a token's own block is read unquantised.
    """

    key: Quantiser
    value: Quantiser
    bits: float
    exact_block: bool = True


def asymmetric(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantise along the last dimension; scale and minimum are fp16."""
    low = x.amin(-1, keepdim=True).half().float()
    scale = ((x.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
    codes = (x - low) / torch.where(scale > 0, scale, 1.0)
    return codes.round().clamp(0, 2**bits - 1) * scale + low


def per_channel(bits: int, tokens: int) -> Quantiser:
    """K as KIVI keeps it: one scale for ``tokens`` tokens of a channel."""

    def quantise(x: torch.Tensor) -> torch.Tensor:
        full = x.shape[1] // tokens * tokens
        groups = x[:, :full].unflatten(1, (-1, tokens)).transpose(2, 3)
        done = asymmetric(groups, bits).transpose(2, 3).flatten(1, 2)
        return torch.cat([done, x[:, full:]], dim=1)

    return quantise


def per_token(bits: int, channels: int | None = None) -> Quantiser:
    """V as KIVI keeps it: one scale for ``channels`` channels of a token."""

    def quantise(x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, channels or x.shape[-1]))
        return asymmetric(groups, bits).flatten(-2)

    return quantise


def hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / math.sqrt(size)


def int4_per_token_head(x: torch.Tensor) -> torch.Tensor:
    """vLLM's: random signs and Hadamard, then 4 bits and a 4-bit zero point for each
    token and head (v1/attention/ops/int4_per_token_head.py)."""
    size = x.shape[-1]
    seeded = torch.Generator("cpu").manual_seed(42)
    signs = torch.randint(0, 2, (size,), generator=seeded, device="cpu")
    rotation = hadamard(size) * (2.0 * signs.to(x.device) - 1)[:, None]
    y = x @ rotation
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6)
    zero = (-low / scale).round().clamp(0, 15)
    codes = (y / scale + zero).round().clamp(0, 15)
    return (codes - zero) * scale @ rotation.T


def int8_per_token_head(x: torch.Tensor) -> torch.Tensor:
    """vLLM's: symmetric, one fp32 scale for each token and head."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6)
    return (x / scale).round().clamp(-128, 127) * scale


def fp8(x: torch.Tensor) -> torch.Tensor:
    """vLLM's ``fp8`` without calibrated scales: e4m3, scale 1."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def exact(x: torch.Tensor) -> torch.Tensor:
    return x


def formats(head_size: int) -> dict[str, Format]:
    result = {"none": Format(exact, exact, 16)}
    for tokens in (32, 64, 128):
        for channels in (32, head_size):
            bits = 4 + 16 / tokens + 16 / channels
            result[f"int4, K group {tokens}, V group {channels}"] = Format(
                per_channel(4, tokens), per_token(4, channels), bits
            )
    result["int4, K group 128, V group 16"] = Format(
        per_channel(4, 128), per_token(4, 16), 4 + 16 / 128 + 1
    )
    result["k4v8, K group 128, V group 64"] = Format(
        per_channel(4, 128), per_token(8, 64), 6 + 16 / 128 + 16 / 64
    )
    result["k4v8, K group 32, V group 64"] = Format(
        per_channel(4, 32), per_token(8, 64), 6 + 16 / 32 + 16 / 64
    )
    result["K 8, V 4 (group 32)"] = Format(
        per_channel(8, 128), per_token(4, 32), 6 + 16 / 128 + 0.5
    )
    result["int8, K group 128, V group 64"] = Format(
        per_channel(8, 128), per_token(8, 64), 8 + 16 / 128 + 16 / 64
    )
    result["K 2, V 4"] = Format(per_channel(2, 32), per_token(4, 32), 3 + 1)
    scale = 32 / head_size
    result["vLLM int4_per_token_head"] = Format(
        int4_per_token_head, int4_per_token_head, 4 + scale, exact_block=False
    )
    result["vLLM int8_per_token_head"] = Format(
        int8_per_token_head, int8_per_token_head, 8 + scale, exact_block=False
    )
    result["vLLM fp8"] = Format(fp8, fp8, 8, exact_block=False)
    return result


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: Format
) -> torch.Tensor:
    """Causal attention of all positions: [heads, tokens, head_size] each."""
    group = query.shape[0] // key.shape[0]
    query = query.unflatten(0, (-1, group))
    key_read, value_read = kept.key(key), kept.value(value)
    if not kept.exact_block:
        key, value = key_read, value_read
    future = torch.ones(BLOCK_SIZE, BLOCK_SIZE, dtype=torch.bool, device=key.device)
    out = torch.empty_like(query)
    for first in range(0, query.shape[2], BLOCK_SIZE):
        block = slice(first, first + BLOCK_SIZE)
        q = query[:, :, block] * query.shape[-1] ** -0.5
        count = q.shape[2]
        k = torch.cat([key_read[:, :first], key[:, block]], dim=1)
        v = torch.cat([value_read[:, :first], value[:, block]], dim=1)
        logits = q @ k[:, None].mT
        own = logits[..., first:]
        own.masked_fill_(future[:count, :count].triu(1), -math.inf)
        out[:, :, block] = logits.softmax(-1) @ v[:, None]
    return out.flatten(0, 1)


def load_model(current: list[Format], device: str = "cpu"):
    """SmolLM2 in fp32 whose attention reads the cache as ``current[0]`` keeps it.

    Returns:
        the model, the texts, the head size.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module, query, key, value, mask, **kwargs):
        out = attend(query[0], key[0], value[0], current[0])
        return out.transpose(0, 1)[None], None

    ALL_ATTENTION_FUNCTIONS.register("kv_formats", attention)
    path = get_model()
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="kv_formats"
    )
    sources = TextSources(AutoTokenizer.from_pretrained(path))
    head_size = model.config.hidden_size // model.config.num_attention_heads
    return model.to(device), sources, head_size


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1280)
    parser.add_argument("--windows", type=int, default=3, help="of each text")
    parser.add_argument("--only", nargs="+", help="names, or parts of them")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    current: list[Format] = []
    model, sources, head_size = load_model(current)
    tried = {
        name: kept
        for name, kept in formats(head_size).items()
        if name == "none" or not args.only or any(part in name for part in args.only)
    }
    losses: dict[str, dict[str, list[float]]] = {
        name: {"prose": [], "code": []} for name in tried
    }
    jobs = [(kind, i) for i in range(args.windows) for kind in ("prose", "code")]
    with tqdm(total=len(jobs) * len(tried)) as bar:
        for kind, i in jobs:
            ids = torch.tensor(
                sources.window(getattr(sources, kind), args.tokens, Random(i))
            )
            for name, kept in tried.items():
                current[:] = [kept]
                logits = model(ids[None]).logits[0, FIRST_SCORED - 1 : -1]
                loss = torch.nn.functional.cross_entropy(logits, ids[FIRST_SCORED:])
                losses[name][kind].append(float(loss))
                bar.update()
    print("| format | bits | prose | code |\n|---|---|---|---|")
    for name, kinds in losses.items():
        cells = []
        for kind, values in kinds.items():
            delta = torch.tensor(values) - torch.tensor(losses["none"][kind])
            error = delta.std() / len(values) ** 0.5
            cells.append(f"{delta.mean().expm1():+.2%} ± {error:.2%}")
        print(f"| {name} | {tried[name].bits:.2f} | {' | '.join(cells)} |")
    if args.output:
        data = {
            "header": describe() | vars(args) | {"output": None},
            "loss": losses,
            "bits": {name: kept.bits for name, kept in tried.items()},
        }
        args.output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

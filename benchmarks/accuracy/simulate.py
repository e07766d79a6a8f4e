# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Selection rules on a real model's queries, keys and values, without an engine.

    python -m benchmarks.accuracy.simulate [--tokens 6144]

A quick look before a rule is built: one prefill, then every rule at some positions of
every second layer. The tail is always kept; codes are those of sealed blocks. Reports
the tokens kept beside the tail, the attention mass of the worst query head of a group,
and the relative error of the output.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from tqdm import tqdm

from benchmarks.accuracy.text import TextSources
from scripts.get_model import get_model
from vllm_sparse.cache.layout import BLOCK_SIZE
from vllm_sparse.ops.reference import quantise_k


@dataclass
class Case:
    """One position and KV head.

    Attributes:
        query: [group, head_size].
        key, value: [length, head_size]; codes: key with its sealed part from codes.
        sealed: tokens in sealed blocks.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    codes: torch.Tensor
    sealed: int


Rule = Callable[[Case], torch.Tensor]


def channels(query: torch.Tensor, rank: int, layout: str) -> torch.Tensor:
    """The channels read: one by one, or in pairs of RoPE partners or neighbours."""
    size = query.shape[1]
    magnitude = query.abs().sum(0)
    if layout == "single":
        return magnitude.topk(rank).indices
    order = torch.arange(size)
    pairs = order.view(2, -1).T if layout == "rope" else order.view(-1, 2)
    best = magnitude[pairs].sum(1).topk(rank // 2).indices
    return pairs[best].flatten()


def estimate(
    case: Case, rank: int, layout: str = "single", tempered: bool = True
) -> torch.Tensor:
    """SparQ's probabilities, or without its temperature: [group, length]."""
    q = case.query
    chosen = channels(q, rank, layout)
    whole, read = (t.abs().sum(-1, keepdim=True) for t in (q, q[:, chosen]))
    factor = (whole / read).sqrt() if tempered else 1.0
    factor = factor * q.shape[1] ** -0.5
    return (q[:, chosen] * factor @ case.codes[:, chosen].T).softmax(-1)


def top_k(rank: int, count: int, layout: str = "single") -> Rule:
    def rule(case: Case) -> torch.Tensor:
        scores = estimate(case, rank, layout).sum(0)[: case.sealed]
        return scores.topk(min(count, case.sealed)).indices

    return rule


def top_p(
    rank: int,
    p: float,
    tempered: bool = False,
    worst_head: bool = False,
    most: int | None = None,
) -> Rule:
    """Best pooled tokens until all heads together leave 1 - ``p`` outside.

    Args:
        worst_head: until the mass of every head reaches ``p`` instead.
        most: no more tokens than that.
    """

    def rule(case: Case) -> torch.Tensor:
        probs = estimate(case, rank, tempered=tempered)
        order = probs[:, : case.sealed].sum(0).argsort(descending=True)
        mass = probs[:, order].cumsum(-1) + probs[:, case.sealed :].sum(-1)[:, None]
        short = mass.min(0).values < p if worst_head else (1 - mass).sum(0) > 1 - p
        return order[: int(short.sum()) + 1][:most]

    return rule


def top_k_of_blocks(rank: int, count: int, share: float) -> Rule:
    """Top-k within the ``share`` of blocks whose bounds are largest."""

    def rule(case: Case) -> torch.Tensor:
        chosen = channels(case.query, rank, "single")
        keys = case.codes[: case.sealed, chosen].unflatten(0, (-1, BLOCK_SIZE))
        query = case.query[:, chosen] * case.query.shape[1] ** -0.5
        bound = (
            query.clamp(min=0) @ keys.amax(1).T + query.clamp(max=0) @ keys.amin(1).T
        )
        best = bound.softmax(-1).sum(0).topk(max(1, round(share * len(keys)))).indices
        left = torch.full((len(keys), BLOCK_SIZE), False)
        left[best] = left[0] = True
        scores = estimate(case, rank).sum(0)[: case.sealed].where(left.flatten(), -1.0)
        return scores.topk(min(count, int(left.sum()))).indices

    return rule


def top_p_union(rank: int, p: float) -> Rule:
    """Every head's own smallest set, united."""

    def rule(case: Case) -> torch.Tensor:
        probs = estimate(case, rank)
        keep = torch.zeros(case.sealed, dtype=torch.bool)
        for head in probs:
            scores, order = head[: case.sealed].sort(descending=True)
            mass = scores.cumsum(0) + head[case.sealed :].sum()
            keep[order[: int((mass < p).sum()) + 1]] = True
        return keep.nonzero()[:, 0]

    return rule


def capture(tokens: int) -> list[tuple[torch.Tensor, ...]]:
    """Queries, keys (after RoPE), values of all layers: [heads, tokens, head_size]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layers = []

    def attention(module, query, key, value, mask, **kwargs):
        layers.append(tuple(t[0] for t in (query, key, value)))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("capture", attention)
    path = get_model()
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="capture"
    )
    sources = TextSources(AutoTokenizer.from_pretrained(path))
    ids = sources.window(sources.prose, tokens, Random(0))
    model.model(torch.tensor(ids)[None])
    return layers


def cases(layers: list, positions: int) -> list[Case]:
    result = []
    for query, key, value in layers[::2]:
        group = query.shape[0] // key.shape[0]
        tokens = key.shape[1]
        for head in range(key.shape[0]):
            codes = key[head].clone()
            for first in range(0, tokens - BLOCK_SIZE + 1, BLOCK_SIZE):
                block = slice(first, first + BLOCK_SIZE)
                code, scale, minimum = quantise_k(key[head, block])
                codes[block] = code * scale.float() + minimum.float()
            for last in torch.linspace(tokens * 3 // 4, tokens - 1, positions).long():
                length = int(last) + 1
                sealed = length // BLOCK_SIZE * BLOCK_SIZE
                exact = key[head, sealed:length]
                result.append(
                    Case(
                        query=query[head * group : (head + 1) * group, int(last)],
                        key=key[head, :length],
                        value=value[head, :length],
                        codes=torch.cat([codes[:sealed], exact]),
                        sealed=sealed,
                    )
                )
    return result


def measure(rule: Rule, all_cases: list[Case]) -> str:
    """One line of a table: tokens kept (mean, p50, p99), mass, error."""
    kept, mass, error = [], [], []
    for case in all_cases:
        chosen = rule(case)
        tail = torch.arange(case.sealed, len(case.key))
        keep = torch.cat([chosen, tail])
        scale = case.query.shape[1] ** -0.5
        probs = (case.query @ case.key.T * scale).softmax(-1)
        weights = probs[:, keep]
        want = probs @ case.value
        got = weights / weights.sum(-1, keepdim=True) @ case.value[keep]
        kept.append(float(len(chosen)))
        mass.append(weights.sum(-1).min())
        error.append(((got - want).norm(dim=-1) / want.norm(dim=-1)).mean())
    counts = torch.tensor(kept)
    return (
        f"{counts.mean():.0f} | {counts.median():.0f} | {counts.quantile(0.99):.0f} "
        f"| {torch.stack(mass).mean():.3f} | {torch.stack(error).mean():.4f}"
    )


def rules(head_size: int) -> dict[str, Rule]:
    few = 3 * head_size // 8
    result = {}
    for rank in (head_size // 8, head_size // 4, few):
        for layout in ("single", "rope", "next"):
            result[f"top-k 512, rank {rank}, {layout}"] = top_k(rank, 512, layout)
    for count in (128, 256, 1024):
        result[f"top-k {count}, rank {few}"] = top_k(few, count)
    for rank in (head_size // 4, few, head_size):
        for p in (0.8, 0.9, 0.95):
            result[f"top-p {p}, rank {rank}"] = top_p(rank, p)
        result[f"top-p 0.95, rank {rank}, worst head"] = top_p(
            rank, 0.95, worst_head=True
        )
        result[f"top-p 0.95, rank {rank}, worst head, tempered"] = top_p(
            rank, 0.95, tempered=True, worst_head=True
        )
        result[f"top-p 0.95, rank {rank}, at most 1024"] = top_p(rank, 0.95, most=1024)
        result[f"top-p 0.95, rank {rank}, union"] = top_p_union(rank, 0.95)
    for share in (0.25, 0.5):
        name = f"top-k 512 of the best {share} of the blocks, rank {few}"
        result[name] = top_k_of_blocks(few, 512, share)
    return result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--positions", type=int, default=24, help="per layer")
    args = parser.parse_args()
    layers = capture(args.tokens)
    all_cases = cases(layers, args.positions)
    print("| rule | kept | p50 | p99 | mass | error |\n|---|---|---|---|---|---|")
    for name, rule in tqdm(rules(layers[0][0].shape[-1]).items()):
        tqdm.write(f"| {name} | {measure(rule, all_cases)} |")


if __name__ == "__main__":
    main()

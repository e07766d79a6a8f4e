# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which blocks of a context to keep exactly beside sinks and window, simulated: do
needles survive?

A prompt is computed densely; then rules choose blocks, the same ones for all layers and
heads, as one block table serves them all, and the answer's tokens attend to sinks,
chosen blocks and window, with LESS's state for the rest. Rules:

- ``recall``: where the state by itself gives a block's own values worst for the block's
  own keys (LoLA), the mean over a block's 8 worst tokens, layers and heads.
- ``norm``: largest values (L2), likewise.
- ``attended``: where the prompt's last 64 positions look, by the head that looks most.

A hit: all of the answer's tokens are the likeliest ones.
"""

import argparse
import math
from pathlib import Path
from random import Random

import torch

from benchmarks.accuracy.tasks import needle
from benchmarks.accuracy.text import TextSources
from benchmarks.environment import save
from vllm_sparse.cache.layout import BLOCK_SIZE
from vllm_sparse.methods.less import LEAST, Kernels, load_kernels
from vllm_sparse.train.forward import hidden_states, load_model
from vllm_sparse.train.recorded import attending, causal

LAST = 64
WORST = 8
RULES = ("recall", "norm", "attended")


class Prompt:
    """A prompt computed densely: all layers' K and V, blocks' scores by each rule."""

    def __init__(self, model, ids: list[int], layers: list[Kernels]) -> None:
        self.model, self.layers, self.length = model, layers, len(ids)
        self.kv: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Sinks, and the window: the block before the last, and that.
        self.blocks = range(1, (self.length - 1) // BLOCK_SIZE - 1)
        self.scores = {rule: torch.zeros(len(self.blocks)) for rule in RULES}
        with attending(model, self._record), torch.no_grad():
            self.first = self._logits(ids, 0)[-1]

    def _logits(self, ids: list[int], start: int) -> torch.Tensor:
        tokens = torch.tensor([ids])
        positions = torch.arange(start, start + len(ids))[None]
        hidden = hidden_states(self.model, tokens, positions)[0, -len(ids) :]
        return hidden[-min(len(ids), LAST) :] @ self.model.lm_head.weight.T

    def _record(self, layer, query, key, value, scale):
        self.kv.append((key.float(), value.float()))
        span = slice(BLOCK_SIZE, self.blocks.stop * BLOCK_SIZE)
        keys, values = key[:, span].float(), value[:, span].float()
        group = query.shape[0] // key.shape[0]
        mass = query[:, -LAST:].float() @ key.float().repeat_interleave(group, 0).mT
        mask = torch.full((LAST, self.length), -math.inf).triu(self.length - LAST + 1)
        mass = (mass * scale + mask).softmax(-1).mean(1)[:, span]
        blocks = (len(self.blocks), BLOCK_SIZE)
        # Few heads retrieve; the mean over all says nothing of them.
        most = mass.unflatten(1, blocks).sum(-1).amax(0)
        self.scores["attended"] = torch.maximum(self.scores["attended"], most)
        size = values.norm(dim=-1)
        self._add("norm", size / size.mean(1, keepdim=True))
        kernels = self.layers[layer]
        psi = kernels.psi(keys)
        state = psi.mT @ values
        phi = kernels.phi(keys.repeat_interleave(group, 0)).unflatten(0, (-1, group))
        sums = phi @ psi.sum(1)[:, None, :, None]
        recalled = phi @ state[:, None] / sums.clamp(min=LEAST)
        error = (recalled - values[:, None]).norm(dim=-1).mean(1)
        self._add("recall", error / error.mean(1, keepdim=True))
        return causal(layer, query, key, value, scale)

    def _add(self, rule: str, of_tokens: torch.Tensor) -> None:
        """Of [kv heads, tokens] to blocks."""
        parts = of_tokens.unflatten(1, (len(self.blocks), BLOCK_SIZE))
        self.scores[rule] += parts.topk(WORST, -1).values.mean((0, 2))

    def chosen(self, rule: str, count: int) -> list[int]:
        order = self.scores[rule].argsort(descending=True)[:count]
        return [self.blocks[int(i)] for i in order]

    def rank(self, rule: str, blocks: set[int]) -> int:
        """Of the best one of ``blocks``; 1 is kept first."""
        order = self.chosen(rule, len(self.blocks))
        return 1 + min(order.index(b) for b in blocks if b in self.blocks)

    @torch.no_grad()
    def answer(self, forced: list[int], kept: list[int] | None, state: bool) -> dict:
        """
        Args:
            kept: blocks beside sinks and window; None: all.
        """
        exact = torch.ones(self.length, dtype=torch.bool)
        if kept is not None:
            exact[BLOCK_SIZE : self.blocks.stop * BLOCK_SIZE] = False
            for block in kept:
                exact[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = True

        def attend(layer, query, key, value, scale):
            keys, values = self.kv[layer]
            group, new = query.shape[0] // key.shape[0], query.shape[1]
            whole = torch.cat([keys[:, exact], key.float()], 1)
            content = torch.cat([values[:, exact], value.float()], 1)
            whole, content = (t.repeat_interleave(group, 0) for t in (whole, content))
            logits = query.float() @ whole.mT * scale
            logits[..., -new:] += torch.full((new, new), -math.inf).triu(1)
            lse = logits.logsumexp(-1, keepdim=True)
            out = (logits - lse).exp() @ content
            if state and not exact.all():
                kernels = self.layers[layer]
                psi = kernels.psi(keys[:, ~exact])
                phi = kernels.phi(query).unflatten(0, (-1, group))
                sums = phi @ (psi.mT @ values[:, ~exact])[:, None]
                mass = (phi @ psi.sum(1)[:, None, :, None]).clamp(min=LEAST)
                total = torch.logaddexp(lse, mass.log().flatten(0, 1))
                out = out * (lse - total).exp() + sums.flatten(0, 1) * (-total).exp()
            return out

        rows = [self.first]
        if len(forced) > 1:
            with attending(self.model, attend):
                rows.extend(self._logits(forced[:-1], self.length))
        logits, targets = torch.stack(rows).float(), torch.tensor(forced)
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        hit = bool((logits.argmax(-1) == targets).all())
        return {"hit": hit, "nats": round(float(nats), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("model", type=Path, help="folder of a llama model")
    add("checkpoint", type=Path, help="folder of LESS's features")
    add("--length", type=int, default=4096, help="tokens of a prompt (%(default)s)")
    add("--samples", type=int, default=10, help="needles (%(default)s)")
    add("--kept", type=int, nargs="+", default=[1, 2, 4], help="blocks that stay")
    add("--output", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    sources = TextSources(AutoTokenizer.from_pretrained(args.model))
    model = load_model(args.model, torch.device("cpu")).bfloat16()
    layers = load_kernels(str(args.checkpoint))
    records = []
    for index in range(args.samples):
        sample = needle(sources, args.length, Random(index), index)
        prompt = Prompt(model, sample.prompt_ids, layers)
        where = {
            i // BLOCK_SIZE
            for i in range(len(sample.prompt_ids))
            if sample.prompt_ids[i : i + len(sample.forced_ids)] == sample.forced_ids
        }
        # Without the number itself tokenised as in the question, any of it.
        where = where or {int(sample.depth * args.length) // BLOCK_SIZE}
        found = {"dense": prompt.answer(sample.forced_ids, None, False)}
        for state in (False, True):
            name = "less" if state else "streaming"
            found[name] = prompt.answer(sample.forced_ids, [], state)
            for rule in RULES:
                for count in args.kept:
                    blocks = prompt.chosen(rule, count)
                    found[f"{name}+{rule}:{count}"] = prompt.answer(
                        sample.forced_ids, blocks, state
                    )
        ranks = {rule: prompt.rank(rule, where) for rule in RULES}
        entry = {"depth": sample.depth, "of": len(prompt.blocks), "rank": ranks}
        records.append(entry | {"arms": found})
        print(index, ranks, {n: f["hit"] for n, f in found.items()}, flush=True)
    hits = {
        name: sum(r["arms"][name]["hit"] for r in records)
        for name in records[0]["arms"]
    }
    save(args, [{"hits": hits, "samples": records}])
    print(hits)


if __name__ == "__main__":
    main()

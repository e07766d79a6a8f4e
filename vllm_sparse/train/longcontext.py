# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``longcontext``: teach a Llama-like model a context several times its own.

RoPE's base is raised and low-rank changes of attention are trained: most steps on short
windows with skipped positions, the last ones on windows of full length. OUT gets
``checkpoint/`` (some megabytes), ``run.json`` (losses, evaluations), ``base.json`` (the
untrained model's evaluation), and ``state.pt`` to go on from: give the same command
again, after --minutes or an interruption.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import checkpoint
from . import lora
from .corpus import Corpus
from .evaluate import evaluate
from .forward import attention_kernels, hidden_states, load_model, token_losses
from .loop import Optimisation, train
from .merge import KIND
from .mixture import Mixture
from .options import add_kernels, check_cudnn, parser_of, print_state
from .positions import default_theta
from .wordings import Wordings

NEEDS = """needs, for SmolLM2-135M and the defaults (98 million tokens): a GPU of 40 GB
(24 GB with --checkpointing), 4 GB of host memory, and 17 to 19 minutes of an H200. On a
CPU toy sizes only: some hundred tokens a second."""


class LongContext:
    """The trainee: factors of a model, batches of a mixture."""

    def __init__(self, model, mixture: Mixture, args: argparse.Namespace, tests):
        self.model, self.mixture, self.args = model, mixture, args
        self.evaluate = tests

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return lora.factors(self.model)

    def losses(self, step: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Weighted mean of the step's cross-entropy, in micro-batches."""
        batch = self.mixture.batch(step)
        total = batch.weights[:, 1:].sum().item()
        windows = max(1, self.args.micro_tokens // batch.ids.shape[1])
        for part in batch.split(windows):
            part = part.to(self.model.device)
            given = (part.ids, part.positions, self.args.checkpointing)
            with attention_kernels(self.args.cudnn):
                hidden = hidden_states(self.model, *given)
            losses = token_losses(
                hidden[:, :-1].flatten(0, 1),
                self.model.lm_head.weight,
                part.ids[:, 1:].flatten(),
            )
            weighted = losses * part.weights[:, 1:].flatten()
            yield weighted.sum() / total, part.ids.numel()


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(
        "longcontext",
        __doc__,
        NEEDS,
        steps=1500,
        learning_rate=4e-4,
        warmup=50,
        save_every=100,
        evaluate_every=500,
        evaluate_samples=10,
    )
    add = parser.add_argument
    add("model", type=Path, help="folder of a llama model in transformers' format")
    add("--context", type=int, default=32768, help="tokens to be learnt")
    add("--window", type=int, default=8192, help="tokens of most windows")
    add("--rope-theta", type=float, help="RoPE's base; None: from how much longer")
    add("--batch-tokens", type=int, default=65536, help="of a step")
    add("--micro-tokens", type=int, default=32768, help="computed at a time")
    add("--full-share", type=float, default=0.3, help="of steps: at full length")
    add("--synthetic", type=float, default=0.25, help="of windows: made on the spot")
    add("--replay", type=float, default=0.2, help="of windows: plain positions")
    add("--answer-weight", type=float, default=20.0, help="of synthetic answers")
    add("--forms", type=int, default=8, help="most wordings of facts in a window")
    asked = "of the questions in code: as a comment, in words"
    add("--comments", type=float, default=0.5, help=asked)
    add("--rank", type=int, default=32, help="of the changes")
    add("--alpha", type=float, default=64.0, help="changes count alpha / rank")
    add("--modules", nargs="+", default=list(lora.ATTENTION), help="changed layers")
    add("--checkpointing", action="store_true", help="less memory, 4/3 of the time")
    start = (
        "checkpoint of this command to add steps to: model, --context, RoPE's base, "
        "--rank, --alpha and --modules must be the same"
    )
    add("--start", type=Path, help=start)
    add_kernels(parser)
    lengths = [2048, 8192, 32768]
    add("--evaluate-lengths", type=int, nargs="+", default=lengths, help="tokens")
    args = parser.parse_args(argv)
    check_cudnn(parser, args)
    if args.forms < 1:
        parser.error("--forms must be at least 1")
    if args.window > args.context:
        parser.error("--window is longer than --context")
    if max(args.evaluate_lengths) > args.context:
        parser.error("--evaluate-lengths beyond --context")
    return args


# What decides on the outcome; the rest is where and how fast.
MIXTURE = "context window batch_tokens steps full_share synthetic code replay seed"
SYNTHETIC = "answer_weight forms comments"
RECIPE = [*MIXTURE.split(), *SYNTHETIC.split(), "rank", "alpha", "modules"]


def begin(args: argparse.Namespace, described: dict, factors: dict) -> str:
    """Factors as ``--start`` left them; the hash of those.

    Raises:
        FileNotFoundError, ValueError: as ``checkpoint.load``; other options than
            ``described`` made it.
    """
    before = checkpoint.load(args.start, KIND, args.model)
    made = before.description["config"]
    differing = [name for name in described if made.get(name) != described[name]]
    if differing:
        raise ValueError(
            f"{args.start} was made with other {', '.join(differing)} "
            f"({[made.get(name) for name in differing]}): give the same options"
        )
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_(before.tensors[name])
    return before.description["tensors_sha256"]


def main(argv: list[str]) -> None:
    """The command."""
    started = time.monotonic()
    args = arguments_of(argv)
    from transformers import AutoConfig, AutoTokenizer

    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    corpus = Corpus(args.data, args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = AutoConfig.from_pretrained(args.model)
    theta = args.rope_theta or default_theta(
        config.rope_parameters["rope_theta"],
        args.context / config.max_position_embeddings,
        config.head_dim,
    )
    model = load_model(args.model, device, theta)
    lora.add_lora(model, args.rank, args.alpha, args.modules)
    described = {
        "rope_theta": theta,
        "max_position_embeddings": args.context,
        "rank": args.rank,
        "alpha": args.alpha,
        "modules": args.modules,
    }
    started_from = args.start and begin(args, described, lora.factors(model))
    if args.compile:
        for layer in model.model.layers:
            layer.compile()
    synthetic = Wordings.of(
        tokenizer,
        answer_weight=args.answer_weight,
        repeats=0.0,
        forms=args.forms,
        comments=args.comments,
    )
    chosen = {name: getattr(args, name) for name in MIXTURE.split()}
    lengths, samples = sorted(args.evaluate_lengths), args.evaluate_samples
    trainee = LongContext(
        model,
        Mixture(corpus, synthetic, **chosen),
        args,
        lambda: evaluate(model, corpus, synthetic, lengths, samples, samples),
    )
    baseline = args.out / "base.json"
    if not baseline.exists():
        base = load_model(args.model, device)
        found = evaluate(base, corpus, synthetic, lengths, samples, samples)
        args.out.mkdir(parents=True, exist_ok=True)
        baseline.write_text(json.dumps(found) + "\n")
        del base
    recipe = {name: getattr(args, name) for name in RECIPE}
    recipe |= {"rope_theta": theta, "data_sha256": corpus.digest}
    recipe["base_sha256"] = checkpoint.base_hash(args.model)
    if started_from:
        recipe["start_sha256"] = started_from
    report = train(
        trainee,
        Optimisation(args.steps, args.learning_rate, args.warmup),
        args.out,
        recipe,
        args.minutes - (time.monotonic() - started) / 60,
        args.save_every,
        args.evaluate_every,
    )
    tensors = {name: p.to(torch.bfloat16) for name, p in trainee.parameters().items()}
    how = {**report["recipe"], "steps_done": report["step"], "tokens": report["tokens"]}
    folder = args.out / "checkpoint"
    checkpoint.save(folder, KIND, tensors, args.model, described, how, corpus.digest)
    print_state(folder, report, args.steps)

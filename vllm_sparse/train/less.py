# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``less``: teach a state to answer for tokens that have left (LESS, arXiv 2402.09398,
section 4).

The model is frozen and runs densely; each layer's features are trained by themselves
to give that layer's output, behind its output projection, from sinks, window and state.
Texts are recorded once, when a step first asks for them, and are trained on many times.
The loss is the share of the squared error that is left of what sinks and window alone
make. --joint-steps then train all layers together, towards the dense model's
predictions. OUT gets ``checkpoint/`` for ``--attention-backend less``, ``run.json``
with losses and perplexities, and ``state.pt`` to go on from; of the joint steps in
``joint/``.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from .. import checkpoint
from ..cache.layout import BLOCK_SIZE
from ..methods.less import KIND, described
from .corpus import Corpus
from .forward import load_model
from .less_joint import JointTrainee
from .less_layers import LessTrainee
from .loop import Optimisation, train
from .options import parse, parser_of, print_state

NEEDS = """needs, for SmolLM2-135M: 62 MB of memory a text of 2,048 tokens beside 3 GB;
on one thread of a CPU 8 seconds to record a text and 0.3 a step; an H200 8 ms a step
at 2,048 tokens. Joint steps: 1.1 s for two texts of 2,048 tokens on an H200 that two
other trainings shared."""


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(
        "less",
        __doc__,
        NEEDS,
        steps=1500,
        learning_rate=4e-3,
        warmup=20,
        save_every=250,
        evaluate_every=0,
        evaluate_samples=4,
    )
    add = parser.add_argument
    add("model", type=Path, help="folder of a llama model in transformers' format")
    add("--sinks", type=int, default=BLOCK_SIZE, help="first tokens that stay")
    add("--window", type=int, default=2 * BLOCK_SIZE, help="tokens of the window")
    add(
        "--block",
        type=int,
        default=BLOCK_SIZE,
        choices=(1, BLOCK_SIZE),
        help="windows begin with one; what 1 gives is for comparison, not served",
    )
    add("--length", type=int, default=2048, help="tokens of a text")
    add("--texts", type=int, default=64, help="that are recorded")
    add("--batch", type=int, default=1, help="texts of a step")
    add("--rows", type=int, default=256, help="positions of a text trained on")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the frozen model; auto: bfloat16 on GPUs, float32 on CPUs, of which "
        "those with 16-bit products are twice as fast with bfloat16",
    )
    add("--joint-steps", type=int, default=0, help="then, of all layers together")
    add("--joint-rate", type=float, default=1e-3, help="their learning rate's peak")
    add("--joint-batch", type=int, default=1, help="texts of such a step")
    add("--hidden", type=int, default=64, help="numbers between a feature's layers")
    add(
        "--evaluate-windows",
        type=int,
        nargs="+",
        help="to evaluate; by default that which is trained",
    )
    joint, why = ["joint_rate", "joint_batch"], "is of joint steps: give --joint-steps"
    args = parse(parser, argv, joint, lambda args: not args.joint_steps, why)
    # States are sums over whole blocks, whatever window is evaluated.
    evaluated = [("evaluate-windows", n) for n in args.evaluate_windows or []]
    for name, tokens in [("sinks", args.sinks), ("window", args.window), *evaluated]:
        least = 0 if name == "sinks" else args.block
        if tokens % args.block or tokens < least:
            parser.error(f"--{name} must be a multiple of {args.block} from {least} on")
    longest = max(args.evaluate_windows or [], default=0)
    if args.length <= args.sinks + max(args.window, longest) + 2 * args.block:
        parser.error("--length leaves nothing that has left the window")
    if args.texts % args.batch:
        parser.error("--texts must be a multiple of --batch")
    return args


RECIPE = ["sinks", "window", "block", "length", "texts", "batch", "rows", "hidden"]
RECIPE += ["code", "dtype", "seed", "steps"]


def main(argv: list[str]) -> None:
    """The command."""
    started = time.monotonic()
    args = arguments_of(argv)
    corpus = Corpus(args.data, args.model)
    model = load_model(args.model, torch.device(args.device))
    if args.dtype != "auto":
        model.to(getattr(torch, args.dtype))
    recipe = {name: getattr(args, name) for name in RECIPE}
    recipe |= {"base_sha256": checkpoint.base_hash(args.model)}
    recipe |= {"data_sha256": corpus.digest}
    trainee = LessTrainee(model, corpus, args)
    report = train(
        trainee,
        Optimisation(args.steps, args.learning_rate, args.warmup, clip=math.inf),
        args.out,
        recipe,
        args.minutes,
        args.save_every,
        args.evaluate_every,
    )
    steps = args.steps
    if args.joint_steps and report["finished"]:
        trainee, steps = JointTrainee(trainee), args.joint_steps
        joint = ["joint_steps", "joint_batch", "joint_rate"]
        recipe |= {name: getattr(args, name) for name in joint}
        report = train(
            trainee,
            Optimisation(steps, args.joint_rate, args.warmup),
            args.out / "joint",
            recipe,
            args.minutes - (time.monotonic() - started) / 60,
            args.save_every,
            args.evaluate_every,
        )
    config = described(model.config, args.hidden, args.sinks, args.window)
    config |= {"block": args.block}  # the engine has one alone, and refuses the other
    how = {**report["recipe"], "steps_done": report["step"], "tokens": report["tokens"]}
    folder = args.out / "checkpoint"
    tensors = trainee.tensors()
    checkpoint.save(folder, KIND, tensors, args.model, config, how, corpus.digest)
    print_state(folder, report, steps)

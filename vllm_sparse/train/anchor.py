# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``anchor``: teach a Llama-like model to read code of which one of eight old tokens
stays, the ends of lines first (vllm_sparse/cache/lines.py; AnLLM, arXiv 2402.07616),
with the control that a tuned model has to be compared with.

Low-rank changes are trained on windows of code, each one a context, with the anchors'
mask (``--arm anchor``) or plainly causal (``--arm control``): the same windows in the
same order at the same rate. OUT gets ``checkpoint/`` for the command merge,
``run.json`` (losses, evaluations) and ``state.pt`` to go on from: give the same command
again, after --minutes or an interruption.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .. import checkpoint
from ..anchor_config import AnchorConfig
from . import lora
from .anchored import Anchored, line_ends
from .corpus import Corpus
from .forward import attention_kernels, hidden_states, load_model, token_losses
from .held_out import Forward, perplexities
from .loop import Optimisation, train
from .merge import ANCHOR_KINDS
from .options import add_kernels, check_cudnn, parser_of, print_state

NEEDS = """needs, for SmolLM2-135M and the defaults (49 million tokens): a GPU of 80 GB
(of 40 GB with --micro-tokens 16384), 4 GB of host memory and 10 minutes
of an H200 for the anchors, 9 for the control. The mask is dense, and goes
through PyTorch's memory-efficient kernels, or cuDNN's (--cudnn: try which are faster).
On a CPU toy sizes only: some hundred tokens a second. --full needs 4 GB of GPU memory
more, and its checkpoint has the model's size instead of 15 MB."""


class Training:
    """The trainee: windows of a corpus, each one a context.

    Args:
        parameters: what is trained.
        forward: last hidden states of (ids, positions), as the arm attends.
        tests: evaluates.
    """

    def __init__(self, model, corpus: Corpus, args, parameters: dict, forward, tests):
        self.model, self.corpus, self.args = model, corpus, args
        self.trained, self.forward, self.tests = parameters, forward, tests

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.trained

    def batch(self, step: int) -> torch.Tensor:
        """[windows, length] int64, the same for both arms."""
        args, rng = self.args, np.random.default_rng([self.args.seed, step])
        windows = []
        for _ in range(max(1, args.batch_tokens // args.length)):
            kind = "code" if rng.random() < args.code else "prose"
            windows.append(self.corpus.window(f"train-{kind}", args.length, rng))
        return torch.from_numpy(np.stack(windows))

    @contextmanager
    def computing(self):
        """Products in bf16 where weights are fp32 (``--full``) on a GPU; attention in
        the kernels asked for."""
        device = self.model.device.type
        bf16 = device == "cuda" and self.args.full
        with (
            torch.autocast(device, torch.bfloat16, enabled=bf16),
            attention_kernels(self.args.cudnn),
        ):
            yield

    def losses(self, step: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Mean of the step's cross-entropy, in micro-batches."""
        batch = self.batch(step)
        windows = max(1, self.args.micro_tokens // self.args.length)
        for part in batch.split(windows):
            ids = part.to(self.model.device)
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            with self.computing():
                hidden = self.forward(ids, positions)[:, :-1].flatten(0, 1)
                losses = token_losses(
                    hidden, self.model.lm_head.weight, ids[:, 1:].flatten()
                )
            yield losses.sum() / batch[:, 1:].numel(), ids.numel()

    def evaluate(self) -> dict:
        with self.computing():
            return self.tests()


def pairs(text: str) -> dict[int, int]:
    """``20:10,25:12`` as {20: 10, 25: 12}."""
    parts = (part.split(":") for part in text.split(","))
    return {int(layer): int(lower) for layer, lower in parts}


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(
        "anchor",
        __doc__,
        NEEDS,
        code=1.0,
        steps=1500,
        learning_rate=1.5e-3,
        warmup=50,
        save_every=250,
        evaluate_every=500,
        evaluate_samples=16,
    )
    add = parser.add_argument
    add("model", type=Path, help="folder of a llama model in transformers' format")
    arms = "attention that is trained: with anchors, or plainly causal"
    add("--arm", choices=ANCHOR_KINDS, default="anchor", help=arms)
    add("--length", type=int, default=2048, help="tokens of a window")
    add("--batch-tokens", type=int, default=32768, help="of a step")
    add("--micro-tokens", type=int, default=32768, help="computed at a time")
    blind = "anchors see no anchors before them but the first token (AnLLM)"
    add("--blind-anchors", action="store_true", help=blind)
    lower = "LAYER:LOWER,...: layers that see a lower layer's anchors, too"
    add("--lower-layers", type=pairs, default={}, help=lower)
    add("--rank", type=int, default=24, help="of the changes")
    add("--alpha", type=float, default=48.0, help="changes count alpha / rank")
    changed = [*lora.ATTENTION, *lora.MLP]
    add("--modules", nargs="+", default=changed, help="changed layers")
    full = "train all weights: try a rate of 3e-4; too large to be shipped"
    add("--full", action="store_true", help=full)
    add_kernels(parser)
    add("--evaluate-lengths", type=int, nargs="+", default=[2048], help="tokens")
    args = parser.parse_args(argv)
    if args.arm == "control" and (args.lower_layers or args.blind_anchors):
        parser.error("--lower-layers and --blind-anchors are of --arm anchor")
    check_cudnn(parser, args)
    if args.compile and args.lower_layers:
        parser.error("--compile does not go with --lower-layers: leave one out")
    return args


# What decides on the outcome; the rest is where and how fast.
RECIPE = ["arm", "length", "batch_tokens", "steps", "code", "seed", "full"]
LOW_RANK = ["rank", "alpha", "modules"]


def trained_parameters(model, args) -> dict[str, torch.nn.Parameter]:
    if args.full:
        model.float().requires_grad_(True)
        return dict(model.named_parameters())
    lora.add_lora(model, args.rank, args.alpha, args.modules)
    return lora.factors(model)


def main(argv: list[str]) -> None:
    """The command."""
    started = time.monotonic()
    args = arguments_of(argv)
    from transformers import AutoTokenizer

    torch.manual_seed(args.seed)
    corpus = Corpus(args.data, args.model)
    model = load_model(args.model, torch.device(args.device))
    described: dict = {"full": args.full}
    if not args.full:
        described |= {name: getattr(args, name) for name in LOW_RANK}
    forward: Forward = partial(hidden_states, model)
    if args.arm == "anchor":
        ends = line_ends(AutoTokenizer.from_pretrained(args.model))
        declared = AnchorConfig(ends, not args.blind_anchors, args.lower_layers)
        forward = Anchored(model, declared)
        described |= declared.to_json()
    parameters = trained_parameters(model, args)
    if args.compile:
        for layer in model.model.layers:
            layer.compile()
    lengths, samples = sorted(args.evaluate_lengths), args.evaluate_samples
    tests = lambda: {
        "perplexity": perplexities(model, corpus, forward, lengths, samples)
    }
    recipe = {name: getattr(args, name) for name in RECIPE} | described
    recipe |= {"data_sha256": corpus.digest}
    recipe["base_sha256"] = checkpoint.base_hash(args.model)
    trainee = Training(model, corpus, args, parameters, forward, tests)
    report = train(
        trainee,
        Optimisation(args.steps, args.learning_rate, args.warmup),
        args.out,
        recipe,
        args.minutes - (time.monotonic() - started) / 60,
        args.save_every,
        args.evaluate_every,
    )
    tensors = {name: p.to(torch.bfloat16) for name, p in parameters.items()}
    how = {name: report["recipe"][name] for name in (*RECIPE, "optimisation")}
    how |= {"steps_done": report["step"], "tokens": report["tokens"]}
    folder, kind = args.out / "checkpoint", ANCHOR_KINDS[args.arm]
    checkpoint.save(folder, kind, tensors, args.model, described, how, corpus.digest)
    print_state(folder, report, args.steps)

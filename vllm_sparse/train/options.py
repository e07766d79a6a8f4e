# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the commands that train have in common: options, and the last line."""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch


def parser_of(
    command: str, description: str | None, needs: str, **defaults: Any
) -> argparse.ArgumentParser:
    """A parser with the options of every command.

    Args:
        needs: device, memory and minutes, for ``--help``.
        defaults: of ``steps``, ``learning_rate``, ``warmup``, ``save_every``,
            ``evaluate_every`` and ``evaluate_samples``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m vllm_sparse.train {command}",
        description=description,
        epilog=needs,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--data", type=Path, required=True, help="made by the command data")
    add("--out", type=Path, required=True, help="folder of this run")
    add("--device", default=device, help="of torch")
    add("--minutes", type=float, default=math.inf, help="then save and end")
    add("--steps", type=int, help="in all, over all runs in OUT")
    add("--code", type=float, default=0.5, help="of windows: code, not prose")
    add("--learning-rate", type=float, help="its peak")
    add("--warmup", type=int, help="steps up to the peak")
    add("--seed", type=int, default=0, help="of what is drawn")
    add("--save-every", type=int, help="steps")
    add("--evaluate-every", type=int, help="steps; 0: first and last")
    add("--evaluate-samples", type=int, help="of each kind and length")
    parser.set_defaults(**defaults)
    return parser


def add_kernels(parser: argparse.ArgumentParser) -> None:
    """``--compile`` and ``--cudnn``: the same computation, faster on some devices."""
    add = parser.add_argument
    compiled = "layers by torch.compile, and pretrain's loss"
    add("--compile", action="store_true", help=compiled)
    cudnn = "attention by cuDNN alone, not by the kernels that PyTorch prefers"
    add("--cudnn", action="store_true", help=cudnn)


def check_cudnn(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.cudnn and not args.device.startswith("cuda"):
        parser.error(f"--cudnn is of GPUs, not of --device {args.device}")


def parse(
    parser: argparse.ArgumentParser,
    argv: list[str],
    names: Iterable[str],
    idle: Callable[[argparse.Namespace], Any],
    why: str,
) -> argparse.Namespace:
    """Arguments; where ``idle``, it is an error that says ``why`` to give one of
    ``names``, which would do nothing then."""
    names = list(names)
    # argparse leaves alone what is there, so None is what was not given.
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names)))
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, parser.get_default(name))
        elif idle(args):
            parser.error(f"--{name.replace('_', '-')} {why}")
    return args


def print_state(made: Path, report: dict, steps: int) -> None:
    """Where it lies, and whether the run is through."""
    state = "finished" if report["finished"] else "not finished: run it again to go on"
    print(f"{made}: step {report['step']} of {steps}, {state}")

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Propose top_p, rank and dense_layers for a model from sample text.

    vllm-sparse calibrate MODEL --data FILE [FILE ...] --target-error 0.05

Decodes at places all over the text, measures what each setting of a small grid would
read and how far its attention output is from dense attention's, and takes the cheapest
that is good enough (docs/calibration.md).
"""

import argparse
import json
import sys
from pathlib import Path

from .choose import Measurements, Outcome, alternatives, propose
from .plot import plot_kept, require_matplotlib
from .report import additional_config, full_report, line, table
from .run import CalibrationError, Plan, measure_model, read_text


def parse(argv: list[str] | None) -> argparse.Namespace:
    plan = Plan()
    parser = argparse.ArgumentParser(
        prog="vllm-sparse calibrate", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", metavar="MODEL", help="name or folder, as for vLLM")
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="text of the kind that will be served, UTF-8",
    )
    parser.add_argument(
        "--target-error",
        type=_share,
        default=0.05,
        metavar="E",
        help="largest mean relative error of the attention output (0.05)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("sparse.json"),
        metavar="FILE",
        help="JSON for --additional-config (sparse.json)",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="heat map of the shares kept"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="all figures of the run, as JSON"
    )
    parser.add_argument(
        "--max-model-len",
        type=_count,
        default=plan.max_model_len,
        metavar="N",
        help=f"longest context to measure ({plan.max_model_len})",
    )
    parser.add_argument(
        "--samples",
        type=_count,
        default=plan.samples,
        metavar="N",
        help=f"windows of the text ({plan.samples})",
    )
    parser.add_argument(
        "--tokens",
        type=_count,
        default=plan.tokens,
        metavar="N",
        help=f"decode rows measured in each window ({plan.tokens})",
    )
    return parser.parse_args(argv)


def check_outputs(args: argparse.Namespace) -> None:
    """What would otherwise fail after minutes.

    Raises:
        CalibrationError: no matplotlib, or no folder to write into.
    """
    if args.plot is not None:
        require_matplotlib()
    for option in ("output", "plot", "report"):
        path = getattr(args, option)
        if path is not None and not path.parent.is_dir():
            raise CalibrationError(f"--{option} {path}: there is no folder for it")


def finish(
    args: argparse.Namespace, found: Measurements, header: dict
) -> Outcome | None:
    """Print the table; write what was asked for if a setting is good enough."""
    proposal = propose(found, args.target_error)
    print(table(found, proposal))
    if proposal is None:
        best = min(alternatives(found), key=lambda point: point.error)
        print(
            f"\nNo setting reaches a mean error of {args.target_error:g}. The best "
            f"found:\n{line(best)}\nNothing was written. Allow more with "
            f"--target-error {best.error * 1.05:.2g}, or serve the model densely.",
            file=sys.stderr,
        )
        return None
    args.output.write_text(additional_config(proposal) + "\n")
    if args.plot is not None:
        plot_kept(found, proposal, args.plot)
    if args.report is not None:
        report = full_report(header, found, proposal, args.target_error)
        args.report.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"\nwrote {args.output}; serve with\n  --attention-backend sparq "
        f'--additional-config "$(cat {args.output})"'
    )
    return proposal


def main(argv: list[str] | None = None) -> int:
    """0; 1: no setting is good enough; 2: it could not be measured."""
    args = parse(argv)
    plan = Plan(args.max_model_len, args.samples, args.tokens)
    header = {
        "model": Path(args.model).name,
        "data": [path.name for path in args.data],
        "max_model_len": plan.max_model_len,
        "samples": plan.samples,
        "tokens": plan.tokens,
    }
    try:
        check_outputs(args)
        found, engine = measure_model(args.model, read_text(args.data), plan)
    except CalibrationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if finish(args, found, header | engine) else 1


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return value

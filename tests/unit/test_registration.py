# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Beside other plugins, and when our own registration fails."""

import logging
import os

import pytest

pytest.importorskip("vllm")

import torch  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402
from vllm.platforms.interface import PlatformEnum  # noqa: E402

from vllm_sparse import plugin  # noqa: E402
from vllm_sparse.ops import library  # noqa: E402
from vllm_sparse.plugin.platform import honouring  # noqa: E402

from .test_plugin import CPU_ATTN, SPARQ, SPARQ_PATH, layer, python  # noqa: E402

OTHER_PLATFORM = """
from vllm.platforms.cpu import CpuPlatform

class OtherPlatform(CpuPlatform):
    pass

def activate():
    return "other.OtherPlatform"
"""
ASK = """
from vllm.plugins import load_general_plugins
from vllm.platforms import current_platform
load_general_plugins()
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
layer = AttentionSelectorConfig(64, torch.bfloat16, "auto", None)
print([c.__name__ for c in type(current_platform).__mro__[:3]])
for name in ("CPU_ATTN", "SPARQ"):
    try:
        member = AttentionBackendEnum[name]
        print(name, current_platform.get_attn_backend_cls(member, layer))
    except ValueError as error:
        print(name, error)
"""


def test_another_platform_plugin_stays_and_honours_our_names(tmp_path):
    """vLLM starts with one platform of a plugin at most: it is the other one."""
    (tmp_path / "other.py").write_text(OTHER_PLATFORM)
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nother = other:activate\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    lines = python(ASK, PYTHONPATH=path).splitlines()
    assert "['SparseOtherPlatform', 'HonourOurBackends', 'OtherPlatform']" in lines
    assert f"CPU_ATTN {CPU_ATTN.get_path()}" in lines
    assert f"SPARQ {SPARQ_PATH}" in lines


def test_a_platform_that_we_do_not_serve_is_left_alone_until_we_are_chosen():
    class Npu(CpuPlatform):
        _enum = PlatformEnum.OOT

    platform = honouring(Npu)
    assert platform.get_attn_backend_cls(CPU_ATTN, layer()) == CPU_ATTN.get_path()
    with pytest.raises(ValueError, match="serves CPUs and NVIDIA GPUs.*platform Npu"):
        platform.get_attn_backend_cls(SPARQ, layer())


def test_register_never_raises(monkeypatch, caplog):
    """And registers no name that no platform would honour."""

    def broken():
        raise ImportError("no module of that name")

    registered = []
    monkeypatch.setattr(plugin, "_cover_platform", broken)
    monkeypatch.setattr(plugin, "_register_names", lambda: registered.append(1))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin.register()
    assert not registered
    assert "could not register its attention backends" in caplog.text
    assert "no module of that name" in caplog.text


@pytest.mark.slow
def test_a_registration_that_fails_hurts_only_those_who_choose_us(tmp_path):
    """A module of ours that cannot be imported stands for all that may be broken."""
    broken = "import sys\nsys.modules['vllm_sparse.plugin.platform'] = None\n"
    chosen = (
        "from vllm.config.attention import AttentionConfig\n"
        "AttentionConfig(backend='CPU_ATTN')\n"
        "try:\n"
        "    AttentionConfig(backend='sparq')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    said = "import os\nos.dup2(1, 2)\n"  # the log is part of what is checked
    output = python(said + broken + ASK + chosen)
    assert "['CpuPlatform', 'Platform', 'object']" in output
    assert f"CPU_ATTN {CPU_ATTN.get_path()}" in output
    assert "Unknown attention backend: 'SPARQ'" in output
    assert "could not register its attention backends (sparq, twilight)" in output
    assert "install vllm_sparse anew" in output
    assert "vllm_sparse.plugin.platform" in output  # the reason


def test_a_library_that_does_not_load_says_so_when_it_is_needed(monkeypatch):
    def broken(path):
        raise OSError("undefined symbol: aoti_torch_future")

    monkeypatch.setattr(torch.ops, "load_library", broken)
    library.load.cache_clear()
    try:
        with pytest.raises(ImportError, match="compiled ops do not load under torch"):
            library.load()
    finally:
        library.load.cache_clear()

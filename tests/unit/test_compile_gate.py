# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The compile gate reads ptxas right and lets no unlisted spill pass."""

import sys

import pytest

from scripts import compile_gate
from scripts.compile_gate import Kernel, Result, offenders, parse_ptxas, split_symbol

FILE = "39_GLOBAL__N__87269641_7_rows_cu_d5219bcf"
LOG = f"""
ptxas info    : Compiling entry function '_ZN4cuda{FILE}18attend_rows_kernelIfLi8ELi4EEEvNS0_4ArgsE' for 'sm_90a'
ptxas info    : Function properties for _ZN4cuda{FILE}18attend_rows_kernelIfLi8ELi4EEEvNS0_4ArgsE
    40 bytes stack frame, 44 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 40 bytes cumulative stack size
ptxas info    : Compiling entry function '_ZN4cuda{FILE}18gather_rows_kernelENS0_4ArgsE' for 'sm_90a'
ptxas info    : Function properties for _ZN4cuda{FILE}18gather_rows_kernelENS0_4ArgsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
"""  # noqa: E501


def test_ptxas_output_is_read():
    assert parse_ptxas(LOG) == [
        Kernel("attend_rows_kernel", "fLi8ELi4", 128, 104),
        Kernel("gather_rows_kernel", "", 30, 0),
    ]
    assert split_symbol("_Z12store_kernelI5uint4Ev4Args") == ("store_kernel", "5uint4")
    assert split_symbol("plain_c_name") == ("plain_c_name", "")
    with pytest.raises(ValueError, match="ptxas says of gather_rows_kernel"):
        parse_ptxas(LOG.replace("Used 30", "Needs 30"))


def test_only_hot_kernels_beyond_what_is_accepted_offend(monkeypatch):
    accepted = {("attend_rows_kernel", "fLi8ELi4"): 104}
    monkeypatch.setattr(compile_gate, "ACCEPTED_SPILLS", accepted)
    rare = Kernel("gather_rows_kernel", "", 255, 4000)
    within = Kernel("attend_rows_kernel", "fLi8ELi4", 128, 104)
    beyond = Kernel("attend_rows_kernel", "fLi8ELi4", 128, 105)
    other = Kernel("attend_rows_kernel", "fLi8ELi2", 128, 4)
    result = Result("attend/rows.cu", "90a", 1.0, "", [rare, within, beyond, other])
    assert [(k, n) for _, k, n in offenders([result])] == [(beyond, 104), (other, 0)]


@pytest.fixture
def gate(monkeypatch):
    """Runs the gate over one source whose compilation is made up."""

    def run(result: Result) -> int:
        monkeypatch.setattr(sys, "argv", ["compile_gate.py", "--archs", "90a"])
        monkeypatch.setattr(compile_gate, "find_nvcc", lambda: "/bin/true")
        monkeypatch.setattr(compile_gate, "compile_one", lambda *_: result)
        return compile_gate.main()

    return run


def test_verdicts(gate, capsys):
    clean = [Kernel(name, "", 64, 0) for name in compile_gate.HOT]
    clean += [Kernel(*key, 64, 0) for key in compile_gate.ACCEPTED_SPILLS]
    assert gate(Result("a.cu", "90a", 1.0, "", clean)) == 0
    assert gate(Result("a.cu", "90a", 1.0, "error: expected a ;", [])) == 1
    assert "expected a ;" in capsys.readouterr().out
    spilling = Kernel("store_codes_kernel", "new", 64, 8)
    assert gate(Result("a.cu", "90a", 1.0, "", [*clean, spilling])) == 1
    assert "store_codes_kernel" in capsys.readouterr().out
    others = [kernel for kernel in clean if kernel.name != compile_gate.HOT[0]]
    assert gate(Result("a.cu", "90a", 1.0, "", others)) == 1
    assert f"no source has it: {compile_gate.HOT[0]}" in capsys.readouterr().out
    assert gate(Result("a.cu", "90a", 1.0, "", clean[:-1])) == 1
    assert "no source has it: decode_kernel" in capsys.readouterr().out


def test_without_nvcc_it_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compile_gate.py"])
    monkeypatch.setattr(compile_gate, "find_nvcc", lambda: None)
    assert compile_gate.main() == 0
    assert "skipped: there is no nvcc" in capsys.readouterr().out

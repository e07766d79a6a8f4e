# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which kernels serve which device, and what is said where they cannot."""

import logging
from types import SimpleNamespace

import pytest
import torch

from vllm_sparse.ops import dispatch
from vllm_sparse.ops.dispatch import KernelsError, ops_for, resolve, use

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
HOPPER, AMPERE, ADA, BLACKWELL = (9, 0), (8, 0), (8, 9), (10, 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No memory of other tests, and no interpreter unless a test asks for it."""
    monkeypatch.setattr(dispatch, "_choice", "auto")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for function in (resolve, dispatch._functions):
        function.cache_clear()
    yield
    for function in (resolve, dispatch._functions):
        function.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """A made-up GPU, CUDA library and Triton; returns the probe's launches."""

    def build(capability=HOPPER, library=True, triton=True, image=True):
        launches = []

        def try_ops(*_):
            launches.append(capability)
            if not image:
                raise RuntimeError("no kernel image is available")

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(dispatch, "has_cuda_library", lambda: library)
        monkeypatch.setattr(dispatch, "find_spec", lambda _: triton or None)
        monkeypatch.setattr(dispatch, "load", lambda: None)
        monkeypatch.setattr(dispatch, "try_ops", try_ops)
        return launches

    return build


@pytest.mark.parametrize(
    ("capability", "library", "kernels", "reason"),
    [
        (HOPPER, True, "cuda", None),
        (HOPPER, False, "triton", "VLLM_SPARSE_CUDA=on"),
        (AMPERE, True, "triton", "unproven on compute capability 8.0"),
        (ADA, True, "triton", "unproven on compute capability 8.9"),
        (BLACKWELL, True, "triton", "unproven on compute capability 10.0"),
        (ADA, False, "triton", "VLLM_SPARSE_CUDA=on"),
    ],
)
def test_auto_on_a_gpu(machine, caplog, capability, library, kernels, reason):
    launches = machine(capability, library)
    with caplog.at_level(logging.WARNING, logger=dispatch.logger.name):
        dispatch.logger.addHandler(caplog.handler)  # vLLM's loggers do not propagate
        try:
            assert use("auto", GPU) == kernels
            assert resolve("auto", GPU) == kernels
        finally:
            dispatch.logger.removeHandler(caplog.handler)
    lines = {record.getMessage() for record in caplog.records}
    assert len(lines) == (reason is not None)
    assert all(reason in line for line in lines)
    assert not launches


def test_auto_on_the_cpu_takes_the_compiled_ops():
    assert use("auto", "cpu") == "cpu"
    assert ops_for(torch.zeros(1)) is torch.ops.vllm_sparse


@pytest.mark.parametrize("capability", [HOPPER, AMPERE, ADA, BLACKWELL], ids=str)
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_an_explicit_choice_is_kept_where_it_works(machine, capability, kernels):
    launches = machine(capability)
    assert use(kernels, GPU) == kernels
    unproven = kernels == "cuda" and capability != HOPPER
    assert launches == [capability] * unproven


@pytest.mark.parametrize(
    ("kernels", "device", "about", "message"),
    [
        ("cpu", GPU, {}, "cannot serve cuda:0; set sparse.kernels to 'auto'"),
        ("cuda", CPU, {}, "cannot serve cpu; set sparse.kernels to 'auto'"),
        ("cuda", GPU, dict(library=False), "VLLM_SPARSE_CUDA=on pip install"),
        (
            "cuda",
            GPU,
            dict(capability=(12, 0), image=False),
            r"no kernel image .*; build it with VLLM_SPARSE_CUDA_ARCHS=120, or",
        ),
        ("triton", CPU, {}, "only under TRITON_INTERPRET=1; set sparse.kernels"),
        ("triton", GPU, dict(triton=False), "pip install triton"),
        ("auto", torch.device("meta"), {}, "not on meta"),
    ],
)
def test_a_choice_that_cannot_be_honoured_names_the_fix(
    machine, kernels, device, about, message
):
    machine(**about)
    with pytest.raises(KernelsError, match=message):
        use(kernels, device)
    assert dispatch._choice == "auto"
    use(kernels)  # found out when a tensor comes
    with pytest.raises(KernelsError, match=message):
        ops_for(SimpleNamespace(device=device))


def test_the_probe_is_a_call_that_the_ops_take():
    from vllm_sparse import ops

    out = dispatch.try_ops(ops.load(), CPU)
    assert out.shape == (1, 4, 64) and not out.any()


def test_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(KernelsError, match="one of auto, cuda, triton, cpu, got 'gpu'"):
        use("gpu")


def test_the_interpreter_serves_the_cpu(monkeypatch):
    # Before the environment is changed: kernels keep the mode they are imported in.
    from vllm_sparse.kernels import triton

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use("triton", "cpu") == "triton"
    assert ops_for(torch.zeros(1)) is triton


def test_every_op_of_the_library_is_there_in_triton():
    from vllm_sparse import ops
    from vllm_sparse.kernels import triton

    ops.load()
    names = {
        name.removeprefix("vllm_sparse::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vllm_sparse::")
    }
    others = {"cpu_isa", "workspace_bytes", "store_quantised"}
    assert names - others == set(triton.__all__)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which kernels serve which device, and what is said where they cannot."""

import logging

import pytest
import torch

from vllm_sparse import ops
from vllm_sparse.ops import bound, dispatch, self_test
from vllm_sparse.ops.dispatch import KernelsError, functions, resolve

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
HOPPER, AMPERE, ADA, BLACKWELL = (9, 0), (8, 0), (8, 9), (10, 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No memory of other tests, and no interpreter unless a test asks for it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for function in (resolve, functions):
        function.cache_clear()
    yield
    for function in (resolve, functions):
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
            assert bound("auto", GPU).kernels == kernels
            assert resolve("auto", GPU) == kernels
        finally:
            dispatch.logger.removeHandler(caplog.handler)
    lines = {record.getMessage() for record in caplog.records}
    assert len(lines) == (reason is not None)
    assert all(reason in line for line in lines)
    assert not launches


def test_auto_on_the_cpu_takes_the_compiled_ops():
    assert bound("auto", "cpu").kernels == "cpu"
    assert functions("cpu") is torch.ops.vllm_sparse


@pytest.mark.parametrize("capability", [HOPPER, AMPERE, ADA, BLACKWELL], ids=str)
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_an_explicit_choice_is_kept_where_it_works(machine, capability, kernels):
    launches = machine(capability)
    assert bound(kernels, GPU).kernels == kernels
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
        bound(kernels, device)


def test_every_engine_keeps_its_own_choice(machine):
    machine()
    first, second = bound("triton", GPU), bound("auto", GPU)
    assert (first.kernels, second.kernels) == ("triton", "cuda")
    with pytest.raises(KernelsError, match="only under TRITON_INTERPRET=1"):
        first.gather_kv(*[torch.zeros(1)] * 6)


def test_the_probe_is_a_call_that_the_ops_take():
    out = dispatch.try_ops(ops.load(), CPU)
    assert out.shape == (1, 4, 64) and not out.any()


def test_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(KernelsError, match="one of auto, cuda, triton, cpu, got 'gpu'"):
        bound("gpu", CPU)


def test_the_interpreter_serves_the_cpu(monkeypatch):
    # Before the environment is changed: kernels keep the mode they are imported in.
    from vllm_sparse.kernels import triton

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert bound("triton", "cpu").kernels == "triton"
    assert functions("triton") is triton


def test_every_op_of_the_library_is_there_in_triton():
    from vllm_sparse.kernels import triton

    ops.load()
    names = {
        name.removeprefix("vllm_sparse::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vllm_sparse::")
    }
    assert names - {"cpu_isa", "workspace_bytes"} == set(triton.__all__)


def test_the_self_test_passes_and_can_fail(monkeypatch):
    self_test.check_ops("auto", CPU)
    attend = self_test.reference.attend
    worse = lambda **given: attend(**given | dict(scale=0.05))
    monkeypatch.setattr(self_test.reference, "attend", worse)
    with pytest.raises(AssertionError, match="relative error"):
        self_test.check_ops("auto", CPU)

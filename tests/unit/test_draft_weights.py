# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which weights a draft step computes with; vLLM's fp8 kernels need a GPU."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor import parameter  # noqa: E402
from vllm.model_executor.layers.linear import (  # noqa: E402
    ColumnParallelLinear,
    ReplicatedLinear,
)

from vllm_sparse.config import SparseConfigError  # noqa: E402
from vllm_sparse.plugin.speculation import draft_weights  # noqa: E402
from vllm_sparse.plugin.speculation.draft_weights import (  # noqa: E402
    DraftWeights,
    drafting,
)

K, N = 128, 64


def linear(rows: int = N, dtype=torch.bfloat16, kind=ColumnParallelLinear, **options):
    layer = kind(
        K, rows, params_dtype=dtype, disable_tp=True, return_bias=False, **options
    )
    for weights in layer.parameters():
        nn.init.normal_(weights.data, std=0.1)
    return layer


def assert_near(got, wanted) -> None:
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.02)


@pytest.fixture
def plain_kernels(monkeypatch):
    """Copies that are the weights' negatives, and a plain product with them."""

    def quantise(x, num_token_padding=None, use_per_token_if_dynamic=False):
        assert use_per_token_if_dynamic
        more = max(0, (num_token_padding or 0) - len(x))
        padded = torch.cat([x, x.new_full((more, x.shape[1]), torch.nan)])
        return padded, padded.new_ones(len(padded), 1)

    def multiply(a, b, scale_a, scale_b, out_dtype, bias):
        assert scale_a.shape == (len(a), 1) and scale_b.shape == (b.shape[1], 1)
        product = -(a @ b).to(out_dtype)
        return product if bias is None else product + bias

    monkeypatch.setattr(draft_weights.vllm_ops, "scaled_fp8_quant", quantise)
    monkeypatch.setattr(draft_weights.vllm_ops, "cutlass_scaled_mm", multiply)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("batch", [3, 24, 70])
def test_only_draft_steps_read_the_copy(batch, bias, compiled):
    router = linear(kind=ReplicatedLinear)
    model = nn.Sequential(linear(bias=bias), linear(rows=72), router)
    x = torch.randn(batch, K, dtype=torch.bfloat16)
    layer, other, _ = model
    other_method = other.quant_method
    weights = DraftWeights(model)
    assert weights.layers == [layer]  # the kernel does not take the other's shape
    assert other.quant_method is other_method
    call = torch.compile(layer, backend="eager") if compiled else layer
    shift = layer.bias if bias else 0
    product = x @ layer.weight.T
    for _ in range(2):
        assert_near(call(x), product + shift)
        with drafting():
            assert_near(call(x), -product + shift)
    assert_near(call(x), product + shift)


@pytest.mark.usefixtures("plain_kernels")
def test_new_weights_are_copied_to_the_same_place():
    layer = linear()
    weights = DraftWeights(nn.Sequential(layer))
    place = layer.draft_codes.data_ptr()
    layer.weight.data.mul_(2)
    weights.refresh()
    assert layer.draft_codes.data_ptr() == place
    assert torch.equal(layer.draft_codes, layer.weight)


@pytest.mark.parametrize("name", ["reload_weights", "finish_weight_update"])
def test_the_worker_copies_new_weights(name, monkeypatch):
    from vllm_sparse.plugin.speculation import worker

    done = []
    monkeypatch.setattr(
        worker.VllmWorker, name, lambda self: done.append("loaded"), raising=False
    )
    mine = object.__new__(worker.LosslessWorker)
    weights = SimpleNamespace(refresh=lambda: done.append("copied"))
    mine.model_runner = SimpleNamespace(speculator=SimpleNamespace(weights=weights))
    getattr(mine, name)()
    assert done == ["loaded", "copied"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "--dtype bfloat16"),
        ({"supported": False}, "8.9 or newer"),
        ({"offloaded": 4.0}, "--cpu-offload-gb"),
        ({"linear_backend": "flashinfer"}, "--linear-backend"),
        ({"invariant": True}, "VLLM_BATCH_INVARIANT"),
    ],
    ids=str,
)
def test_what_copies_cannot_be_had_with(changes, said, monkeypatch):
    from vllm import envs
    from vllm.model_executor.layers.quantization.utils import w8a8_utils

    from vllm_sparse.plugin.speculation import refusals

    is_supported = changes.get("supported", True)
    monkeypatch.setattr(w8a8_utils, "cutlass_fp8_supported", lambda: is_supported)
    monkeypatch.setattr(refusals, "_on_cpu", lambda: False)
    monkeypatch.setattr(
        envs, "VLLM_BATCH_INVARIANT", changes.get("invariant", False), raising=False
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=changes.get("dtype", torch.bfloat16)),
        kernel_config=SimpleNamespace(
            linear_backend=changes.get("linear_backend", "auto")
        ),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=changes.get("offloaded", 0)),
            prefetch=SimpleNamespace(offload_group_size=0),
        ),
    )
    found = list(refusals._refusals_of_fp8(config))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


@pytest.mark.usefixtures("plain_kernels")
def test_a_model_without_weights_to_copy_is_refused():
    with pytest.raises(SparseConfigError, match="draft_weights"):
        DraftWeights(nn.Sequential(linear(dtype=torch.float32)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(960, 1536), (3072, 576), (48, 80)])
def test_products_with_copies_are_those_of_fp8(rows, columns, dtype):
    """Weights and activations are rounded: 4 % from the product without."""
    generator = torch.Generator("cuda").manual_seed(rows)
    new = dict(device="cuda", dtype=dtype, generator=generator)
    weight = torch.randn(rows, columns, **new) * torch.rand(rows, 1, **new) * 0.2
    codes, scales = draft_weights._copy(weight)

    def fp8(rows):
        largest = rows.float().abs().amax(1, keepdim=True).clamp(min=1e-9) / 448
        return (rows.float() / largest).to(torch.float8_e4m3fn).float() * largest

    bias = torch.randn(rows, **new)
    for batch in (1, 5, 24, 200):
        x = torch.randn(batch, columns, **new)
        arguments = x, weight, codes, scales, bias
        exact = x.float() @ weight.float().T
        own = draft_weights._draft_linear(*arguments).float() - bias.float()
        assert (own - exact).norm() < 0.01 * exact.norm()
        with drafting():
            got = draft_weights._draft_linear(*arguments).float() - bias.float()
        wanted = fp8(x) @ fp8(weight).T
        # Values of 16 bits often lie half-way between two of 8.
        assert (got - wanted).norm() < 0.025 * wanted.norm()
        assert 0.01 < (got - exact).norm() / exact.norm() < 0.06

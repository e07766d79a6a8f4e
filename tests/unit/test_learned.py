# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Checkpoints are checked before an engine loads anything."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from scripts.get_model import CHECKPOINTS, get_model  # noqa: E402
from tests.e2e.tiny import save_llama  # noqa: E402
from vllm_sparse import checkpoint  # noqa: E402
from vllm_sparse.config import (  # noqa: E402
    BACKEND_DEFAULTS,
    SparseConfig,
    SparseConfigError,
)
from vllm_sparse.methods.less import (  # noqa: E402
    KIND,
    described,
    load_kernels,
    tensor_shapes,
)
from vllm_sparse.plugin import learned  # noqa: E402

NAME = "someone/model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def made(folder, tmp_path):
    config = described(AutoConfig.from_pretrained(folder), 8, 128, 256)
    tensors = {n: torch.zeros(s) for n, s in tensor_shapes(config).items()}

    def save(block: int = 128, **other: torch.Tensor) -> SparseConfig:
        out, here = tmp_path / "checkpoint", config | {"block": block}
        checkpoint.save(out, KIND, tensors | other, folder, here, {}, "")
        given = dict(selector="less", checkpoint=str(out), local_window=256)
        return SparseConfig(**given, sink_tokens=128)

    return save


def engine(folder, name: str):
    """What is asked of vLLM's configuration."""
    text = AutoConfig.from_pretrained(folder)
    model = SimpleNamespace(model=name, revision=None, hf_text_config=text)
    load = SimpleNamespace(download_dir=None)
    return SimpleNamespace(model_config=model, load_config=load)


@pytest.mark.parametrize("hub", [False, True])
def test_shapes_are_checked_wherever_the_model_comes_from(folder, made, hub):
    vllm_config = engine(folder, NAME if hub else str(folder))
    learned.check_checkpoint(made(), vllm_config)
    wrong = made(**{"layers.0.q1": torch.zeros(1, 2, 3)})
    with pytest.raises(SparseConfigError, match=r"layers\.0\.q1 has shape \(1, 2, 3\)"):
        learned.check_checkpoint(wrong, vllm_config)


def test_windows_of_tokens_are_not_served(folder, made):
    with pytest.raises(SparseConfigError, match="made for block 1, not 128"):
        learned.check_checkpoint(made(block=1), engine(folder, str(folder)))


def test_shipped_features_are_served_by_the_defaults():
    base, made = get_model(), CHECKPOINTS / "smollm2-135m-less"
    options = {"sparse": {"checkpoint": str(made)}}
    config = SparseConfig.from_additional_config(options, BACKEND_DEFAULTS["LESS"])
    learned.check_checkpoint(config, engine(base, str(base)))
    for layer in load_kernels(str(made)):
        psi = layer.psi(torch.ones(3, 5, 64))
        assert psi.isfinite().all() and (psi.sum(-1) > 0).all()


def test_downloaded_weights_are_checked(folder, made, tmp_path, monkeypatch):
    """Those of the hub, if an earlier start has brought all of them."""
    other = save_llama(tmp_path / "other", vocabulary=600)
    asked = []

    def cached(name, file, cache_dir, revision):
        asked.append((name, file))
        return str(other / file)

    monkeypatch.setattr(learned, "try_to_load_from_cache", cached)
    vllm_config = engine(folder, NAME)
    with pytest.raises(SparseConfigError, match="has other weights"):
        learned.check_checkpoint(made(), vllm_config)
    assert asked == [(NAME, "config.json")]
    # Half of a download says nothing.
    parts = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(parts))
    learned.check_checkpoint(made(), vllm_config)

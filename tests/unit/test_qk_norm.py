# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Models that norm queries and keys are told from others, and warned of at start."""

import pytest

pytest.importorskip("vllm")

from tests.e2e.families import save_config  # noqa: E402
from vllm_sparse.config import SparseConfig  # noqa: E402
from vllm_sparse.plugin import served  # noqa: E402
from vllm_sparse.tools.doctor.model import inspect_model  # noqa: E402

LENGTH = dict(max_model_len=1024)


@pytest.fixture
def warnings(monkeypatch, tmp_path):
    """What is said at start of a family in miniature, of QK-norm."""

    def of(family: str, backend: str = "sparq", **options) -> list[str]:
        said: list[str] = []
        monkeypatch.setattr(served.logger, "warning", lambda s, *a: said.append(s % a))
        folder = str(save_config(family, tmp_path / family))
        model = inspect_model(folder, backend, SparseConfig(**options), **LENGTH)
        assert model.refusal is None
        return [line for line in said if "QK-norm" in line]

    return of


@pytest.mark.parametrize(
    ("family", "layers"),
    [("Qwen3", "4 of 4"), ("Gemma 3", "2 of 2"), ("OLMo 2", "4 of 4")],
)
def test_fixed_budgets_where_keys_are_normed_are_a_warning(warnings, family, layers):
    (line,) = warnings(family)
    assert line.startswith(f"{layers} sparse layers norm")
    assert "--attention-backend twilight" in line and "calibrate" in line


def test_other_models_are_none(warnings):
    assert not warnings("Llama")
    assert not warnings("Qwen2")


def test_choices_that_lose_nothing_are_none(warnings):
    assert not warnings("Qwen3", "twilight", top_p=0.9)
    assert not warnings("Qwen3", rank=64)
    assert not warnings("Qwen3", top_k=1.0)
    assert not warnings("Qwen3", selector="dense")
    (line,) = warnings("Qwen3", dense_layers=1)
    assert line.startswith("3 of 3")

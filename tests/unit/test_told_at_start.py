# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What engines say at their start: of budgets where a model norms queries and keys, and
of formats that cost more than they seem to."""

import re

import pytest

pytest.importorskip("vllm")

from tests.e2e.families import save_config  # noqa: E402
from vllm_sparse.plugin import served  # noqa: E402
from vllm_sparse.tools.doctor.model import inspect_model, parse_config  # noqa: E402

LENGTH = dict(max_model_len=1024)


@pytest.fixture
def start(monkeypatch, tmp_path):
    """A family in miniature, and what is said of QK-norm at its start (or of what
    ``about`` names)."""

    def of(family: str, backend="sparq", level="warning", about="QK-norm", **options):
        said: list[str] = []
        monkeypatch.setattr(served.logger, level, lambda s, *a: said.append(s % a))
        folder = str(save_config(family, tmp_path / family))
        config = parse_config(backend, {"sparse": options})
        model = inspect_model(folder, backend, config, **LENGTH)
        assert model.refusal is None
        return model, [line for line in said if about in line]

    return of


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("Qwen3", "4 of 4"),
        ("Gemma 3", "2 of 2"),
        ("OLMo 2", "4 of 4"),
        ("MiniMax-M2", "4 of 4"),
    ],
)
def test_budgets_adapt_where_keys_are_normed(start, family, layers):
    model, (line,) = start(family)
    assert line.startswith(f"{layers} sparse layers norm")
    assert model.about_norms == line
    assert "budgets adapt (top_p 0.9)" in line and "sparse.top_k fixes" in line
    channels = int(re.search(r"sparse.rank = (\d+)", line)[1])
    assert not start(family, rank=channels)[1]
    assert start(family, rank=channels - 1)[1] == [line]


@pytest.mark.parametrize("options", [{"top_k": 0.125}, {"top_k": 64}])
def test_fixed_budgets_that_were_asked_for_are_a_warning(start, options):
    model, (line,) = start("Qwen3", **options)
    assert model.about_norms == line
    assert line.startswith("4 of 4 sparse layers norm")
    assert "have a fixed budget" in line and "calibrate" in line


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Llama 4"])
def test_other_models_keep_fixed_budgets(start, family):
    """Llama 4 norms in its chunked layers alone, which choose nothing."""
    model, said = start(family)
    assert not said and model.about_norms is None


def test_choices_that_lose_nothing_are_not_worth_a_line(start):
    for backend, options in (
        ("twilight", {}),
        ("sparq", {"top_p": 0.9}),
        ("sparq", {"rank": 64}),
        ("sparq", {"top_k": 1.0}),
        ("sparq", {"selector": "dense"}),
        ("streaming", {}),
    ):
        assert not start("Qwen3", backend, **options)[1], (backend, options)
    _, (line,) = start("Qwen3", dense_layers=1)
    assert line.startswith("3 of 3")


def test_the_options_of_the_log_are_those_that_run(start):
    told = dict(level="info", about="Sparse attention: ")
    _, (line,) = start("Qwen3", **told)
    assert line.startswith("Sparse attention: SparseConfig(selector='sparq', rank=")
    assert "top_p=0.9," in line and "kernels: " in line and "prefill: " in line
    for family, options in (("Llama", {}), ("Qwen3", {"top_k": 0.125})):
        _, (line,) = start(family, **told, **options)
        assert "top_k=0.125, top_p=None," in line


@pytest.mark.parametrize(
    ("kv_format", "most"), [("int8", "25.0 %"), ("int4", "12.5 %"), ("k4v8", "12.5 %")]
)
def test_formats_of_which_all_keys_are_read_say_what_that_costs(start, kv_format, most):
    told = dict(level="info", about="keeps K by channel")
    _, (line,) = start("Llama", **told, kv_format=kv_format)
    assert f"kv_format = '{kv_format}'" in line and most in line and "k8v4" in line
    dense = {"kv_format": kv_format, "selector": "dense"}
    for options in (dense, {"kv_format": "k8v4"}, {}):
        assert not start("Llama", **told, **options)[1]

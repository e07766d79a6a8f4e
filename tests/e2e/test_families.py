# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Families of models in few blocks of a poisoned cache: stock vLLM's tokens.

Some run always, all with ``-m slow`` (docs/compatibility.md has the table).
"""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_cache_interface import KVQuantMode  # noqa: E402
from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # noqa: E402

from vllm_sparse.layer.impl import SparseAttentionImpl  # noqa: E402
from vllm_sparse.plugin import (
    backend,  # noqa: E402
    zeroing,  # noqa: E402
)
from vllm_sparse.tools.doctor.model import inspect_model, parse_config  # noqa: E402

from .engines import COLD, tokens  # noqa: E402
from .families import FAMILIES, save_config  # noqa: E402
from .family_runs import (  # noqa: E402
    FULL,
    NO_FORMAT,
    REFUSED,
    alone,
    assert_same,
    family,
    layers,
    needs_clearing,
    passes,
    poison,
    sparse_share,
    together,
)

pytestmark = pytest.mark.engine
SERVED = [name for name in FAMILIES if name not in REFUSED]
# A block of several kernel blocks beside states; windows; chunks; cross-attention;
# sinks.
ALWAYS = ("Falcon-H1", "Gemma 3, 8 KV heads", "Llama 4", "Whisper", "gpt-oss")
QUANTISED = {"kv_format": "k8v4", "top_k": 0.25, "dense_below": 64}


def some_always(names, always):
    marks = {name: () if name in always else pytest.mark.slow for name in names}
    return [pytest.param(name, marks=marks[name]) for name in names]


@pytest.mark.parametrize("name", some_always(SERVED, ALWAYS))
def test_a_full_budget_gives_stock_vllms_tokens(name):
    """Alone, three at a time, and from the prefix cache."""
    with family(name, None) as llm:
        expected = passes(llm, name)
    assert len(set(map(tuple, tokens(expected["alone"])))) == 8
    with family(name, FULL) as llm:
        poison(llm)
        got = passes(llm, name)
    for kind, outputs in expected.items():
        assert_same(name, got[kind], outputs)


def assert_same_in_company(name: str, llm, least_sparse: float) -> None:
    """Sparse answers have no reference but the same requests alone."""
    poison(llm)
    got = passes(llm, name)
    assert sparse_share(llm) > least_sparse
    if name == "LFM2":  # stock vLLM's answers depend on company there, too
        return
    for outputs in got.values():
        assert_same(name, outputs, got["alone"])


@pytest.mark.parametrize(
    "name",
    some_always([n for n in SERVED if n not in NO_FORMAT], ("Gemma 3", "Nemotron-H")),
)
def test_quantised_blocks_are_the_same_in_company(name):
    with family(name, QUANTISED) as llm:
        assert_same_in_company(name, llm, 0.3)


SPARSE = {
    "sparq": {"top_k": 0.25, "dense_below": 64},
    "twilight": {"top_p": 0.8, "min_tokens": 32, "dense_below": 64},
}


@pytest.mark.parametrize("backend", SPARSE)
@pytest.mark.parametrize("name", some_always(SERVED, ("gpt-oss",)))
def test_sparse_answers_are_the_same_in_company(name, backend):
    with family(name, SPARSE[backend], attention_backend=backend) as llm:
        assert_same_in_company(name, llm, 0.1)


def test_vllms_own_clearing_fails_here(monkeypatch):
    """The control: were it right, our replacement could go."""
    name = "Nemotron-H"
    with family(name, FULL) as llm:
        expected = alone(llm, name)
        assert together(llm, name, **COLD) == expected
    monkeypatch.setattr(zeroing, "install", lambda: None)
    monkeypatch.setattr(CPUModelRunner, "_zero_block_ids", zeroing.vllms)
    with family(name, FULL) as llm:
        assert together(llm, name, **COLD) != expected


def test_blocks_without_a_mode_of_ours_are_not_cleared(monkeypatch):
    """The control: layers with windows read what was left in their blocks."""
    name = "Gemma 3, 8 KV heads"
    with family(name, FULL) as llm:
        assert needs_clearing(llm)
        expected = alone(llm, name)
    modes = SimpleNamespace(SPARSE=KVQuantMode.NONE)
    monkeypatch.setattr(backend, "BlockMode", modes)
    with family(name, FULL) as llm:
        assert not needs_clearing(llm)
        poison(llm)
        assert alone(llm, name) != expected


def test_sinks_are_those_of_the_model_now():
    """Answers follow weights that change in place."""
    name = "gpt-oss"
    with family(name, FULL) as llm:
        expected = alone(llm, name)
        impls = [getattr(layer, "impl", None) for layer in layers(llm)]
        sinks = [i.sinks for i in impls if isinstance(i, SparseAttentionImpl)]
        for parameter in sinks:
            parameter.data.add_(3)
        assert alone(llm, name) != expected
        for parameter in sinks:
            parameter.data.sub_(3)
        assert alone(llm, name) == expected


def test_a_spawned_engine_clears_whole_blocks_too():
    name = "Nemotron-H"
    with family(name, FULL) as llm:
        expected = alone(llm, name)
    with family(
        name,
        FULL,
        in_process=False,
        # Its module brings the way of loading into the worker.
        worker_extension_cls="tests.e2e.families.InWorker",
    ) as llm:
        assert together(llm, name) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_engine_and_doctor_alike(name, tmp_path):
    with pytest.raises((ValueError, NotImplementedError)) as error, family(name, FULL):
        pass
    assert "leave --attention-backend out" in str(error.value)
    model = inspect_model(
        str(save_config(name, tmp_path)), "sparq", parse_config("sparq", {})
    )
    assert model.refusal == str(error.value)


@pytest.mark.parametrize("name", some_always(SERVED, ("Llama 4", "Falcon-H1")))
def test_the_doctor_sees_what_the_engine_serves(name, tmp_path):
    from vllm_sparse.plugin.served import layer_kinds

    with family(name, FULL) as llm:
        kinds = layer_kinds(llm.llm_engine.vllm_config)
    folder = str(save_config(name, tmp_path))
    model = inspect_model(folder, "sparq", parse_config("sparq", {"sparse": FULL}))
    assert model.refusal is None
    found = {(m.kind, m.ours, m.dense, m.head_size): m.count for m in model.layers}
    assert found == {
        (k.kind, k.ours, k.dense, k.head_size): n for k, n in kinds.items()
    }


PER_KIND = {"backend_per_kind": {"full_attention": "sparq"}}


@pytest.mark.parametrize("attention", [None, PER_KIND], ids=["backend", "per_kind"])
def test_a_second_engine_of_a_process_is_refused_like_the_first(attention):
    """vLLM remembers which backend serves a layer, but not for which options."""
    options = {} if attention is None else dict(attention_config=attention)
    if attention is not None:
        options["attention_backend"] = None
    with family("Llama 4", FULL, **options) as llm:
        assert sparse_share(llm) == 0
    with (
        pytest.raises(ValueError, match="kv_format = 'k8v4' does not serve models wi"),
        family("Llama 4", QUANTISED, **options),
    ):
        pass
    with (
        pytest.raises(ValueError, match="serves 0 of 4 attention layers"),
        family("Mistral, all windows", FULL, **options),
    ):
        pass


def test_windows_are_served_where_only_full_layers_are_ours():
    name = "Gemma 3"
    with family(name, FULL) as llm:
        expected = alone(llm, name)
    with family(name, FULL, attention_backend=None, attention_config=PER_KIND) as llm:
        poison(llm)
        assert together(llm, name, **COLD) == expected

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Options: what is accepted, what is refused, and what the refusal says."""

import json
import re
from dataclasses import fields, replace

import pytest

from vllm_sparse.config import (
    BACKEND_DEFAULTS,
    DENSE_BELOW,
    EVICTING,
    SparseConfig,
    SparseConfigError,
)
from vllm_sparse.option_rules import RULES
from vllm_sparse.selectors import SELECTORS

NAN = float("nan")
INF = float("inf")

ACCEPTED = {
    "prefill": ["exact"],
    "checkpoint": ["some/folder"],
    # What evicts needs other sinks and another window than these defaults.
    "selector": [name for name in SELECTORS if name not in EVICTING],
    "rank": [None, 1, 16, 256],
    "top_k": [36, 37, 4096, 1.0, 0.5, 1e-6, "auto"],
    "top_p": [None, 0.5, 0.95, 0.999],
    "min_tokens": [0, 1, 128, 5000],
    "max_tokens": [1, 36, 4096, 1.0, 0.25],
    "local_window": [1, 32, 128],
    "sink_tokens": [0, 4, 100],
    "dense_layers": [0, 2, 1000],
    "dense_below": [0, 1, 10**9, "auto"],
    "mean_value": [True, False, "auto"],
    "kv_format": ["auto", "int8", "int4", "k4v8", "k8v4"],
    "kv_group_size": [None, 16, 128],
    "lossless": [True, False],
    "draft_tokens": [1, 4, 16],
    "draft_adapt": [True, False],
    "draft_above": [0, 8192, "auto"],
    "draft_sample_method": ["probabilistic", "greedy"],
    "draft_weights": ["target", "fp8"],
    "kernels": ["auto", "cuda", "triton", "cpu"],
}
REFUSED = {
    "checkpoint": ["", 1, ["a"]],
    "prefill": ["", None, "Exact", 1],
    "selector": ["", "Sparq", "spark", None, 1, ["sparq"]],
    "rank": [0, -1, 16.0, "16", True, False, [16]],
    "top_k": [
        10**30,
        0,
        -1,
        0.0,
        -0.25,
        1.0000001,
        2.0,
        NAN,
        INF,
        "0.25",
        None,
        True,
        False,
    ],
    "top_p": [0.0, 1.0, -0.5, 1.5, 1, 0, NAN, INF, "0.95", True, False],
    "min_tokens": [2**25, -1, 128.0, "128", None, True],
    "max_tokens": [0, -1, 0.0, -0.25, 2.0, NAN, INF, "0.25", None, True, False],
    "local_window": [2**31, 0, -1, 32.0, "32", None, True],
    "sink_tokens": [2**40, -1, 4.0, "4", None, True, False],
    "dense_layers": [10**4, -1, 2.0, "2", None, True],
    "dense_below": [2**31, -1, 512.0, "512", None, True],
    "mean_value": [0, 1, None, "on", "true", "AUTO"],
    "kv_format": ["", "fp8", "int2", 4, None, ["int4"]],
    "kv_group_size": [0, -32, 32.0, "32", True],
    "lossless": [0, 1, None, "true"],
    "draft_tokens": [0, 17, -1, 4.0, "4", None, True],
    "draft_adapt": [0, 1, None, "auto"],
    "draft_above": [2**25, -1, 512.0, "512", None, True],
    "draft_sample_method": ["", "Greedy", None, True],
    "draft_weights": ["", "int4", None, True],
    "kernels": ["", "Auto", "gpu", None, 1, True, ["cuda"]],
}
COUNT_OR_SHARE = (
    "an integer from 1 to 16777216 (tokens) or a fraction of the context in (0, 1]"
)
ALLOWED = {
    "prefill": "one of exact, streaming",
    "checkpoint": "a folder",
    "selector": f"one of {', '.join(SELECTORS)}",
    "rank": "an integer from 1 to the head size",
    "top_k": f'{COUNT_OR_SHARE}, or "auto"',
    "top_p": "a share of the attention mass in (0, 1)",
    "min_tokens": "an integer from 0 to 16777216",
    "max_tokens": COUNT_OR_SHARE,
    "local_window": "an integer from 1 to 16777216",
    "sink_tokens": "an integer from 0 to 16777216",
    "dense_layers": "an integer from 0 to 4096",
    "dense_below": 'an integer from 0 to 2147483647, or "auto"',
    "mean_value": 'true, false or "auto"',
    "kv_format": "one of auto, int8, int4, k4v8, k8v4",
    "kv_group_size": "a number of channels, such as 16, 32 or 64",
    "lossless": "true or false",
    "draft_tokens": "an integer from 1 to 16",
    "draft_adapt": "true or false",
    "draft_above": 'an integer from 0 to 16777216, or "auto"',
    "draft_sample_method": "one of probabilistic, greedy",
    "draft_weights": "one of target, fp8",
    "kernels": "one of auto, cuda, triton, cpu",
}


def cases(table):
    return [
        pytest.param(name, value, id=f"{name}={value!r}")
        for name, values in table.items()
        for value in values
    ]


def parse(**options) -> SparseConfig:
    return SparseConfig.from_additional_config({"sparse": options})


def needed_by(name: str) -> dict:
    """Without these, the option is refused for having no meaning."""
    if name == "kv_group_size":
        return {"kv_format": "int4"}
    if name == "checkpoint":
        return {"selector": "less", "sink_tokens": 128, "local_window": 128}
    if name.startswith("draft_"):
        return {"lossless": True}
    return {"top_p": 0.9} if name in ("min_tokens", "max_tokens") else {}


def example_in(message: str) -> tuple[str, object]:
    """The (option, value) that an error message proposes."""
    name, text = re.search(
        r"--additional-config\.sparse\.(\w+) (\S+)", message
    ).groups()
    try:
        return name, json.loads(text)
    except json.JSONDecodeError:
        return name, text


def test_every_option_has_a_rule_and_is_tested():
    names = {field.name for field in fields(SparseConfig)}
    assert names == set(RULES) == set(ACCEPTED) == set(REFUSED) == set(ALLOWED)


def test_defaults_obey_their_own_rules():
    assert parse() == SparseConfig()
    for field in fields(SparseConfig):
        assert parse(**{field.name: field.default}) == SparseConfig()


@pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
def test_accepted(name, value):
    options = needed_by(name) | {name: value}
    if name == "max_tokens" and value in (1, 36):
        options |= dict(min_tokens=0, local_window=1, sink_tokens=0)
    assert parse(**options) == replace(SparseConfig(), **options)


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_refused_naming_key_value_range_and_a_working_example(name, value):
    with pytest.raises(SparseConfigError) as error:
        parse(**{name: value})
    message = str(error.value)
    assert message.startswith(f"sparse.{name} = {value!r} is not allowed")
    assert ALLOWED[name] in message
    key, example = example_in(message)
    assert key == name
    assert getattr(parse(**needed_by(name), **{name: example}), name) == example


def test_a_budget_is_fixed_or_adaptive_but_not_both():
    for bound in (dict(max_tokens=300), dict(min_tokens=300)):
        with pytest.raises(SparseConfigError, match="set sparse.top_p beside it, also"):
            parse(**bound)
    with pytest.raises(SparseConfigError, match="leave top_k out") as error:
        parse(top_p=0.9, top_k=100)
    key, example = example_in(str(error.value))
    assert getattr(parse(top_p=0.9, **{key: example}), key) == example


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(max_tokens=30), "max_tokens = 30 is smaller than local_window"),
        (dict(max_tokens=100), "max_tokens = 100 is smaller than sparse.min_tokens"),
        (dict(selector="window"), "top_p needs an estimate of attention"),
        (dict(selector="dense"), "top_p needs an estimate of attention"),
    ],
)
def test_adaptive_budgets_that_make_no_sense(options, said):
    with pytest.raises(SparseConfigError, match=said) as error:
        parse(top_p=0.9, **options)
    key, example = example_in(str(error.value))
    parse(top_p=0.9, **(options | {key: example}))


def test_a_backend_may_have_defaults_of_its_own():
    given = SparseConfig.from_additional_config
    assert given({}, BACKEND_DEFAULTS["TWILIGHT"]).top_p == 0.9
    assert given(None, BACKEND_DEFAULTS["TWILIGHT"]).top_p == 0.9
    options = {"sparse": {"top_p": 0.8}}
    assert given(options, BACKEND_DEFAULTS["TWILIGHT"]).top_p == 0.8
    with pytest.raises(SparseConfigError, match="leave top_k out"):
        given({"sparse": {"top_k": 512}}, BACKEND_DEFAULTS["TWILIGHT"])
    assert given({}, BACKEND_DEFAULTS["SPARQ"]) == SparseConfig()


def test_options_are_value_errors_for_callers_that_know_nothing_of_us():
    with pytest.raises(ValueError, match=r"sparse\.rank"):
        parse(rank=0)


@pytest.mark.parametrize(
    ("key", "meant"),
    [("topk", "top_k"), ("ranks", "rank"), ("sink_token", "sink_tokens")],
)
def test_unknown_key_gets_a_suggestion_and_the_list(key, meant):
    with pytest.raises(SparseConfigError) as error:
        parse(**{key: 1})
    message = str(error.value)
    assert f"unknown option sparse.{key}. Did you mean {meant!r}?" in message
    for field in fields(SparseConfig):
        assert field.name in message


def test_unknown_key_like_nothing_gets_the_list_alone():
    with pytest.raises(SparseConfigError, match="unknown option sparse.zzz") as error:
        parse(zzz=1)
    assert "Did you mean" not in str(error.value)
    assert "top_k" in str(error.value)


def test_a_key_that_is_no_string_is_an_unknown_option():
    with pytest.raises(SparseConfigError, match="unknown option sparse.3"):
        SparseConfig.from_additional_config({"sparse": {3: 1}})


@pytest.mark.parametrize("options", [None, 0.125, "top_k", ["top_k", 1]], ids=repr)
def test_namespace_that_is_no_mapping(options):
    with pytest.raises(SparseConfigError) as error:
        SparseConfig.from_additional_config({"sparse": options})
    message = str(error.value)
    assert f"must be a mapping of options, got {options!r}" in message
    example = re.search(r"--additional-config '(.*)'", message).group(1)
    assert SparseConfig.from_additional_config(json.loads(example)).kv_format == "k8v4"


@pytest.mark.parametrize(
    "additional_config",
    [
        None,
        {},
        {"other": {"top_k": -1, "mine": 1}},
        {"topology": 3, "sparsity_plugin": {"rank": 1, "world": 2}},
        object(),
    ],
    ids=["none", "empty", "other", "others' keys", "no-mapping"],
)
def test_what_is_not_in_our_namespace_is_ignored(additional_config):
    assert SparseConfig.from_additional_config(additional_config) == SparseConfig()


@pytest.mark.parametrize(
    ("additional_config", "meant"),
    [
        ({"sparq": {"rank": 16}}, {"rank": 16}),
        ({"Sparse": {"top_k": 64}}, {"top_k": 64}),
        ({"spase": {"top_k": 64}}, {"top_k": 64}),
        ({"sparse_attention": {"top_k": 64}}, {"top_k": 64}),
        ({"sparse.top_k": 64}, {"top_k": 64}),
        ({"twilight": {}}, {}),
        ({"vllm-sparse": {}}, {}),
        ({"top_k": 0.1}, {"top_k": 0.1}),
        ({"options": {"top_k": 64, "rank": 8}}, {"top_k": 64, "rank": 8}),
        ({"additional_config": {"sparse": {"rank": 8}}}, {"rank": 8}),
        ({"sparse": {"top_k": 64}, "rank": 16}, {"rank": 16}),
    ],
    ids=str,
)
def test_options_that_land_beside_our_namespace_are_an_error(additional_config, meant):
    with pytest.raises(SparseConfigError, match="beside 'sparse'") as error:
        SparseConfig.from_additional_config(additional_config)
    shown = re.search(r"--additional-config '(.*)'$", str(error.value))[1]
    assert json.loads(shown) == {"sparse": meant}


def test_adaptive_budgets_need_a_selector_that_estimates():
    """The user never wrote top_p: the message is about what they wrote."""
    with pytest.raises(SparseConfigError, match="--attention-backend twilight") as e:
        SparseConfig.from_additional_config(
            {"sparse": {"selector": "dense"}}, {"top_p": 0.9}
        )
    assert "choose --attention-backend sparq" in str(e.value)
    assert "sparse.top_p" not in str(e.value)


@pytest.mark.parametrize(
    ("backend", "selector"),
    [
        ("SPARQ", "anchor"),
        ("STREAMING", "anchor"),
        ("ANCHOR", "sparq"),
        ("ANCHOR", "dense"),
    ],
)
def test_anchors_and_their_backend_belong_together(backend, selector):
    with pytest.raises(
        SparseConfigError, match="belongs to --attention-backend anchor"
    ):
        SparseConfig.from_additional_config(
            {"sparse": {"selector": selector}}, BACKEND_DEFAULTS[backend]
        )


def test_other_namespaces_beside_ours_are_ignored():
    config = SparseConfig.from_additional_config(
        {"other": {"top_k": -1, "mine": 1}, "sparse": {"rank": 8}}
    )
    assert config == replace(SparseConfig(), rank=8)


@pytest.mark.parametrize(
    ("top_k", "local_window", "sink_tokens"),
    [(35, 32, 4), (1, 1, 1), (999, 999, 1), (127, 28, 100)],
)
def test_count_below_the_tokens_that_are_always_attended(
    top_k, local_window, sink_tokens
):
    rest = dict(local_window=local_window, sink_tokens=sink_tokens)
    with pytest.raises(SparseConfigError) as error:
        parse(top_k=top_k, **rest)
    message = str(error.value)
    assert f"sparse.top_k = {top_k} is smaller" in message
    assert f"local_window + sink_tokens = {local_window + sink_tokens}" in message
    key, example = example_in(message)
    assert key == "top_k"
    assert parse(top_k=example, **rest).top_k == example
    assert parse(top_k=local_window + sink_tokens, **rest)


@pytest.mark.parametrize(
    ("head_size", "rank"), [(64, 24), (80, 30), (96, 36), (128, 48), (256, 96)]
)
def test_resolve_fills_in_three_eighths_of_the_head_size(head_size, rank):
    assert parse().resolve(head_size, 4).rank == rank
    assert parse(rank=7).resolve(head_size, 4).rank == 7
    assert parse(rank=head_size).resolve(head_size, 4).rank == head_size


def test_resolve_refuses_a_rank_beyond_the_head_size():
    config = parse(rank=65)
    assert config.resolve(128, 1).rank == 65
    with pytest.raises(SparseConfigError) as error:
        config.resolve(64, 1)
    message = str(error.value)
    assert "sparse.rank = 65 exceeds the model's head size 64" in message
    assert "between 1 and 64" in message
    key, example = example_in(message)
    assert key == "rank"
    assert parse(rank=example).resolve(64, 1).rank == example


@pytest.mark.parametrize(
    ("option", "num_queries_per_kv", "on"),
    [
        ("auto", 1, True),
        ("auto", 2, False),
        ("auto", 8, False),
        (True, 8, True),
        (False, 1, False),
    ],
)
def test_resolve_mean_value(option, num_queries_per_kv, on):
    assert parse(mean_value=option).resolve(64, num_queries_per_kv).mean_value is on


def test_resolve_changes_nothing_else_and_can_be_repeated():
    config = parse(top_k=99, local_window=5, sink_tokens=1, dense_layers=2)
    once = config.resolve(64, 1)
    assert once == replace(config, rank=24, mean_value=True, dense_below=512)
    assert once.resolve(64, 1) == once
    assert config.rank is None


def test_budgets_adapt_where_keys_are_normed_and_nothing_is_said():
    normed = lambda **options: parse(**options).resolve(64, 4, normed=True)
    for options in (
        {},
        {"top_k": "auto"},
        {"kv_format": "k8v4"},
        {"dense_below": 0},
        {"rank": 24},
        {"rank": 63},
    ):
        assert normed(**options).top_p == 0.9, options
        assert parse(**options).resolve(64, 4).top_p is None
        assert parse(**options).resolve(64, 4).top_k == 0.125
    for options in (
        {"top_k": 0.125},
        {"top_k": 512},
        {"rank": 64},  # all channels: nothing is guessed
        {"lossless": True},
        {"selector": "exact"},
        {"selector": "quest"},
        {"selector": "window"},
        {"selector": "dense"},
    ):
        got = normed(**options)
        assert got.top_p is None, options
        assert got.top_k == options.get("top_k", 0.125)
    assert normed(top_p=0.8).top_p == normed(top_p=0.8, rank=8).top_p == 0.8
    assert normed().resolve(64, 4) == normed()


def test_contexts_are_dense_below_what_was_measured_for_the_device():
    for device, below in DENSE_BELOW.items():
        assert parse().resolve(64, 1, device).dense_below == below
        assert parse(dense_below=7).resolve(64, 1, device).dense_below == 7


def test_k_by_channel_alone_is_dense_up_to_longer_contexts_on_gpus():
    for name, below in (("int4", 49152), ("int8", 49152), ("k8v4", 6144)):
        assert parse(kv_format=name).resolve(64, 1, "cuda").dense_below == below
        assert parse(kv_format=name).resolve(64, 1, "cpu").dense_below == 512


def test_streaming_has_options_of_its_own():
    defaults = BACKEND_DEFAULTS["STREAMING"]
    parsed = SparseConfig.from_additional_config(
        {"sparse": {"prefill": "streaming", "local_window": 256}}, defaults
    )
    assert (parsed.sink_tokens, parsed.local_window) == (128, 256)
    with pytest.raises(SparseConfigError, match="choose --attention-backend streaming"):
        parse(prefill="streaming")
    for options, message in (
        ({"sink_tokens": 4}, "sink_tokens = 4 must be a multiple of 128, as"),
        ({"local_window": 0 + 64}, "must be a multiple of 128 above 0, as"),
        ({"dense_below": 0}, "dense_below = 0 does nothing where"),
        ({"lossless": True}, "lossless = True does nothing where"),
    ):
        with pytest.raises(SparseConfigError, match=message):
            SparseConfig.from_additional_config({"sparse": options}, defaults)

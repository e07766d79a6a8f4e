# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The configuration of lossless engines: what vLLM is given, and what is refused.

Configurations alone: no model is loaded and no engine is started.
"""

import pickle
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_sparse.config import DRAFT_OPTIONS, EVICTING, SparseConfig, SparseConfigError
from vllm_sparse.methods import METHODS, LayerShape, Phase

pytest.importorskip("vllm")

import torch  # noqa: E402
from vllm.config.utils import replace as vllms_replace  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.utils.import_utils import resolve_obj_by_qualname  # noqa: E402

from vllm_sparse import plugin  # noqa: E402
from vllm_sparse.plugin import platform  # noqa: E402
from vllm_sparse.plugin.speculation import configure  # noqa: E402
from vllm_sparse.plugin.speculation.refusals import refusals  # noqa: E402

plugin.register()
LOSSLESS = {"sparse": {"lossless": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama's configuration; no weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=512,
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def configured(model):
    """Makes vLLM's configuration of an engine."""

    def make(sparse=None, **changes):
        own = dict(
            model=str(model),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            attention_backend="sparq",
            additional_config={"sparse": {"lossless": True} | (sparse or {})},
        )
        return EngineArgs(**own | changes).create_engine_config()

    return make


def refusal(configured, *args, **changes) -> str:
    with pytest.raises(ValueError) as error:
        configured(*args, **changes)
    return str(error.value)


@pytest.mark.parametrize("backend", ["sparq", "SPARQ", "twilight"])
def test_the_engine_drafts_with_itself(configured, backend):
    config = configured({"draft_tokens": 3}, attention_backend=backend)
    speculation = config.speculative_config
    assert speculation.method == "draft_model" and speculation.uses_draft_model()
    assert speculation.num_speculative_tokens == 3
    assert speculation.draft_sample_method == "probabilistic"
    assert speculation.draft_model_config is config.model_config
    assert speculation.draft_parallel_config is config.parallel_config
    assert config.num_speculative_tokens == 3
    assert configure.is_ours(speculation)


@pytest.mark.parametrize("method", ["probabilistic", "greedy"])
def test_options_of_drafts_reach_vllm(configured, method):
    speculation = configured(
        {"draft_sample_method": method, "draft_adapt": False, "draft_tokens": 16}
    ).speculative_config
    assert speculation.draft_sample_method == method
    assert speculation.num_speculative_tokens == 16
    # Steps of short contexts have graphs, too.
    numbers = [n for *_, n in speculation.num_speculative_tokens_per_batch_size]
    assert numbers == [0, 16]


def test_numbers_of_drafts_end_with_the_most(configured):
    speculation = configured({"draft_tokens": 5}).speculative_config
    assert speculation.uses_dynamic_speculative_decoding()
    numbers = [n for *_, n in speculation.num_speculative_tokens_per_batch_size]
    assert numbers[0] == 0 and numbers[-1] == 5 == max(numbers)
    assert numbers == sorted(set(numbers))


def test_worker_and_scheduler_are_ours(configured):
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the worker of CPUs")
    from vllm.v1.core.sched.interface import SchedulerInterface
    from vllm.v1.worker.cpu_worker import CPUWorker

    config = configured()
    worker = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    assert worker.__module__ == "vllm_sparse.plugin.speculation.worker"
    assert issubclass(worker, CPUWorker)
    scheduler = config.scheduler_config.get_scheduler_cls()
    assert scheduler.__module__ == configure.SCHEDULER
    assert issubclass(scheduler, SchedulerInterface)


@pytest.mark.parametrize(
    "again",
    [
        copy,
        deepcopy,
        replace,
        lambda config: vllms_replace(config, instance_id="x"),
        lambda config: pickle.loads(pickle.dumps(config)),
        lambda config: pickle.loads(pickle.dumps(replace(deepcopy(config)))),
    ],
    ids=["copy", "deepcopy", "replace", "vllms-replace", "pickle", "all"],
)
def test_copies_speculate(configured, again):
    config = configured({"draft_tokens": 3})
    made = again(config)
    speculation = made.speculative_config
    assert configure.is_ours(speculation)
    assert speculation.num_speculative_tokens == 3
    assert speculation.draft_model_config.model == made.model_config.model
    assert made.parallel_config.worker_cls == config.parallel_config.worker_cls
    assert made.scheduler_config.scheduler_cls == config.scheduler_config.scheduler_cls


def test_the_hooks_may_be_called_again(configured):
    config = configured()
    speculation = config.speculative_config
    for _ in range(2):
        configure.add_speculation(config)
        configure.choose_classes(config)
    assert config.speculative_config is speculation


@pytest.mark.parametrize(
    "changes",
    [
        {"additional_config": {}},
        {"additional_config": {"sparse": {"lossless": False, "top_k": 0.25}}},
        {"attention_backend": "twilight", "additional_config": {}},
        # Options of a backend that was not chosen: vLLM keeps them, nobody reads them.
        {"attention_backend": None},
        {"attention_backend": "CPU_ATTN"},
        {
            "additional_config": {},
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 3,
            },
        },
    ],
    ids=["sparq", "false", "twilight", "no-backend", "cpu-attn", "ngram"],
)
def test_nothing_changes_without_lossless(configured, changes, monkeypatch):
    config = configured(**changes)
    assert not configure.is_ours(config.speculative_config)
    assert "vllm_sparse" not in str(config.parallel_config.worker_cls)
    assert config.scheduler_config.scheduler_cls is None
    for name in ("add_speculation", "choose_classes"):
        monkeypatch.setattr(platform, name, lambda config: None)
    without = configured(**changes)
    for part, value in vars(config).items():
        if part != "instance_id":
            assert repr(getattr(without, part)) == repr(value), part
    # The key of vLLM's compilation caches.
    assert without.compute_hash() == config.compute_hash()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 3,
                    "prompt_lookup_max": 3,
                }
            },
            "leave --speculative-config out",
        ),
        ({"pipeline_parallel_size": 2}, "remove --pipeline-parallel-size"),
        ({"data_parallel_size": 2}, "start an engine for each replica"),
        (
            {"prefill_context_parallel_size": 2},
            "remove --prefill-context-parallel-size",
        ),
        ({"enable_dbo": True}, "remove --enable-dbo"),
        ({"runner": "pooling"}, "models that do not generate (pooling)"),
        ({"logits_processors": ["a:b"]}, "remove --logits-processors"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_refused_with_what_to_change(configured, changes, said):
    message = refusal(configured, **changes)
    assert "sparse.lossless cannot serve this engine: " in message
    assert said in message
    assert "Or leave sparse.lossless and the options of drafts out" in message


def test_all_that_is_to_change_is_said_at_once(configured):
    message = refusal(configured, pipeline_parallel_size=2, enable_dbo=True)
    assert "--pipeline-parallel-size" in message and "--enable-dbo" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"worker_cls": "my.Worker"}, "leave --worker-cls out"),
        (
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            "leave --scheduler-cls out",
        ),
    ],
    ids=["worker", "scheduler"],
)
def test_other_classes_are_refused(configured, changes, said):
    assert said in refusal(configured, **changes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"losless": True}, "Did you mean 'lossless'?"),
        ({"draft_token": 3}, "Did you mean 'draft_tokens'?"),
        ({"lossless": 1}, "true or false"),
        ({"lossless": "true"}, "true or false"),
        ({"draft_tokens": 0}, "an integer from 1 to 16"),
        ({"draft_tokens": 17}, "an integer from 1 to 16"),
        ({"draft_tokens": True}, "an integer from 1 to 16"),
        ({"draft_tokens": 4.0}, "an integer from 1 to 16"),
        ({"draft_adapt": 1}, "true or false"),
        ({"draft_adapt": None}, "true or false"),
        ({"draft_above": -1}, 'or "auto"'),
        ({"draft_above": "never"}, 'or "auto"'),
        ({"draft_above": 0.5}, 'or "auto"'),
        ({"draft_sample_method": "gumbel"}, "one of probabilistic, greedy"),
        ({"draft_sample_method": None}, "one of probabilistic, greedy"),
        ({"selector": "dense"}, "leave one of them out"),
    ],
    ids=str,
)
def test_options_that_are_not_allowed(configured, options, said):
    message = refusal(configured, options)
    assert said in message and f"sparse.{next(iter(options))}" in message


@pytest.mark.parametrize(
    "option",
    [
        {"draft_tokens": 3},
        {"draft_adapt": False},
        {"draft_above": 0},
        {"draft_sample_method": "greedy"},
    ],
    ids=str,
)
@pytest.mark.parametrize("spelling", [{}, {"lossless": False}], ids=str)
def test_options_of_drafts_need_lossless(option, spelling):
    (name,) = option
    assert name in DRAFT_OPTIONS
    with pytest.raises(SparseConfigError) as error:
        SparseConfig.from_additional_config({"sparse": spelling | option})
    assert f"sparse.{name} is for lossless speculation" in str(error.value)
    assert "--additional-config.sparse.lossless true" in str(error.value)


# What a model is, beside an engine that could be served.
SERVED = SimpleNamespace(
    runner_type="generate",
    is_encoder_decoder=False,
    is_hybrid=False,
    is_attention_free=False,
    uses_mrope=False,
    logits_processors=None,
    multimodal_config=None,
    enable_prompt_embeds=False,
)


def test_copies_of_weights_are_refused_on_cpus(configured):
    with pytest.raises(ValueError, match="'fp8' is for GPUs"):
        configured({"lossless": True, "draft_weights": "fp8"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"multimodal_config": SimpleNamespace(language_model_only=False)}, "images"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"is_hybrid": True}, "Mamba"),
        ({"is_attention_free": True}, "Mamba"),
        ({"uses_mrope": True}, "M-RoPE"),
    ],
    ids=str,
)
def test_models_that_are_not_served(configured, changes, said):
    config = configured(additional_config={})
    served = SimpleNamespace(**vars(config))
    served.use_v2_model_runner = config.use_v2_model_runner
    served.model_config = SERVED
    assert list(refusals(served, SparseConfig())) == []
    served.model_config = SimpleNamespace(**vars(SERVED) | changes)
    (reason,) = refusals(served, SparseConfig())
    assert said in reason and "not served" in reason


@pytest.mark.parametrize(
    ("name", "architecture", "said"),
    [
        ("WhisperConfig", "WhisperForConditionalGeneration", "encoder-decoder"),
        ("MambaConfig", "MambaForCausalLM", "Mamba"),
        ("Qwen3NextConfig", "Qwen3NextForCausalLM", "linear attention"),
    ],
)
def test_vllms_own_names_of_such_models(configured, tmp_path, name, architecture, said):
    import transformers

    config = getattr(transformers, name)(architectures=[architecture])
    config.save_pretrained(tmp_path)
    message = refusal(configured, model=str(tmp_path))
    assert "sparse.lossless cannot serve this engine: " in message and said in message


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("dense", *EVICTING)])
def test_all_but_drafts_is_dense(name):
    """Whatever chooses the drafts' tokens."""
    options = SparseConfig(selector=name, lossless=True, dense_below=0, top_k=40)
    shape = LayerShape(4, 2, 64, torch.float32)
    method = METHODS[name](options.resolve(64, 2), shape, ops=None)
    for phase in Phase:
        table = method.budgets(phase, 1000)
        assert bool((table == -1).all()) == (phase is not Phase.DRAFT), phase
    plain = replace(options, lossless=False).resolve(64, 2)
    table = METHODS[name](plain, shape, ops=None).budgets(Phase.VERIFY, 1000)
    assert not (table == -1).all()

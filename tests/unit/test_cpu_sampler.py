# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Verifying drafts on the CPU: kernels by their meaning, tokens by their frequencies.

Tests whose names end in ``_fails`` hold vLLM's own to the same: the one that does not
fail any more names what can go from plugin/cpu_sampler.py.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform  # noqa: E402
from vllm.utils import cpu_triton_utils  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.sample import rejection_sampler as vllms_sampler  # noqa: E402
from vllm.v1.sample.logits_processor import LogitsProcessors  # noqa: E402
from vllm.v1.sample.metadata import SamplingMetadata  # noqa: E402
from vllm.v1.sample.ops import topk_topp_sampler  # noqa: E402
from vllm.v1.sample.sampler import Sampler  # noqa: E402
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata  # noqa: E402

from vllm_sparse import plugin  # noqa: E402
from vllm_sparse.plugin import cpu_sampler  # noqa: E402
from vllm_sparse.plugin.platform import SparseCpuPlatform  # noqa: E402

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="the sampler of CPUs"
)
VOCABULARY = 8
DRAFTS = 2


@pytest.fixture(scope="module", autouse=True)
def installed():
    """As at the start of a worker, twice."""
    for _ in range(2):
        cpu_sampler.install()
        current_platform.register_triton_kernel_overrides()


def test_vllm_launches_the_repaired_kernels():
    assert vllms_sampler.expand_kernel._impl is cpu_sampler._expand_kernel_impl
    assert (
        vllms_sampler.rejection_random_sample_kernel._impl
        is cpu_sampler._rejection_random_sample_kernel_impl
    )
    assert len(cpu_sampler.vllms) == 4
    ours = {cpu_sampler.sample_tokens, cpu_sampler.apply_top_k_only}
    assert not ours & set(cpu_sampler.vllms.values())


# One value per request


EXPANDED = [
    pytest.param([0.7, 0.0, 1.3, 0.2], torch.float32, 0, 1, id="temperature"),
    pytest.param([0.9, 0.05, 1.0, 0.5], torch.float32, 0, 0, id="top_p"),
    pytest.param([5, 1, 512, 40], torch.int32, 0, 0, id="top_k"),
    pytest.param([2**40, 3, 0, 7], torch.int64, 3, 4, id="int64"),
]


def expanded(kernel, values, dtype, replace_from, replace_to):
    """What the kernel leaves in poisoned memory, and what should be there."""
    counts = [3, 0, 1, 2]
    output = torch.full((sum(counts),), 77, dtype=dtype)
    kernel(
        output,
        torch.tensor(values, dtype=dtype),
        torch.tensor(counts).cumsum(0, dtype=torch.int32),
        replace_from,
        replace_to,
        128,
    )
    wanted = [replace_to if value == replace_from else value for value in values]
    wanted = [w for w, count in zip(wanted, counts, strict=True) for _ in range(count)]
    return output, torch.tensor(wanted, dtype=dtype)


@pytest.mark.parametrize(("values", "dtype", "old", "new"), EXPANDED)
def test_a_requests_value_goes_to_each_of_its_drafts(values, dtype, old, new):
    kernel = cpu_triton_utils._expand_kernel_impl
    output, wanted = expanded(kernel, values, dtype, old, new)
    assert output.equal(wanted)


@pytest.mark.parametrize(("values", "dtype", "old", "new"), EXPANDED[:3])
def test_vllms_expansion_fails(values, dtype, old, new):
    kernel = cpu_sampler.vllms["_expand_kernel_impl"]
    output, wanted = expanded(kernel, values, dtype, old, new)
    assert (output == 77).all() and not output.equal(wanted)


def test_vllm_expands_through_it():
    expanded = vllms_sampler.expand_batch_to_tokens(
        torch.tensor([0.7, 0.0]), torch.tensor([1, 3], dtype=torch.int32), 3, 0, 1
    )
    assert expanded.tolist() == torch.tensor([0.7, 1, 1]).tolist()


# Drafts that are none


def rejection_inputs(with_draft_probs: bool) -> dict[str, torch.Tensor | None]:
    """60 requests with 0 to 3 drafts, a third of them padding."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(0, 4, (60,), generator=generator)
    total = int(counts.sum())

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    def distributions():
        logits = torch.randn(total, VOCABULARY, generator=generator)
        return logits.softmax(-1)

    drafts = integers(0, VOCABULARY, total)
    drafts[torch.rand(total, generator=generator) < 0.33] = -1
    return dict(
        output_token_ids=torch.full((60, 4), -1, dtype=torch.int32),
        cu_num_draft_tokens=counts.cumsum(0, dtype=torch.int32),
        draft_token_ids=drafts,
        draft_probs=distributions() if with_draft_probs else None,
        target_probs=distributions(),
        bonus_token_ids=integers(100, 200, 60, 1),
        recovered_token_ids=integers(200, 300, total),
        uniform_probs=torch.rand(total, dtype=torch.float64, generator=generator),
        is_greedy=torch.rand(60, generator=generator) < 0.2,
    )


def rejected(inputs: dict) -> torch.Tensor:
    """The meaning of rejection sampling, token by token."""
    output = inputs["output_token_ids"].clone()
    first = 0
    for i, end in enumerate(inputs["cu_num_draft_tokens"].tolist()):
        rows, first = range(first, end), end
        if inputs["is_greedy"][i]:
            continue
        for pos, row in enumerate(rows):
            draft = int(inputs["draft_token_ids"][row])
            accepted = False
            if draft >= 0:
                probs = inputs["draft_probs"]
                q = 1.0 if probs is None else probs[row, draft]
                p = inputs["target_probs"][row, draft]
                accepted = bool(p / q >= inputs["uniform_probs"][row])
            recovered = inputs["recovered_token_ids"][row]
            output[i, pos] = draft if accepted else recovered
            if not accepted:
                break
        else:
            output[i, len(rows)] = inputs["bonus_token_ids"][i, 0]
    return output


def launch(kernel, inputs: dict) -> torch.Tensor:
    output = inputs["output_token_ids"].clone()
    arguments = list(inputs.values())[1:]
    without_probs = inputs["draft_probs"] is None
    kernel(output, *arguments, 3, VOCABULARY, None, without_probs, False)
    return output


@pytest.mark.parametrize("with_draft_probs", [False, True])
def test_padding_is_rejected_and_all_else_is_as_it_was(with_draft_probs):
    inputs = rejection_inputs(with_draft_probs)
    kernel = cpu_triton_utils._rejection_random_sample_kernel_impl
    assert launch(kernel, inputs).equal(rejected(inputs))
    # Without padding, vLLM's own.
    inputs["draft_token_ids"].clamp_(min=0)
    theirs = cpu_sampler.vllms["_rejection_random_sample_kernel_impl"]
    assert launch(theirs, inputs).equal(rejected(inputs))


def padding_after_certainty() -> dict[str, torch.Tensor | None]:
    """One request, one draft, -1; what lies before its row says that it is certain."""
    target = torch.zeros(2, VOCABULARY)
    target[:, -1] = 1
    return dict(
        output_token_ids=torch.full((1, 4), -1, dtype=torch.int32),
        cu_num_draft_tokens=torch.tensor([1], dtype=torch.int32),
        draft_token_ids=torch.tensor([-1], dtype=torch.int32),
        draft_probs=None,
        target_probs=target[1:],
        bonus_token_ids=torch.tensor([[101]], dtype=torch.int32),
        recovered_token_ids=torch.tensor([202], dtype=torch.int32),
        uniform_probs=torch.tensor([0.5], dtype=torch.float64),
        is_greedy=torch.tensor([False]),
    )


def test_padding_is_not_looked_up():
    inputs = padding_after_certainty()
    kernel = cpu_triton_utils._rejection_random_sample_kernel_impl
    assert launch(kernel, inputs).tolist() == [[202, -1, -1, -1]]


def test_vllms_look_up_fails():
    inputs = padding_after_certainty()
    kernel = cpu_sampler.vllms["_rejection_random_sample_kernel_impl"]
    assert launch(kernel, inputs).tolist() == [[-1, 101, -1, -1]]


# No drafts at all


def test_no_rows_have_no_best_tokens():
    nothing = torch.empty(0, VOCABULARY)
    none = torch.empty(0, dtype=torch.int32)
    assert (
        topk_topp_sampler.apply_top_k_top_p(nothing, none, None).shape == nothing.shape
    )
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    kept = topk_topp_sampler.apply_top_k_top_p(logits, torch.tensor([1, 3]), None)
    assert kept.isfinite().tolist() == [[False, True, False], [True] * 3]


def test_vllms_top_k_of_no_rows_fails():
    with pytest.raises(RuntimeError, match="numel"):
        cpu_sampler.vllms["apply_top_k_only"](
            torch.empty(0, VOCABULARY), torch.empty(0, dtype=torch.int32)
        )


# Generators of requests in their prompts


def test_generators_of_prompts_are_away_while_sampling(monkeypatch):
    generators = {0: "a", 1: "b", 3: "d", 5: "not in the batch"}
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(num_reqs=4, generators=dict(generators)),
        discard_request_mask=SimpleNamespace(
            np=np.array([False, True, True, True, False, True])
        ),
    )

    def sample(runner, grammar):
        raise LookupError(grammar, dict(runner.input_batch.generators))

    monkeypatch.setitem(cpu_sampler.vllms, "sample_tokens", sample)
    with pytest.raises(LookupError) as error:
        cpu_sampler.sample_tokens(runner, "grammar")
    assert error.value.args == ("grammar", {0: "a", 5: "not in the batch"})
    assert runner.input_batch.generators == generators


def test_winding_back_a_generator_fails():
    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator().get_offset()


# Refusals


def test_other_ways_to_verify_are_refused():
    cpu_sampler.check(None)
    cpu_sampler.check(SimpleNamespace(rejection_sample_method="standard"))
    for method in ("block", "synthetic", "fly"):
        with pytest.raises(ValueError, match=f"'{method}' is not served on CPUs"):
            cpu_sampler.check(SimpleNamespace(rejection_sample_method=method))


def test_they_are_refused_before_an_engine_starts():
    plugin.register()
    config = SimpleNamespace(
        attention_config=SimpleNamespace(
            backend=AttentionBackendEnum["SPARQ"], backend_per_kind=None
        ),
        additional_config={},
        model_config=None,
        speculative_config=SimpleNamespace(rejection_sample_method="block"),
    )
    with pytest.raises(ValueError, match="remove it from --speculative-config"):
        SparseCpuPlatform.check_and_update_config(config)


# Frequencies


def distribution(logits, temperature: float, top_k: int | None, top_p: float | None):
    """[..., vocabulary] fp64: what a request asks for."""
    probs = (logits.double() / temperature).softmax(-1)
    order = probs.sort(-1, descending=True)
    kept, before = order.values, order.values.cumsum(-1) - order.values
    if top_k is not None:
        kept = kept * (torch.arange(VOCABULARY) < top_k)
        kept = kept / kept.sum(-1, keepdim=True)
        before = kept.cumsum(-1) - kept
    if top_p is not None:
        kept = kept * (before < top_p)
    probs = torch.zeros_like(probs).scatter(-1, order.indices, kept)
    return probs / probs.sum(-1, keepdim=True)


def chance(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    """Of frequencies at least as far from ``probs`` (chi-square)."""
    counts = tokens.long().bincount(minlength=VOCABULARY).double()
    possible = probs > 0
    if counts[~possible].any():
        return 0.0
    expected = len(tokens) * probs[possible]
    assert expected.min() > 5, "too few tokens for chi-square"
    distance = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2).double()
    return float(torch.special.gammaincc(freedom, distance / 2))


TEMPERATURES = (0.7, 1.3)


def chances(
    top_k=None, top_p=None, *, drafter="model", seeded=False, count=20_000
) -> list[float]:
    """Of the tokens at each position of requests that alternate in temperature.

    Args:
        drafter: "model" reports what it draws from, "ngram" nothing, "liar" a uniform
            distribution.
    """
    generator = torch.Generator().manual_seed(11)
    torch.manual_seed(12)
    logits = 0.6 * torch.randn(DRAFTS + 1, VOCABULARY, generator=generator)
    drafting = torch.randn(DRAFTS, VOCABULARY, generator=generator).softmax(-1)
    drafts = torch.multinomial(drafting, count, replacement=True).T  # [count, DRAFTS]
    reported = dict(
        model=drafting.repeat(count, 1),
        liar=torch.full((count * DRAFTS, VOCABULARY), 1 / VOCABULARY),
        ngram=None,
    )[drafter]
    metadata = SamplingMetadata(
        temperature=torch.tensor(TEMPERATURES).repeat(count // 2),
        all_greedy=False,
        all_random=True,
        top_p=None if top_p is None else torch.full((count,), top_p),
        top_k=None if top_k is None else torch.full((count,), top_k, dtype=torch.int32),
        generators={
            i: torch.Generator().manual_seed(i) for i in range(count if seeded else 0)
        },
        max_num_logprobs=None,
        logprob_token_ids=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.empty(0),
        presence_penalties=torch.empty(0),
        repetition_penalties=torch.empty(0),
        output_token_ids=[],
        spec_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    of_drafts = SpecDecodeMetadata.make_dummy(drafts.tolist(), torch.device("cpu"))
    position = torch.arange(count * (DRAFTS + 1)).view(count, DRAFTS + 1)
    of_drafts.target_logits_indices = position[:, :-1].flatten().int()
    of_drafts.bonus_logits_indices = position[:, -1].int()
    sampler = vllms_sampler.RejectionSampler(Sampler())
    with torch.inference_mode():
        tokens = sampler(
            of_drafts, reported, logits.repeat(count, 1), metadata
        ).sampled_token_ids
    found = []
    for i, temperature in enumerate(TEMPERATURES):
        probs = distribution(logits, temperature, top_k, top_p)
        for pos in range(DRAFTS + 1):
            column = tokens[i::2, pos]
            found.append(chance(column[column >= 0], probs[pos]))
    return found


CONSTRAINTS = [
    pytest.param({}, id="temperature"),
    pytest.param({"top_k": 5}, id="top_k"),
    pytest.param({"top_p": 0.8}, id="top_p"),
    pytest.param({"top_k": 7, "top_p": 0.9}, id="top_k-top_p"),
]


@pytest.mark.parametrize("drafter", ["model", "ngram"])
@pytest.mark.parametrize("constraints", CONSTRAINTS)
def test_tokens_are_the_targets_whatever_was_drafted(constraints, drafter):
    assert min(chances(**constraints, drafter=drafter)) > 1e-3


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_seeded_requests_too(drafter):
    settings = dict(top_k=5, drafter=drafter, seeded=True, count=10_000)
    found = chances(**settings)
    assert min(found) > 1e-3
    assert chances(**settings) == found


@pytest.mark.parametrize("constraints", CONSTRAINTS)
def test_a_drafter_that_lies_is_found_out(constraints):
    """The control: the test can fail."""
    assert min(chances(**constraints, drafter="liar")) < 1e-9


def test_temperatures_that_were_lost_are_found_out(monkeypatch):
    """The control: without the repair, were the memory ones."""
    ones = lambda x, *_, **__: torch.ones(len(x) * DRAFTS, dtype=x.dtype)
    monkeypatch.setattr(vllms_sampler, "expand_batch_to_tokens", ones)
    assert min(chances()) < 1e-9

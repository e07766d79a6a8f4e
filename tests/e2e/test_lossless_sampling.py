# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sampled tokens of a lossless engine have dense attention's distribution.

A model of 24 tokens answers one prompt thousands of times. The first token of an answer
comes from the prompt; those after it are drafts that were accepted, or what rejection
put in their place. Their counts after each beginning are compared with probabilities of
transformers' own model in float64, chi-squared. Drafts attend to 16 of some 260 tokens:
they are often wrong, so that a mistake in rejection shows, as two controls do.
"""

import math
from collections import Counter, defaultdict
from functools import cache

import pytest

pytest.importorskip("vllm")

import torch  # noqa: E402
from vllm import SamplingParams  # noqa: E402

from .engines import COLD, generate, greedy, tokens  # noqa: E402
from .lossless import (  # noqa: E402
    LOSSLESS,
    Drafts,
    lossless,
    runner,
    verifying_sparsely,
)
from .tiny import random_prompts, save_llama  # noqa: E402

pytestmark = pytest.mark.engine
VOCABULARY = 24
OPTIONS = LOSSLESS | {
    "dense_below": 0,
    "top_k": 16,
    "local_window": 4,
    "sink_tokens": 1,
    "rank": 8,
}
SAMPLES = 3000
LENGTH = 3
# Of a beginning's counts: fewer say little.
LEAST_SAMPLES, LEAST_EXPECTED = 60, 5
# Runs repeat exactly (the engine's seed is fixed): no test fails now and then.
LIKELY, IMPOSSIBLE = 1e-3, 1e-9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def llm(folder):
    with lossless(
        OPTIONS,
        model=str(folder),
        skip_tokenizer_init=True,
        max_num_seqs=256,
        max_model_len=1024,
        max_num_batched_tokens=4096,
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompt():
    return random_prompts(260, vocabulary=VOCABULARY)[0]


@pytest.fixture(scope="module")
def logits(folder, prompt):
    """Of the next token after the prompt and a beginning of an answer, float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    @cache
    def of(beginning: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([[*prompt, *beginning]])).logits[0, -1]

    return of


def probabilities(
    logits: torch.Tensor, params: SamplingParams, prompt, said
) -> torch.Tensor:
    """[VOCABULARY] float64, by the definitions of the parameters."""
    logits = logits.clone()
    counts = torch.bincount(torch.tensor([*said, 0]), minlength=VOCABULARY)
    counts[0] -= 1
    seen = counts > 0
    seen[list({*prompt})] = True
    penalty = params.repetition_penalty
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    logits = torch.where(seen, penalised, logits)
    logits -= params.frequency_penalty * counts
    logits -= params.presence_penalty * (counts > 0)
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    found = (logits / params.temperature).softmax(-1)
    found[found < params.min_p * found.max()] = 0
    found /= found.sum()
    order = found.argsort(descending=True)
    if params.top_k > 0:
        found[order[params.top_k :]] = 0
        found /= found.sum()
    # The fewest tokens whose probabilities reach top_p.
    before = found[order].cumsum(-1) - found[order]
    found[order[before >= params.top_p]] = 0
    return found / found.sum()


def sample(llm, prompt, params: SamplingParams, count: int = SAMPLES):
    params = params.clone()
    params.n, params.max_tokens, params.ignore_eos = count, LENGTH, True
    params.detokenize = False
    (output,) = generate(llm, [prompt], params)
    return [tuple(o.token_ids) for o in output.outputs]


def likelihood(answers, prompt, params, logits) -> float:
    """The chance of counts as unlikely as these, tokens 2 and up.

    Raises:
        AssertionError: a token came that has no probability.
    """
    counted = defaultdict(Counter)
    for answer in answers:
        for i in range(1, len(answer)):
            counted[answer[:i]][answer[i]] += 1
    statistic, freedom, positions = 0.0, 0, set()
    for beginning, counter in counted.items():
        total = counter.total()
        if total < LEAST_SAMPLES:
            continue
        wanted = probabilities(logits(beginning), params, prompt, beginning)
        expected = (wanted * total).tolist()
        assert all(expected[token] > 0 for token in counter), (beginning, counter)
        often = [t for t in range(VOCABULARY) if expected[t] >= LEAST_EXPECTED]
        pairs = [(counter[t], expected[t]) for t in often]
        rest = total - sum(want for _, want in pairs)
        if rest >= LEAST_EXPECTED:
            pairs.append((total - sum(got for got, _ in pairs), rest))
        else:  # to the rarest of the others
            pairs.sort(key=lambda pair: pair[1])
            got, want = pairs[0]
            got += total - sum(got for got, _ in pairs)
            pairs[0] = got, want + rest
        statistic += sum((got - want) ** 2 / want for got, want in pairs)
        freedom += len(pairs) - 1
        positions.add(len(beginning))
    assert positions == set(range(1, LENGTH)) and freedom > 30
    half = torch.tensor([freedom, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*half))


HOT, COOL = SamplingParams(temperature=1.3), SamplingParams(temperature=0.7)
ARMS = {
    "cool": COOL,
    "all": SamplingParams(
        temperature=1.2,
        top_k=12,
        top_p=0.9,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        repetition_penalty=1.3,
    ),
    "hot": HOT,
    "top-k": SamplingParams(temperature=1.0, top_k=6),
    "top-p": SamplingParams(temperature=1.0, top_p=0.7),
    "min-p": SamplingParams(temperature=1.0, min_p=0.1),
    "bias": SamplingParams(temperature=0.9, logit_bias={3: 2.0, 7: -3.0}, min_p=0.05),
    "repetition": SamplingParams(temperature=0.8, repetition_penalty=1.6),
    "presence": SamplingParams(temperature=0.8, presence_penalty=1.5),
    "frequency": SamplingParams(temperature=0.8, frequency_penalty=-1.2),
}
ALWAYS = ("cool", "all", "bias")
MARKED = [
    pytest.param(arm, id=name, marks=() if name in ALWAYS else pytest.mark.slow)
    for name, arm in ARMS.items()
]


@pytest.mark.parametrize("params", MARKED)
def test_tokens_have_the_distribution_of_dense_attention(llm, prompt, logits, params):
    drafts = Drafts(llm)
    answers = sample(llm, prompt, params)
    assert 0.02 < drafts.rate < 0.9
    assert likelihood(answers, prompt, params, logits) > LIKELY


@pytest.mark.slow
@pytest.mark.parametrize("params", [COOL, HOT], ids=["cool", "hot"])
def test_drafts_of_the_likeliest_token_do_not_change_it(
    llm, prompt, logits, params, monkeypatch
):
    """As ``draft_sample_method`` greedy drafts."""
    drafter = runner(llm).drafter
    monkeypatch.setattr(drafter, "_enable_probabilistic_draft_probs", False)
    answers = sample(llm, prompt, params)
    assert likelihood(answers, prompt, params, logits) > LIKELY


def test_a_wrong_distribution_of_drafts_is_seen(llm, prompt, logits, monkeypatch):
    """A control: drafts are not drawn from what rejection is told."""
    drafter = runner(llm).drafter
    true = drafter.take_last_draft_probs

    def wrong():
        found = true()
        return None if found is None else found.roll(1, dims=-1)

    monkeypatch.setattr(drafter, "take_last_draft_probs", wrong)
    answers = sample(llm, prompt, COOL)
    assert likelihood(answers, prompt, COOL, logits) < IMPOSSIBLE


@pytest.mark.slow
def test_sparse_verification_is_seen(llm, prompt, logits):
    """A control: rejection is right, the model that it follows is not."""
    with verifying_sparsely(llm, OPTIONS):
        answers = sample(llm, prompt, COOL)
    assert likelihood(answers, prompt, COOL, logits) < IMPOSSIBLE


def sampled(seed: int | None, **options) -> SamplingParams:
    settings = dict(temperature=0.8, max_tokens=40, ignore_eos=True, detokenize=False)
    return SamplingParams(seed=seed, **settings | COLD | options)


def test_seeds_repeat_alone_and_beside_others(llm):
    prompts = random_prompts(300, 129, 40, 700, vocabulary=VOCABULARY)
    params = [sampled(seed=7 + i) for i in range(4)]
    drafts = Drafts(llm)
    together = tokens(generate(llm, prompts, params))
    assert 0 < drafts.accepted < drafts.drafted
    assert tokens(generate(llm, prompts, params)) == together
    others = [*prompts, *random_prompts(5, 200, vocabulary=VOCABULARY)]
    mixed = [*params, sampled(None), greedy(40, detokenize=False, **COLD)]
    order = [4, 2, 0, 5, 3, 1]
    got = tokens(generate(llm, [others[i] for i in order], [mixed[i] for i in order]))
    assert [got[order.index(i)] for i in range(4)] == together
    for i in range(4):
        assert tokens(generate(llm, [prompts[i]], params[i])) == [together[i]]
    again = tokens(generate(llm, prompts, [sampled(seed=70 + i) for i in range(4)]))
    assert all(a != b for a, b in zip(again, together, strict=True))


def test_seeds_repeat_in_chunks_and_on_hits(llm):
    """Also where one token is left to compute."""
    prompts = random_prompts(129, 128, 257, 300, vocabulary=VOCABULARY)
    params = [
        sampled(seed=7 + i, skip_reading_prefix_cache=False)
        for i in range(len(prompts))
    ]
    assert llm.reset_prefix_cache()
    cold = generate(llm, prompts, params)
    hits = generate(llm, prompts, params)
    assert [output.num_cached_tokens for output in hits] == [128, 0, 256, 256]
    assert tokens(hits) == tokens(cold)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "max_num_scheduled_tokens", 50)
        assert llm.reset_prefix_cache()
        assert tokens(generate(llm, prompts, params)) == tokens(cold)


def test_several_answers_with_a_seed_are_those_of_its_seeds_alone(llm, prompt):
    (output,) = generate(llm, [prompt], sampled(100, n=3))
    together = [list(o.token_ids) for o in output.outputs]
    alone = [tokens(generate(llm, [prompt], sampled(100 + i)))[0] for i in range(3)]
    assert together == alone and together[0] != together[1]


@pytest.mark.parametrize("best", [dict(top_k=1), dict(top_p=1e-6)], ids=str)
def test_the_likeliest_token_is_greedys_in_several_answers(llm, prompt, best):
    wanted = tokens(generate(llm, [prompt], greedy(40, detokenize=False)))
    (output,) = generate(llm, [prompt], sampled(None, n=3, **best))
    assert [list(o.token_ids) for o in output.outputs] == 3 * wanted


def test_greedy_requests_beside_sampled_ones_stay_greedy(llm):
    prompts = random_prompts(300, 129, 40, 700, vocabulary=VOCABULARY)
    params = greedy(40, detokenize=False, **COLD)
    alone = tokens(generate(llm, prompts, params))
    mixed = [q for p in prompts for q in (p, p)]
    both = [q for _ in prompts for q in (params, sampled(None, temperature=1.5))]
    assert tokens(generate(llm, mixed, both))[::2] == alone


def test_log_probabilities_of_sampled_tokens_are_dense(llm, prompt, logits):
    (output,) = generate(llm, [prompt], sampled(None, logprobs=0, max_tokens=24))
    (answer,) = output.outputs
    for i, step in enumerate(answer.logprobs):
        wanted = logits(tuple(answer.token_ids[:i])).log_softmax(-1)
        token = answer.token_ids[i]
        assert math.isclose(step[token].logprob, wanted[token], abs_tol=1e-4)


def test_a_seed_beside_a_request_at_the_end_of_its_context(llm, prompt):
    """Which drafts nothing any more: its neighbours do as before."""
    seeded = sampled(7, max_tokens=40)
    (alone,) = tokens(generate(llm, [prompt], seeded))
    ending = random_prompts(1010, vocabulary=VOCABULARY)[0]
    params = [seeded, sampled(8, max_tokens=40)]
    beside, end = tokens(generate(llm, [prompt, ending], params))
    assert beside == alone
    assert len(end) == 14

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sampling parameters that vLLM refuses or gets wrong beside drafts, losslessly.

Where an answer has one value it is the dense engine's. What is drawn is compared with
the model's own probabilities in float64.
"""

from collections import Counter

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.config.reasoning import ReasoningConfig  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from vllm_sparse.plugin.speculation import v1, v1_parameters  # noqa: E402

from .engines import COLD, generate, greedy, running, tokens  # noqa: E402
from .engines import logprobs as logprobs_of  # noqa: E402
from .tiny import VOCABULARY, random_prompts, save_llama  # noqa: E402

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="the sampler of CPUs"),
]
# About half of the drafts are accepted.
LOSSLESS = {
    "lossless": True,
    "draft_above": 0,
    "draft_adapt": False,
    "draft_tokens": 3,
    "top_k": 0.5,
    "dense_below": 0,
}
NEW_TOKENS = 24
LENGTHS = (5, 90, 128, 200, 33, 130)
THINK, END = 39, [40, 41]
ANY = range(3, VOCABULARY)


def reasoning() -> ReasoningConfig:
    """Without a tokenizer."""
    config = ReasoningConfig(reasoning_start_str="<", reasoning_end_str=">")
    config._reasoning_start_token_ids = [THINK]
    config._reasoning_end_token_ids = END
    config._natural_reasoning_end_token_ids = END[-1:]
    return config


def engine(folder, options: dict, **more):
    return running(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_batched_tokens=128,
        max_num_seqs=64,
        attention_backend="sparq",
        additional_config={"sparse": options},
        reasoning_config=reasoning(),
        **more,
    )


def bias(seed: int) -> dict[int, float]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(3, VOCABULARY, (60,), generator=generator).tolist()
    return {t: float(4 * torch.randn((), generator=generator)) for t in chosen}


def bad_words(answer: list[int]) -> SamplingParams:
    params = greedy(NEW_TOKENS, **COLD)
    params._bad_words_token_ids = [[answer[3]], answer[5:7], answer[9:12]]
    return params


def stopping(answer: list[int], least: int) -> SamplingParams:
    """Where stop tokens come before and soon after there are enough tokens."""
    stops = sorted(set(answer[2 : least + 5]))
    return greedy(NEW_TOKENS, min_tokens=least, stop_token_ids=stops, **COLD)


def cases(plain: list[list[int]]) -> dict[str, list[SamplingParams]]:
    """By name, for each prompt; every third has no parameters."""
    penalties = dict(
        presence_penalty=0.7, frequency_penalty=0.9, repetition_penalty=1.3
    )

    def some(make) -> list[SamplingParams]:
        params = [make(i) for i in range(len(LENGTHS))]
        params[1::3] = [greedy(NEW_TOKENS, **COLD)] * len(params[1::3])
        return params

    make = lambda **options: greedy(NEW_TOKENS, **COLD, **options)
    certain = lambda i: SamplingParams(
        temperature=0.4 + 0.3 * i,
        min_p=1.0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        **COLD,
    )
    found = {
        "logit_bias": some(lambda i: make(logit_bias=bias(i), logprobs=2)),
        "bias and penalties": some(lambda i: make(logit_bias=bias(i), **penalties)),
        "penalties": some(lambda i: make(**penalties)),
        "min_p": some(lambda i: make(min_p=0.2)),
        "min_p of 1 is greedy": some(certain),
        "allowed_token_ids": some(lambda i: make(allowed_token_ids=[*ANY][i::2])),
        "bad_words": some(lambda i: bad_words(plain[i])),
        "logprobs": some(lambda i: make(logprobs=3, prompt_logprobs=2)),
    }
    # Without a budget a request may get another's in vLLM's dense engine.
    budgets = range(0, 2 * len(LENGTHS), 2)
    found["thinking"] = [make(thinking_token_budget=budget) for budget in budgets]
    think = {THINK: 4.0, END[0]: 3.5}
    found["much thinking"] = [
        make(thinking_token_budget=budget, logit_bias=think) for budget in budgets
    ]
    for least in (4, 6, 9):
        found[f"min_tokens {least}"] = some(
            lambda i, least=least: stopping(plain[i], least)
        )
    return found


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Half of them in thought."""
    found = random_prompts(*LENGTHS)
    for prompt in found[::2]:
        prompt[-4] = THINK
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def dense(folder, prompts):
    """The dense engine's outputs by name, and of no parameters as ""."""
    with engine(folder, {"selector": "dense"}) as llm:
        found = {"": generate(llm, prompts, greedy(NEW_TOKENS, **COLD))}
        for name, params in cases(tokens(found[""])).items():
            found[name] = generate(llm, prompts, params)
    return found


@pytest.fixture(scope="module")
def lossless(folder, dense):
    with engine(folder, LOSSLESS, disable_log_stats=False) as llm:
        yield llm


def test_answers_are_the_dense_engines(lossless, dense, prompts):
    plain = tokens(dense[""])
    for name, params in cases(plain).items():
        got, wanted = generate(lossless, prompts, params), dense[name]
        assert tokens(got) == tokens(wanted), name
        if name.startswith("min_p"):
            assert tokens(got) == plain
        else:
            assert (tokens(got) == plain) == (name == "logprobs"), name
        asked = [i for i, its in enumerate(params) if its.logprobs is not None]
        if asked:
            a, b = (logprobs_of([o[i] for i in asked]) for o in (got, wanted))
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b))
        for a, b in zip(got, wanted, strict=True):
            assert (a.prompt_logprobs is None) == (b.prompt_logprobs is None)
            for x, y in zip(a.prompt_logprobs or [], b.prompt_logprobs or []):
                assert (x is None and y is None) or x.keys() == y.keys()
    counts = {m.name: m.value for m in lossless.get_metrics() if hasattr(m, "value")}
    drafted, accepted = (
        counts[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted")
    )
    assert 0.2 < accepted / drafted < 0.8


def test_what_is_refused_says_what_to_do(lossless, prompts):
    with pytest.raises(VLLMValidationError, match="ask for logprobs"):
        generate(lossless, prompts, greedy(4, logprob_token_ids=[7]))


# What is drawn


# All but two of the prompt's tokens come from the prefix cache.
SAMPLES, MIN_P, PROMPT = 1200, 0.2, 5


@pytest.fixture(scope="module")
def allowed(folder, prompts):
    """Probabilities of the tokens that may come next, after a beginning."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)

    @torch.no_grad()
    def after(beginning: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([[*prompts[PROMPT], *beginning]])
        probs = model(ids).logits[0, -1].softmax(-1)
        probs[probs < MIN_P * probs.max()] = 0
        return probs / probs.sum()

    return after


def draw(llm, prompts) -> dict[tuple[int, ...], Counter]:
    """How often which token came after a beginning."""
    params = SamplingParams(
        temperature=1.0, min_p=MIN_P, max_tokens=3, ignore_eos=True, n=SAMPLES
    )
    (output,) = generate(llm, [prompts[PROMPT]], params)
    counts: dict[tuple[int, ...], Counter] = {}
    for answer in (tuple(answer.token_ids) for answer in output.outputs):
        for i, token in enumerate(answer):
            counts.setdefault(answer[:i], Counter())[token] += 1
    return counts


def forbidden(counts, allowed) -> int:
    """Tokens that dense attention cannot give."""
    return sum(
        its[token]
        for beginning, its in counts.items()
        for token in its
        if allowed(beginning)[token] == 0
    )


def chance(counts, allowed) -> float:
    """Of second tokens, which drafts decide, as far from the model's (chi-square)."""
    distance, freedom = 0.0, 0
    for beginning, its in counts.items():
        probs = allowed(beginning)
        expected = probs[probs > 0] * its.total()
        if len(beginning) == 1 and expected.min() > 5 and len(expected) > 1:
            got = torch.tensor([its[int(token)] for token in probs.nonzero()])
            distance += float(((got - expected) ** 2 / expected).sum())
            freedom += len(expected) - 1
    assert freedom > 3, "too few choices"
    halves = torch.tensor([freedom, distance], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*halves))


def test_what_is_drawn_has_the_models_probabilities(lossless, prompts, allowed):
    counts = draw(lossless, prompts)
    assert not forbidden(counts, allowed)
    assert chance(counts, allowed) > 1e-3


def test_drafts_without_min_p_are_found_out(lossless, prompts, allowed, monkeypatch):
    """The control: the test can fail."""
    monkeypatch.setattr(v1_parameters, "mask_below_min_p", lambda *_: None)
    assert forbidden(draw(lossless, prompts), allowed)


def test_a_drafter_that_lies_is_found_out(lossless, prompts, allowed, monkeypatch):
    """The control: of allowed tokens there may be too many."""
    sample = v1.SelfDraftProposer._sample_draft_tokens

    def lying(*args):
        drafts, probs = sample(*args)
        return probs.argmax(-1).to(drafts.dtype), probs

    monkeypatch.setattr(v1.SelfDraftProposer, "_sample_draft_tokens", lying)
    counts = draw(lossless, prompts)
    assert not forbidden(counts, allowed)
    assert chance(counts, allowed) < 1e-9

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sampling parameters on rows of drafts, against plain torch; who may ask for them."""

import logging
from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.sample.logits_processor import (  # noqa: E402
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
    MoveDirectionality,
)
from vllm.v1.sample.metadata import SamplingMetadata  # noqa: E402
from vllm.v1.sample.rejection_sampler import RejectionSampler  # noqa: E402
from vllm.v1.sample.sampler import Sampler  # noqa: E402
from vllm.v1.sample.thinking_budget_state import (  # noqa: E402
    ThinkingBudgetStateHolder,
)
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata  # noqa: E402

from vllm_sparse.config import SparseConfig  # noqa: E402
from vllm_sparse.plugin import cpu_sampler  # noqa: E402
from vllm_sparse.plugin.speculation import parameters, refusals  # noqa: E402
from vllm_sparse.plugin.speculation import v1_parameters as ours  # noqa: E402
from vllm_sparse.plugin.speculation.v1_thinking import ThinkingBudgets  # noqa: E402

on_cpu = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="V1 serves lossless engines on CPUs"
)
VOCABULARY = 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def installed():
    cpu_sampler.install()
    current_platform.register_triton_kernel_overrides()
    for _ in range(2):
        parameters.install()


# The step of a batch


class Step:
    """Requests with ragged drafts, as a V1 runner samples them."""

    def __init__(self, requests, drafts, outputs=None, min_tokens=ours.MinTokens):
        """
        Args:
            requests: what each asks for.
            drafts: its drafted tokens.
            outputs: its tokens so far.
        """
        outputs = outputs or [[] for _ in requests]
        count = len(requests)
        self.requests, self.drafts, self.outputs = requests, drafts, outputs
        self.prompts = [[3 + i, 4] for i in range(count)]
        config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=64))
        processors = [
            kind(config, CPU, False)
            for kind in (min_tokens, LogitBiasLogitsProcessor, MinPLogitsProcessor)
        ]
        added = list(zip(range(count), requests, self.prompts, outputs, strict=True))
        for processor in processors:
            processor.update_state(BatchUpdate(count, [], added, []))
        of_all = lambda name: torch.tensor([float(getattr(r, name)) for r in requests])
        temperature = of_all("temperature")
        greedy = temperature < 1e-5
        self.metadata = SamplingMetadata(
            temperature=None if greedy.all() else temperature,
            all_greedy=bool(greedy.all()),
            all_random=not greedy.any(),
            top_p=None,
            top_k=None,
            generators={},
            max_num_logprobs=None,
            no_penalties=not (of_all("repetition_penalty") != 1).any(),
            prompt_token_ids=torch.tensor(self.prompts),
            frequency_penalties=of_all("frequency_penalty"),
            presence_penalties=of_all("presence_penalty"),
            repetition_penalties=of_all("repetition_penalty"),
            output_token_ids=outputs,
            spec_token_ids=drafts,
            allowed_token_ids_mask=None,
            bad_words_token_ids={},
            logitsprocs=LogitsProcessors(processors),
        )
        self.of_drafts = SpecDecodeMetadata.make_dummy(drafts, CPU)
        ends = torch.tensor([len(d) + 1 for d in drafts]).cumsum(0) - 1
        rows = torch.arange(int(ends[-1]) + 1)
        self.of_drafts.bonus_logits_indices = ends.int()
        self.of_drafts.target_logits_indices = rows[~torch.isin(rows, ends)].int()
        self.rows = [
            (i, pos) for i, d in enumerate(drafts) for pos in range(len(d) + 1)
        ]

    def logits(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        return 2 * torch.randn(len(self.rows), VOCABULARY, generator=generator)

    def processed(self, logits, kind=ours.DraftRowsSampler) -> torch.Tensor:
        """Of the drafts' rows."""
        logits = logits[self.of_drafts.target_logits_indices]
        sampler = kind(Sampler())
        return sampler.apply_logits_processors(logits, self.metadata, self.of_drafts)

    def sampled(self, logits, kind=ours.DraftRowsSampler) -> list[list[int]]:
        with torch.inference_mode():
            sampler = kind(Sampler())
            found = sampler(self.of_drafts, None, logits, self.metadata)
        return found.sampled_token_ids.tolist()


def meaning(step: Step, logits: torch.Tensor) -> torch.Tensor:
    """Of the drafts' rows, by the definitions of the parameters."""
    found = []
    for row, (i, pos) in enumerate(step.rows):
        if pos == len(step.drafts[i]):
            continue
        request, values = step.requests[i], logits[row].clone()
        for token, bias in (request.logit_bias or {}).items():
            values[token] += bias
        said = torch.tensor(step.outputs[i] + step.drafts[i][:pos], dtype=torch.long)
        counts = said.bincount(minlength=VOCABULARY)
        seen = counts > 0
        seen[step.prompts[i]] = True
        penalty = request.repetition_penalty
        scaled = torch.where(values > 0, values / penalty, values * penalty)
        values = torch.where(seen, scaled, values)
        values -= request.frequency_penalty * counts
        values -= request.presence_penalty * (counts > 0)
        if request.temperature > 0:
            probs = (values / request.temperature).softmax(-1)
            values[probs < request.min_p * probs.max()] = -torch.inf
        found.append(values)
    return torch.stack(found)


def bias(seed: int) -> dict[int, float]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(VOCABULARY, generator=generator)[: 3 + seed].tolist()
    return {token: 3.0 * (-1) ** token for token in tokens}


def ragged() -> Step:
    """All parameters, beside requests that have none of them or no drafts."""
    common = dict(repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.2)
    requests = [
        SamplingParams(temperature=0.7, min_p=0.2, logit_bias=bias(0), **common),
        SamplingParams(temperature=1.5, logit_bias=bias(1)),
        SamplingParams(temperature=0, logit_bias=bias(2), **common),
        SamplingParams(temperature=1.5, min_p=0.05, logit_bias=bias(3)),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.4, min_p=0.05, **common),
    ]
    drafts = [[5, 9, 5], [7], [], [8, 8], [1, 2, 3], [11, 30]]
    return Step(requests, drafts, [[9], [], [4, 4], [1], [], [2, 11]])


@on_cpu
def test_rows_of_drafts_have_all_parameters():
    step = ragged()
    logits = step.logits()
    wanted = meaning(step, logits)
    assert 0.2 < wanted.isinf().float().mean() < 0.8
    torch.testing.assert_close(step.processed(logits), wanted)


@on_cpu
def test_vllms_own_sampler_leaves_two_out_and_fails():
    step = ragged()
    logits = step.logits()
    theirs = step.processed(logits, RejectionSampler)
    assert theirs.isfinite().all()
    for request in step.requests:
        request.min_p, request.logit_bias = 0.0, None
    torch.testing.assert_close(theirs, meaning(step, logits))


@on_cpu
def test_drafts_and_bonus_tokens_are_biased_once():
    """Token 1 is best without bias, 2 with it, 3 were it added twice."""
    logits = torch.full((6, VOCABULARY), -9.0)
    logits[:, 1], logits[:, 2], logits[:, 3] = 4.0, 3.0, 0.0
    request = SamplingParams(temperature=0, logit_bias={2: 2.0, 3: 3.5})
    step = Step([request] * 3, [[2, 2], [], [1]])
    assert step.sampled(logits) == [[2, 2, 2], [2, -1, -1], [2, -1, -1]]


@on_cpu
def test_bonus_tokens_have_min_p():
    logits = torch.zeros(40 * 2, VOCABULARY)
    logits[:, 5], logits[:, 6] = 3.0, 2.0
    request = SamplingParams(temperature=1.0, min_p=0.2)
    step = Step([request] * 40, [[5]] * 40)
    torch.manual_seed(1)
    drafted, bonus = zip(*step.sampled(logits), strict=True)
    assert set(drafted) == {5, 6} and set(bonus) == {5, 6, -1}


# Stop tokens


STOPS = [7, 8]


def stopping(min_tokens_kind) -> list[list[int]]:
    """Greedy tokens where a stop token is best everywhere and all drafts are right."""
    requests = []
    for least in (0, 2, 3, 4, 6):
        request = SamplingParams(temperature=0, min_tokens=least, stop_token_ids=STOPS)
        requests.append(request)
    outputs = [[1]] * len(requests)  # the step's first token is the second
    logits = torch.zeros(4 * len(requests), VOCABULARY)
    logits[:, 7], logits[:, 8], logits[:, 4] = 3.0, 2.0, 1.0
    drafts = [[7] * 3, [4, 7, 7], [4, 4, 7], [4] * 3, [4] * 3]
    return Step(requests, drafts, outputs, min_tokens_kind).sampled(logits)


@on_cpu
def test_stop_tokens_may_come_as_soon_as_there_are_min_tokens():
    assert stopping(ours.MinTokens) == [
        [7, 7, 7, 7],
        [4, 7, 7, 7],
        [4, 4, 7, 7],
        [4, 4, 4, 7],
        [4, 4, 4, 4],
    ]


@on_cpu
def test_vllms_bonus_token_fails():
    bonus = [row[-1] for row in stopping(MinTokensLogitsProcessor)]
    assert bonus == [7, 4, 4, 4, 4]


# Thinking budgets

START, END = [5], [6, 7]
BATCH = 3


def holder(kind, drafts: int, budgets, prompts, outputs):
    config = SimpleNamespace(
        reasoning_start_token_ids=START, reasoning_end_token_ids=END
    )
    found = kind(config, BATCH, drafts, CPU, False)
    params = [SamplingParams(thinking_token_budget=budget) for budget in budgets]
    added = list(zip(range(BATCH), params, prompts, outputs, strict=True))
    found.sync_batch(BatchUpdate(BATCH, [], added, []))
    return found


def forced(logits: torch.Tensor) -> list[int | None]:
    best = logits.max(-1)
    return [int(t) if v > 0 else None for v, t in zip(*best, strict=True)]


def think(kind, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Answers with drafts that ``kind`` forces, and without drafts as vLLM does.

    What is not forced is a function of the request and the position.
    """
    generator = torch.Generator().manual_seed(seed)
    random = lambda high, *shape: torch.randint(high, shape, generator=generator)
    free = random(10, BATCH, 30).tolist()
    budgets = random(6, BATCH).tolist()
    budgets[1] = None
    prompts = [random(10, 4).tolist() for _ in range(BATCH)]
    steps_in_prompt = int(random(3, 1))

    dense: list[list[int]] = [[] for _ in range(BATCH)]
    alone = holder(ThinkingBudgetStateHolder, 0, budgets, prompts, dense)
    for pos in range(30):
        for _ in range(1 + steps_in_prompt * (pos == 0)):
            alone.update_state(dense, [[]] * BATCH)
            rows = forced(alone.apply_to_logits(torch.zeros(BATCH, 12), False, None))
        for req, token in enumerate(rows):
            dense[req].append(free[req][pos] if token is None else token)

    answers: list[list[int]] = [[] for _ in range(BATCH)]
    drafting = holder(kind, 3, budgets, prompts, answers)
    chunks = steps_in_prompt
    while min(map(len, answers)) < 30:
        first = chunks >= 0
        drafts = [
            [] if first or len(a) > 26 else random(10, int(random(4, 1))).tolist()
            for a in answers
        ]
        for req, draft in enumerate(drafts):  # most are right
            right = dense[req][len(answers[req]) :]
            for i in range(len(draft)):
                draft[i] = right[i] if random(5, 1) else draft[i]
        # vLLM's runner verifies no drafts, too.
        speculating = any(drafts) or bool(random(2, 1))
        drafting.update_state(answers, drafts)
        bonus = drafting.apply_to_logits(torch.zeros(BATCH, 12), speculating, drafts)
        rows = torch.zeros(sum(map(len, drafts)), 12)
        if speculating:
            rows = drafting.apply_to_logits(rows, False, drafts)
        bonus_tokens, tokens = forced(bonus), iter(forced(rows))
        for req, draft in enumerate(drafts):
            of_drafts = [next(tokens) for _ in draft]
            if chunks > 0 or len(answers[req]) >= 30:
                continue
            start = len(answers[req])
            for i, token in enumerate([*of_drafts, bonus_tokens[req]]):
                token = free[req][start + i] if token is None else token
                answers[req].append(token)
                if i < len(draft) and token != draft[i]:
                    break
        chunks -= 1
    return [answer[:30] for answer in answers], dense


@pytest.mark.parametrize("seed", range(40))
def test_thinking_ends_where_it_does_without_drafts(seed):
    answers, dense = think(ThinkingBudgets, seed)
    assert answers == dense


def test_vllms_thinking_with_drafts_fails():
    wrong = 0
    for seed in range(10):
        answers, dense = think(ThinkingBudgetStateHolder, seed)
        wrong += answers != dense
    assert wrong > 5


def moved(kind, direction) -> dict[int, int]:
    """Budgets by row after request 1, which has none, goes to row 0 or changes places
    with request 0."""
    outputs = [[] for _ in range(BATCH)]
    found = holder(kind, 0, [3, None, 7], outputs, outputs)
    found.sync_batch(BatchUpdate(BATCH, [], [], [(1, 0, direction)]))
    return {i: state["thinking_token_budget"] for i, state in found._state.items()}


def test_budgets_move_with_their_requests():
    one_way, swap = MoveDirectionality.UNIDIRECTIONAL, MoveDirectionality.SWAP
    assert moved(ThinkingBudgets, one_way) == {2: 7}
    assert moved(ThinkingBudgets, swap) == {1: 3, 2: 7}


def test_vllms_budget_is_inherited_and_fails():
    one_way = MoveDirectionality.UNIDIRECTIONAL
    assert moved(ThinkingBudgetStateHolder, one_way) == {0: 3, 2: 7}


# Who may ask


OURS = SimpleNamespace(vllm_sparse_lossless=True)


@pytest.mark.parametrize("asked", [{"min_p": 0.2}, {"logit_bias": {3: 1.0}}], ids=str)
def test_only_lossless_engines_serve_them(asked):
    params = SamplingParams(**asked)
    params._validate_spec_decode(None)
    params._validate_spec_decode(OURS)
    with pytest.raises(VLLMValidationError, match="speculative decoding"):
        params._validate_spec_decode(SimpleNamespace(method="ngram"))


def test_what_a_lossless_engine_refuses():
    params = SamplingParams(logprob_token_ids=[3, 4])
    params._validate_spec_decode(None)
    params._validate_spec_decode(SimpleNamespace(method="ngram"))
    with pytest.raises(VLLMValidationError, match="not served with sparse.lossless"):
        params._validate_spec_decode(OURS)


@on_cpu
def test_installed_processors_are_refused(monkeypatch):
    """vLLM leaves them out beside drafts and says nothing."""
    plugin = EntryPoint("shout", "loud:Shout", "vllm.logits_processors")
    config = MagicMock(
        speculative_config=None,
        lora_config=None,
        model_config=MagicMock(
            runner_type="generate",
            is_encoder_decoder=False,
            is_hybrid=False,
            is_attention_free=False,
            uses_mrope=False,
            multimodal_config=None,
            enable_prompt_embeds=False,
            logits_processors=None,
        ),
        parallel_config=MagicMock(
            pipeline_parallel_size=1,
            data_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_eplb=False,
            use_ubatching=False,
        ),
    )
    assert list(refusals.refusals(config, SparseConfig())) == []
    found = lambda group: EntryPoints([plugin]).select(group=group)
    monkeypatch.setattr(refusals, "entry_points", found)
    (reason,) = refusals.refusals(config, SparseConfig())
    assert reason == "uninstall the logits processors shout"


def test_vllms_warning_is_silenced_and_no_other(caplog, monkeypatch):
    logger = logging.getLogger("vllm.v1.sample.logits_processor")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    try:
        with ours.without_the_warning():
            logger.warning(ours.WARNING)
            logger.warning("another")
        logger.warning(ours.WARNING)
    finally:
        logger.removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["another", ours.WARNING]

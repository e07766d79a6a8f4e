# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Draft models, EAGLE heads and MTP layers beside sparse targets, in fp32 on the CPU.

Drafts change no token: neither over quantised blocks, nor in chunks, nor from the
prefix cache, nor in company. Whoever serves the drafter's attention is what was asked
for.
"""

from functools import cache
from itertools import product

import pytest

pytest.importorskip("vllm")

from .drafters import (  # noqa: E402
    DRAFTERS,
    SPARSE,
    accepted_tokens,
    drafting,
    layer_backends,
)
from .engines import (  # noqa: E402
    COLD,
    DENSE,
    add,
    few_free_blocks,
    generate,
    greedy,
    scheduled,
    stats,
    step_until_done,
    tokens,
)
from .tiny import random_prompts  # noqa: E402

pytestmark = pytest.mark.engine

# Both sides of a block's end, and several blocks; long answers stay while others come
# and go, and cross ends of blocks.
PROMPTS = random_prompts(5, 127, 128, 129, 300, 450)
ANSWERS = (140, 20, 30, 8, 90, 12)
PARAMS = [greedy(count) for count in ANSWERS]
OPTIONS = {
    "dense": DENSE,
    "sparse": SPARSE,
    "int8": SPARSE | {"kv_format": "int8"},
    "k8v4": SPARSE | {"kv_format": "k8v4"},
    "int8 dense": DENSE | {"kv_format": "int8"},
}


@cache
def without_speculation(options: str, target: str) -> list[list[int]]:
    with drafting(None, OPTIONS[options], target) as llm:
        return tokens(generate(llm, PROMPTS, PARAMS))


def assert_drafts_change_nothing(method, options, draft_backend, chunk=100):
    """All at once, from the prefix cache, in chunks; returns the figures."""
    target = DRAFTERS[method][0]
    expected = without_speculation(options, target)
    sparse = OPTIONS[options]
    with drafting(method, sparse, draft_backend=draft_backend) as llm:
        first = tokens(generate(llm, PROMPTS, PARAMS))
        figures = stats(llm)
        assert first == expected
        hits = generate(llm, PROMPTS, PARAMS)
        assert tokens(hits) == expected
        # Of EAGLE-like drafters vLLM computes the last block anew.
        assert sum(output.num_cached_tokens for output in hits) >= 384
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.max_num_scheduled_tokens = chunk
        cold = [greedy(count, **COLD) for count in ANSWERS]
        assert tokens(generate(llm, PROMPTS, cold)) == expected
        backends = llm.collective_rpc(layer_backends)[0]
        (kept,) = llm.collective_rpc("sparse_kept_tokens")
        return figures, backends, kept, accepted_tokens(llm)


def test_a_draft_model_beside_sparse_rows_and_its_own_backend():
    figures, backends, kept, accepted = assert_drafts_change_nothing(
        "draft_model", "sparse", draft_backend=None
    )
    assert accepted > 20
    of_drafts = {name for name in backends if name.startswith("draft_model.")}
    assert len(of_drafts) == 3 and len(backends) == 7
    assert {backends[name] for name in of_drafts} == {"CPU_ATTN"}
    assert {b for n, b in backends.items() if n not in of_drafts} == {"SPARQ"}
    assert figures["decode_rows"] == 4 * figures["decode_tokens"]
    assert figures["sparse_rows"] > 0.5 * figures["decode_rows"]
    assert all(head["rows"] for n in set(backends) - of_drafts for head in kept[n])


def test_a_sparse_draft_model_over_quantised_blocks():
    _, backends, kept, accepted = assert_drafts_change_nothing(
        "draft_model", "int8", draft_backend="sparq"
    )
    assert accepted > 20
    assert set(backends.values()) == {"SPARQ"}
    # The drafter chooses tokens in every layer of its own.
    rows = {name: heads[0]["rows"] for name, heads in kept.items()}
    of_drafts = {rows[n] for n in rows if n.startswith("draft_model.")}
    of_target = {rows[n] for n in rows if not n.startswith("draft_model.")}
    assert len(of_drafts) == len(of_target) == 1
    # k + 2 positions and k - 1 steps of one, for k + 1 verified positions.
    assert of_drafts.pop() > 1.3 * of_target.pop() > 0


@pytest.mark.slow
@pytest.mark.parametrize("draft_backend", [None, "sparq"])
@pytest.mark.parametrize(
    "method, options",
    [
        *(("draft_model", options) for options in OPTIONS),
        *product(("eagle", "eagle3", "mtp"), ("sparse", "int8", "k8v4")),
    ],
)
def test_drafts_change_nothing(method, options, draft_backend):
    _, backends, _, accepted = assert_drafts_change_nothing(
        method, options, draft_backend
    )
    layers = 4  # of the target
    drafters = list(backends.values())[layers:]
    assert set(list(backends.values())[:layers]) == {"SPARQ"}
    assert set(drafters) == {"CPU_ATTN" if draft_backend is None else "SPARQ"}
    assert accepted > 20 or method != "draft_model"


def test_a_sparse_drafter_of_a_dense_target():
    """The target's tokens are vLLM's own, and only drafts are counted."""
    with drafting(None, SPARSE, attention_backend="CPU_ATTN") as llm:
        expected = tokens(generate(llm, PROMPTS, PARAMS))
    with drafting(
        "eagle", SPARSE, attention_backend="CPU_ATTN", draft_backend="sparq"
    ) as llm:
        assert tokens(generate(llm, PROMPTS, PARAMS)) == expected
        backends = list(llm.collective_rpc(layer_backends)[0].values())
        assert backends == ["CPU_ATTN"] * 4 + ["SPARQ"] * 2
        figures = stats(llm)
    assert figures["sparse_rows"] > 0.5 * figures["decode_rows"]
    assert figures["decode_rows"] == 2 * figures["decode_tokens"] > 0


@pytest.mark.slow
def test_a_backend_for_a_kind_of_layers_serves_drafts_too():
    """vLLM asks ``backend_per_kind`` first, also for the draft model's layers."""
    expected = without_speculation("sparse", "Llama")
    per_kind = {"backend_per_kind": {"full_attention": "sparq"}}
    with drafting(
        "draft_model",
        OPTIONS["sparse"],
        attention_backend=None,
        attention_config=per_kind,
    ) as llm:
        assert tokens(generate(llm, PROMPTS, PARAMS)) == expected
        assert set(llm.collective_rpc(layer_backends)[0].values()) == {"SPARQ"}


@pytest.mark.slow
@pytest.mark.parametrize("options", ["dense", "int8 dense"])
@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_preempted_requests_give_the_same_tokens(method, options):
    # Two blocks each at first and three in the end, quantised ones four blocks ahead.
    prompts = dict(zip("abc", (PROMPTS[2], PROMPTS[1], PROMPTS[3])))
    params = greedy(140, **COLD)
    with drafting(None, OPTIONS[options]) as llm:
        expected = tokens(generate(llm, list(prompts.values()), params))
    preempted = set()
    with drafting(method, OPTIONS[options], draft_backend="sparq") as llm:

        def watch():
            found = scheduled(llm).items()
            preempted.update(n for n, r in found if r.num_preemptions)

        with few_free_blocks(llm, 5 if options == "dense" else 13):
            for name, prompt in prompts.items():
                add(llm, name, prompt, params)
            finished = step_until_done(llm, watch)
    assert preempted
    assert [finished[name] for name in prompts] == expected


@pytest.mark.slow
def test_drafts_near_the_end_of_the_context():
    """Drafts that do not fit are not stored, and not asked for."""
    prompt = random_prompts(1000)
    with drafting(None, OPTIONS["int8"]) as llm:
        expected = tokens(generate(llm, prompt, greedy(24)))
    with drafting("draft_model", OPTIONS["int8"], draft_backend="sparq") as llm:
        assert tokens(generate(llm, prompt, greedy(24))) == expected


@pytest.mark.slow
@pytest.mark.parametrize("options, most", [({"selector": "dense"}, 1.02), (SPARSE, 4)])
def test_what_verifying_three_drafts_reads(options, most):
    """Dense rows of a request share one reading, sparse ones have a list each."""
    per_step = []
    for method, positions in ((None, 1), ("draft_model", 4)):
        with drafting(method, options) as llm:
            generate(llm, random_prompts(900), greedy(40))
            figures = stats(llm)
        steps = figures["decode_tokens"] / positions
        per_step.append(figures["kv_bytes_read"] / steps)
    assert 0.97 * most < per_step[1] / per_step[0] < 1.03 * most


@pytest.mark.parametrize(
    "sparse, speculation, message",
    [
        (SPARSE | {"topk": 1}, dict(method="eagle"), "topk"),
        (SPARSE | {"rank": 65}, dict(method="eagle"), "rank"),
        (SPARSE, dict(method="ngram"), "'ngram' has no attention: remove it"),
    ],
)
def test_options_and_backends_of_drafts_are_checked(sparse, speculation, message):
    method = speculation["method"]
    options = dict(attention_backend="CPU_ATTN")
    if method == "ngram":
        options["speculative_config"] = dict(
            method=method,
            num_speculative_tokens=3,
            prompt_lookup_max=3,
            attention_backend="sparq",
        )
        method = None
    with (
        pytest.raises(Exception, match=message),
        drafting(method, sparse, draft_backend="sparq", **options),
    ):
        pass

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Lines that leave anchors, in vLLM's engine, against a masked forward."""

import json
import shutil

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from vllm_sparse.anchor_config import FILE, AnchorConfig  # noqa: E402
from vllm_sparse.cache.lines import (  # noqa: E402
    NEAR_BLOCKS,
    anchors,
    near_start,
    visible,
)
from vllm_sparse.stats import live_figures  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    NGRAM,
    add,
    few_free_blocks,
    generate,
    greedy,
    scheduled,
    stats,
    step_until_done,
    tokens,
)
from .family_runs import poison  # noqa: E402
from .masked import Lower, log_probabilities  # noqa: E402
from .test_streaming import ANSWERS, PARAMS, PROMPTS, pool, streaming  # noqa: E402
from .tiny import VOCABULARY, random_prompts, save_llama  # noqa: E402

pytestmark = pytest.mark.engine
# A line of some twelve tokens, as code has.
LINE_ENDS = tuple(range(5, VOCABULARY, 12))
# Layer-wise anchors; anchors that do not see those before them.
RULES = {
    "plain": AnchorConfig(LINE_ENDS),
    "lower layers": AnchorConfig(LINE_ENDS, True, {2: 0, 1: 0}),
    "look at their lines": AnchorConfig(LINE_ENDS, anchors_look_back=False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def anchored(folder, rules: str = "plain", **options):
    RULES[rules].write(folder)
    own = {"attention_backend": "anchor", "additional_config": {}}
    return streaming(folder, "", **own | options)


def marked(text: list[int]) -> torch.Tensor:
    return anchors(torch.isin(torch.tensor(text), torch.tensor(LINE_ENDS)))


def expected(folder, text: list[int], rules: str = "plain") -> torch.Tensor:
    """What one forward of the whole text says."""
    config, anchor = RULES[rules], marked(text)
    mask = visible(anchor, config.anchors_look_back)
    place = torch.arange(len(text))
    older = mask & anchor & (place < near_start(place)[:, None])
    lower = Lower(config.lower_layers, older)
    return log_probabilities(folder, text, mask, lower=lower)


def check(folder, prompts, outputs, rules: str = "plain") -> None:
    """The tokens are the likeliest, and their log-probabilities the model's."""
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0]
        found = expected(folder, prompt + list(answer.token_ids), rules)
        found = found[len(prompt) - 1 : -1]
        assert list(answer.token_ids) == found.argmax(-1).tolist()
        got = [s[t].logprob for s, t in zip(answer.logprobs, answer.token_ids)]
        torch.testing.assert_close(torch.tensor(got), found.amax(-1), atol=1e-3, rtol=0)


def test_answers_are_those_of_a_masked_forward(folder):
    """In company; from the prefix cache; in odd chunks."""
    with anchored(folder) as llm:
        poison(llm)
        free = pool(llm).get_num_free_blocks()
        llm.collective_rpc("reset_sparse_stats")
        check(folder, PROMPTS, generate(llm, PROMPTS, PARAMS))
        figures = stats(llm)
        assert 0 < figures["sparse_rows"] == figures["decode_rows"]
        assert figures["kv_bytes_read"] < 0.6 * figures["kv_bytes_dense"]
        long = random_prompts(1200, 1900)
        params = greedy(20, logprobs=1, detokenize=False)
        check(folder, long, generate(llm, long, params))
        hits = generate(llm, long, params)
        check(folder, long, hits)
        assert sum(output.num_cached_tokens for output in hits) >= 2048
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.max_num_scheduled_tokens = 100
        cold = [greedy(n, logprobs=1, detokenize=False, **COLD) for n in ANSWERS]
        check(folder, PROMPTS, generate(llm, PROMPTS, cold))
        assert pool(llm).get_num_free_blocks() == free


def test_other_masks_would_be_noticed(folder):
    """The control."""
    text = PROMPTS[2]
    found = [expected(folder, text, rules)[-1] for rules in RULES]
    every = torch.ones(len(text), len(text)).tril().bool()
    for mask in every, visible(marked(text).roll(1)):
        found.append(log_probabilities(folder, text, mask)[-1])
    for other in found[1:]:
        assert (found[0] - other).abs().max() > 0.05


@pytest.mark.parametrize("rules", [name for name in RULES if name != "plain"])
def test_other_rules(folder, rules):
    prompts, params = PROMPTS[:3], PARAMS[:3]
    with anchored(folder, rules) as llm:
        check(folder, prompts, generate(llm, prompts, params), rules)
        llm.llm_engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = 100
        cold = [greedy(60, logprobs=1, detokenize=False, **COLD) for _ in prompts]
        check(folder, prompts, generate(llm, prompts, cold), rules)


def test_what_old_lines_held_is_given_back(folder):
    """Read from the pool: a context of 2,000 tokens in 7 blocks, of which it would take
    16; at least 70 % of the blocks of old lines are free."""
    (prompt,) = random_prompts(300)
    held, seen, count = [], [], 1700
    with anchored(folder, max_num_batched_tokens=256) as llm:
        blocks = pool(llm)
        with few_free_blocks(llm, 7):
            add(llm, "long", prompt, greedy(count, detokenize=False))

            def watch():
                held.append(7 - blocks.get_num_free_blocks())
                if len(held) == count - 100:
                    seen.append(live_figures(llm))

            finished = step_until_done(llm, watch)
    assert len(finished["long"]) == count
    anchor_blocks = 2
    lines = (len(prompt) + count) // 128
    assert max(held[-500:-1]) <= anchor_blocks + NEAR_BLOCKS + 2
    assert 1 - (max(held[-500:-1]) - anchor_blocks) / lines >= 0.7
    (figures,) = seen
    page = 2 * (128 * 2 * 64 * 4 + 128 * 4) * 3  # heads, rows and marks, layers
    assert figures.kv_bytes_held == page * held[count - 101]
    lines = (len(prompt) + count - 100) // 128
    assert figures.blocks_given_back in (lines - NEAR_BLOCKS, lines - NEAR_BLOCKS - 1)


def decode_together(llm, prompts, params) -> tuple[list[list[int]], int, int]:
    """Answers, the most requests that decoded in one step, and how often requests were
    preempted."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    decoding, preempted = [], {}

    def watch():
        decoding.append(sum(r.num_output_tokens > 0 for r in scheduler.running))
        found = scheduled(llm).items()
        preempted.update({name: r.num_preemptions for name, r in found})

    for i, prompt in enumerate(prompts):
        add(llm, str(i), prompt, params)
    finished = step_until_done(llm, watch)
    answers = [finished[str(i)] for i in range(len(prompts))]
    return answers, max(decoding), sum(preempted.values())


def cache_bytes(llm) -> int:
    """Lines and anchors lie in the same ones."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    (size,) = {tensor.size for tensor in scheduler.kv_cache_config.kv_cache_tensors}
    return size


def test_a_batch_that_does_not_fit_densely(folder, monkeypatch):
    """The same memory: with dense attention two requests of six run at a time, here all
    decode at once, and say what they say alone."""
    # It would replace the size that is asked for.
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    batch = random_prompts(*[1900] * 6)
    params = greedy(60, detokenize=False, **COLD)
    memory = 5800 * 3 * 2 * 2 * 64 * 4  # tokens, layers, heads, K and V in fp32
    options = dict(kv_cache_memory_bytes=memory)
    options |= dict(max_num_seqs=len(batch), max_num_batched_tokens=256)
    with anchored(folder, attention_backend="CPU_ATTN", **options) as llm:
        dense = cache_bytes(llm)
        _, most, _ = decode_together(llm, batch, params)
        assert most == 2
    with anchored(folder, **options) as llm:
        assert cache_bytes(llm) <= dense <= memory
        answers, most, preemptions = decode_together(llm, batch, params)
        assert most == len(batch) and not preemptions
        assert answers == [tokens(generate(llm, [p], params))[0] for p in batch]


def test_preempted_requests_give_the_same_answers(folder):
    prompts, names = random_prompts(129, 130, 131), "abc"
    preempted = set()
    params = greedy(300, detokenize=False, **COLD)
    with anchored(folder, max_num_batched_tokens=256) as llm:
        expected = tokens(generate(llm, prompts, params))

        def watch():
            found = scheduled(llm).items()
            preempted.update(n for n, r in found if r.num_preemptions)

        with few_free_blocks(llm, 9):
            for name, prompt in zip(names, prompts, strict=True):
                add(llm, name, prompt, params)
            finished = step_until_done(llm, watch)
    assert [finished[name] for name in names] == expected
    assert preempted


@pytest.mark.slow
def test_drafts_change_nothing(folder):
    """Rejected drafts may have ended lines, and long ones blocks."""
    prompts = [PROMPTS[3][:150] * 3, PROMPTS[0]]
    params = greedy(150, logprobs=1, detokenize=False)
    # vLLM starts no engine in a process that has drafted by ngram.
    options = dict(in_process=False, speculative_config=NGRAM)
    with anchored(folder, **options) as llm:
        outputs = [generate(llm, prompts, params) for _ in range(2)]
    for found in outputs:
        check(folder, prompts, found)


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({"top_k": 0.5}, "top_k = 0.5 does nothing where only a text's lines"),
        ({"kv_format": "k8v4"}, "kv_format = 'k8v4' does nothing where only a text's"),
    ],
)
def test_options_without_meaning_are_refused(folder, sparse, message):
    with (
        pytest.raises(Exception, match=message),
        anchored(folder, additional_config={"sparse": sparse}),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "serves models that were trained with anchors"),
        ({"line_group": 4}, "has line_group 4, this version serves 8"),
        ({"lower_layers": {"7": 2}}, r"names layers \[7\], which the model has not"),
        ({"lower_layers": {"1": 2}}, "it must be a lower one"),
        ({"line_ends": [5, 512]}, "names token 512, which the model has not"),
    ],
)
def test_models_without_fitting_anchors_are_refused(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / FILE
    RULES["plain"].write(file.parent)
    if change is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    own = {"attention_backend": "anchor", "additional_config": {}}
    with (
        pytest.raises(Exception, match=message),
        streaming(file.parent, "", **own),
    ):
        pass


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"enable_prompt_embeds": True}, "remove --enable-prompt-embeds"),
        (
            {"disable_hybrid_kv_cache_manager": True},
            "remove --disable-hybrid-kv-cache-manager",
        ),
        ({"additional_config": {"sparse": {"selector": "sparq"}}}, "'anchor' belongs"),
    ],
)
def test_engines_that_cannot_have_anchors_are_refused(folder, option, message):
    with pytest.raises(Exception, match=message), anchored(folder, **option):
        pass


@pytest.mark.slow
def test_larger_blocks(folder):
    """vLLM's have two of ours; and a context that ends where the model's does."""
    prompts = [*PROMPTS[:3], *random_prompts(1480)]
    params = [*PARAMS[:3], PARAMS[1]]
    with anchored(folder, block_size=256, max_model_len=1500) as llm:
        poison(llm)
        for _ in range(2):
            check(folder, prompts, generate(llm, prompts, params))


@pytest.mark.slow
def test_two_ranks_give_the_same_answers(folder, monkeypatch):
    params = greedy(60, logprobs=1, detokenize=False)
    # Threads that spin would take the cores from the other rank.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ranks = dict(tensor_parallel_size=2, distributed_executor_backend="mp")
    with anchored(folder, in_process=False, **ranks) as llm:
        check(folder, PROMPTS[:4], generate(llm, PROMPTS[:4], params))

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Lossless engines whose layers are of several kinds, and whose contexts are fitted to
the memory: drafts must stay in the blocks of their own request."""

import pytest

pytest.importorskip("vllm")

from .engines import EXTENSION, generate, greedy, tokens  # noqa: E402
from .family_runs import assert_same, family, needs_clearing, passes, poison  # noqa: E402
from .lossless import DENSE_ENGINE, LOSSLESS, Drafts, lossless, running  # noqa: E402
from .tiny import random_prompts, save_llama  # noqa: E402

pytestmark = pytest.mark.engine
# Windows; windows with a cap; shared caches; chunks; experts.
ALWAYS = ["Gemma 3, 8 KV heads"]
SLOW = ["Gemma 2", "Gemma 3n", "Gemma 4", "Llama 4", "Phi-3", "Mixtral"]


@pytest.mark.parametrize(
    "name", [*ALWAYS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_families_answer_as_stock_vllm(name):
    """Alone, three at a time, and from the prefix cache, which is full of NaN."""
    with family(name, None) as llm:
        expected = passes(llm, name)
    with family(name, LOSSLESS | {"top_k": 48}, disable_log_stats=False) as llm:
        if needs_clearing(llm):
            poison(llm)
        drafts = Drafts(llm)
        got = passes(llm, name)
        assert 0 < drafts.accepted <= drafts.drafted
    for case, outputs in got.items():
        assert_same(name, outputs, expected[case])


def test_a_context_that_vllm_fits_to_the_memory(tmp_path):
    """To its end, beside others: nothing is drafted beyond what the blocks hold."""
    folder = str(save_llama(tmp_path))
    settings = dict(model=folder, skip_tokenizer_init=True, max_model_len=-1)
    settings |= dict(num_gpu_blocks_override=10, max_num_seqs=2)
    with running(**settings | DENSE_ENGINE, block_size=128) as llm:
        longest = llm.llm_engine.vllm_config.model_config.max_model_len
    with lossless(**settings) as llm:
        assert llm.llm_engine.vllm_config.model_config.max_model_len == longest < 2048
        prompts = random_prompts(longest - 30, 20)
        params = greedy(100, detokenize=False)
        together = tokens(generate(llm, prompts, params))
    assert [len(ids) for ids in together] == [30, 100]
    options = settings | {"max_model_len": longest}
    with running(**options | DENSE_ENGINE) as llm:
        assert tokens(generate(llm, prompts, params)) == together


def test_another_engine_of_the_process_had_the_same_worker_extension(tmp_path):
    """Which vLLM puts into its own worker's class for good."""
    folder = str(save_llama(tmp_path))
    settings = dict(model=folder, skip_tokenizer_init=True)
    own = dict(attention_backend="sparq", worker_extension_cls=EXTENSION)
    for _ in range(2):
        with running(**settings | own) as llm:
            llm.collective_rpc("reset_sparse_stats")
        with lossless(**settings) as llm:
            llm.collective_rpc("reset_sparse_stats")

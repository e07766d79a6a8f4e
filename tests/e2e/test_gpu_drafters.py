# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Draft models and EAGLE heads beside our layers on a GPU: vLLM's V2 runner, graphs."""

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from .drafters import SPARSE, accepted_tokens, drafting, layer_backends  # noqa: E402
from .engines import assert_same_but_for_ties, generate, greedy, stats  # noqa: E402
from .family_runs import FULL  # noqa: E402
from .tiny import random_prompts  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GRAPHS = dict(
    dtype="bfloat16",
    enforce_eager=False,
    compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
)
PROMPTS = random_prompts(127, 128, 300, 450)
PARAMS = greedy(60, logprobs=4)


@pytest.mark.parametrize("sparse", [FULL, SPARSE], ids=["full", "sparse"])
@pytest.mark.parametrize(
    "method, draft_backend",
    [("draft_model", None), ("eagle", None), ("eagle", "flash_attn")],
)
def test_drafts_change_no_token_but_for_ties(method, draft_backend, sparse):
    """Sparse rows round otherwise in other company, which moves choices of tokens."""
    with drafting(None, sparse, **GRAPHS) as llm:
        expected = generate(llm, PROMPTS, PARAMS)
    with drafting(method, sparse, draft_backend=draft_backend, **GRAPHS) as llm:
        backends = list(llm.collective_rpc(layer_backends)[0].values())
        for _ in range(2):  # the second time from the prefix cache
            got = generate(llm, PROMPTS, PARAMS)
            if sparse is FULL:
                assert_same_but_for_ties(got, expected, 0.3, most=4)
        figures = stats(llm)
        accepted = accepted_tokens(llm)
    # vLLM's V2 runner gives drafts the target's backend where nothing is said.
    assert set(backends[:4]) == {"SPARQ"}
    assert set(backends[4:]) == {"FLASH_ATTN" if draft_backend else "SPARQ"}
    if draft_backend:
        assert figures["decode_rows"] == 4 * figures["decode_tokens"]
    assert accepted > 20 or method == "eagle"
    assert (figures["sparse_rows"] > 0) == (sparse is SPARSE)


def test_a_backend_that_a_draft_model_would_not_get_is_refused():
    with (
        pytest.raises(Exception, match="FLASH_ATTN in --speculative-config does"),
        drafting("draft_model", SPARSE, draft_backend="flash_attn", **GRAPHS),
    ):
        pass

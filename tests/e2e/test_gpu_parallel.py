# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Ranks of vLLM's executors on GPUs, Ray's with as many ranks as there are GPUs."""

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from .engines import (  # noqa: E402
    COLD,
    EXTENSION,
    SPARSE,
    assert_same_but_for_ties,
    generate,
    greedy,
    running,
    tokens,
)
from .test_gpu_engine import SETTINGS  # noqa: E402
from .test_gpu_lossless import LOSSLESS, speculated  # noqa: E402
from .tiny import random_prompts, save_llama  # noqa: E402

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not GPUS, reason="needs a CUDA device"),
]
PROMPTS = random_prompts(129, 300, 450, 700, 900)
PARAMS = greedy(60, logprobs=4, detokenize=False, **COLD)
# Random weights have many near ties.
GAP = 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def expected(model):
    with running(
        **SETTINGS | dict(max_model_len=2048),
        model=model,
        skip_tokenizer_init=True,
        attention_backend="FLASH_ATTN",
    ) as llm:
        return generate(llm, PROMPTS, PARAMS)


@pytest.mark.parametrize("sparse", [SPARSE, LOSSLESS], ids=["sparse", "lossless"])
@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_ranks_serve_as_one_does(executor, sparse, model, expected):
    """Lossless: FLASH_ATTN's texts but for ties. Every rank reads its own KV heads."""
    ranks = min(2, GPUS)
    if executor == "mp" and ranks < 2:
        pytest.skip("needs two GPUs")
    if executor == "ray":
        pytest.importorskip("ray")
    with running(
        **SETTINGS | dict(max_model_len=2048, disable_log_stats=False),
        in_process=False,
        model=model,
        skip_tokenizer_init=True,
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": sparse},
        tensor_parallel_size=ranks,
        distributed_executor_backend=executor,
    ) as llm:
        got = generate(llm, PROMPTS, PARAMS)
        again = generate(llm, PROMPTS, PARAMS)
        stats = llm.collective_rpc("sparse_stats")
        counts = speculated(llm) if sparse is LOSSLESS else {}
    assert len(stats) == ranks
    assert len({rank["kv_bytes_read"] for rank in stats}) == 1
    assert all(rank["sparse_rows"] > 0 for rank in stats)
    if sparse is not LOSSLESS:
        assert tokens(again) == tokens(got)
    else:
        # Asynchronous scheduling decides how many drafts a step verifies, which decides
        # on rounding: all may part, but only where two tokens are nearly equal.
        assert_same_but_for_ties(again, got, GAP, most=len(PROMPTS))
        assert_same_but_for_ties(got, expected, GAP, most=len(PROMPTS))
        assert 0 < counts["accepted_tokens"] < counts["draft_tokens"]

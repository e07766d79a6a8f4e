# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Checkpoints with quantised weights: attention sees 16 bits, as in any other."""

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402

from .engines import (  # noqa: E402
    DENSE,
    EXTENSION,
    SPARSE,
    assert_same_but_for_ties,
    configure,
    generate,
    greedy,
    running,
    stats,
    tokens,
)
from .quantised_weights import FORMATS, save_quantised  # noqa: E402
from .tiny import random_prompts  # noqa: E402

pytestmark = pytest.mark.engine
STOCK = {"cpu": "CPU_ATTN", "cuda": "FLASH_ATTN"}
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
GROUPED = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"),
    reason="stock vLLM has no products with 4-bit weights for CPUs without AVX-512",
)
CASES = [
    pytest.param("AWQ", "cpu", marks=GROUPED),
    pytest.param("GPTQ", "cpu", marks=(GROUPED, pytest.mark.slow)),
    # Not a scale per matrix: its kernel (static_scaled_fp8_quant) is not for CPUs.
    *[pytest.param(n, "cpu", marks=pytest.mark.slow) for n in ("INT8", "FP8")],
    *[pytest.param(n, "cuda", marks=GPU) for n in FORMATS],
]


@pytest.mark.parametrize("weights, device", CASES)
def test_quantised_weights(weights, device, tmp_path):
    """A full budget gives stock vLLM's tokens but for ties; a real one is sparse."""
    prompts = random_prompts(600, 130, 300, 450)
    params = greedy(20, logprobs=4, detokenize=False)
    settings = dict(
        model=str(save_quantised(weights, tmp_path)),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        kv_cache_memory_bytes=2**28,
        max_model_len=1024,
    )
    with running(**settings, attention_backend=STOCK[device]) as llm:
        assert llm.llm_engine.model_config.quantization is not None
        expected = generate(llm, prompts, params)
    assert len(set(map(tuple, tokens(expected)))) == len(prompts)
    with running(
        **settings,
        attention_backend="sparq",
        additional_config={"sparse": DENSE},
        worker_extension_cls=EXTENSION,
    ) as llm:
        # Where inputs are quantised, too, rounding moves whole codes.
        exact = device == "cpu" or weights in ("AWQ", "GPTQ")
        gap, most = (0.15, None) if exact else (0.4, len(prompts))
        assert_same_but_for_ties(generate(llm, prompts, params), expected, gap, most)
        configure(llm, SPARSE)
        generate(llm, prompts, params)
        totals = stats(llm)
    assert totals["sparse_rows"] == totals["decode_rows"] == 3 * 4 * 19

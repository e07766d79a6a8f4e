# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What cannot be served ends in an error that says what to change.

Wrong options: test_engine.py, test_server.py. A killed worker: test_parallel.py. Other
plugins, and a registration that fails: tests/unit/test_registration.py.
"""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from .engines import generate, greedy, running, tokens  # noqa: E402
from .tiny import VOCABULARY, random_prompts, save_llama  # noqa: E402

pytestmark = pytest.mark.engine
TINY = dict(
    skip_tokenizer_init=True, dtype="float32", attention_backend="sparq", max_num_seqs=2
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def mla(tmp_path) -> Path:
    """The shape of a small DeepSeek-V2, whose attention is latent."""
    config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_latent_attention_is_refused(mla):
    with (
        pytest.raises(ValueError) as error,
        running(model=str(mla), load_format="dummy", **TINY),
    ):
        pass
    assert str(error.value) == (
        "--attention-backend sparq does not serve models with multi-head latent "
        "attention (MLA): leave --attention-backend out"
    )


@pytest.mark.parametrize(
    ("kv_format", "memory"), [("auto", 3 << 19), ("int4", 1 << 20)]
)
def test_a_cache_too_small_names_a_length_that_fits(
    llama, kv_format, memory, monkeypatch
):
    """Also where requests hold blocks ahead of their tokens."""
    # It would replace the size that is asked for.
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    settings = TINY | dict(
        model=str(llama),
        kv_cache_memory_bytes=memory,
        additional_config={"sparse": {"kv_format": kv_format, "dense_below": 0}},
    )
    with (
        pytest.raises(ValueError, match="decreasing `max_model_len`") as error,
        running(max_model_len=2048, **settings),
    ):
        pass
    found = re.search(r"estimated maximum model length is (\d+)", str(error.value))
    assert found, error.value
    longest = int(found[1])
    assert 128 <= longest < 2048
    with running(max_model_len=longest, **settings) as llm:
        (prompt,) = random_prompts(longest - 20)
        outputs = generate(llm, [prompt], greedy(20, detokenize=False))
        assert len(tokens(outputs)[0]) == 20

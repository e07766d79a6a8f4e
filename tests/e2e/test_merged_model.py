# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Models of the training room in stock vLLM: the trained model's answers."""

import pytest

pytest.importorskip("vllm")

import torch  # noqa: E402

from vllm_sparse import checkpoint  # noqa: E402
from vllm_sparse.train import lora, pretrain  # noqa: E402
from vllm_sparse.train.forward import hidden_states, load_model  # noqa: E402
from vllm_sparse.train.merge import KIND, merge  # noqa: E402

from .engines import greedy, running, tokens  # noqa: E402
from .tiny import VOCABULARY, random_prompts, save_llama  # noqa: E402

pytestmark = pytest.mark.engine
# Of the base model: 2,048 tokens and a base of 10,000.
CONTEXT, THETA, RANK, ALPHA, NEW = 2560, 80_000.0, 4, 8.0, 8


def trained_model(folder):
    """Random factors, as bf16 holds them."""
    model = load_model(folder, torch.device("cpu"), THETA)
    lora.add_lora(model, RANK, ALPHA)
    with torch.no_grad():
        for parameter in lora.factors(model).values():
            parameter.normal_(std=0.1)
            parameter.copy_(parameter.bfloat16())
    return model


@torch.no_grad()
def continuation(model, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW):
        positions = torch.arange(len(ids))[None]
        hidden = hidden_states(model, torch.tensor([ids]), positions)[0, -1]
        ids.append(int((hidden @ model.lm_head.weight.T).argmax()))
    return ids[len(prompt) :]


def test_stock_vllm_serves_the_merged_model(tmp_path):
    base = save_llama(tmp_path / "base")
    trained = trained_model(base)
    factors = {n: p.bfloat16() for n, p in lora.factors(trained).items()}
    described = {
        "rope_theta": THETA,
        "max_position_embeddings": CONTEXT,
        "rank": RANK,
        "alpha": ALPHA,
        "modules": list(lora.ATTENTION),
    }
    checkpoint.save(tmp_path / "ckpt", KIND, factors, base, described, {}, "")
    merged = merge(tmp_path / "ckpt", base, tmp_path / "merged")
    prompts = random_prompts(40, 2300)
    expected = [continuation(trained, prompt) for prompt in prompts]
    untrained = load_model(base, torch.device("cpu"))
    assert all(
        continuation(untrained, p) != e for p, e in zip(prompts, expected, strict=True)
    )
    with running(
        model=str(merged),
        attention_backend="CPU_ATTN",
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=CONTEXT,
    ) as llm:
        batch = [{"prompt_token_ids": p} for p in prompts]
        params = greedy(NEW, detokenize=False)
        assert tokens(llm.generate(batch, params, use_tqdm=False)) == expected


class Tokenizer(list):
    """As many ids as the toy models have."""

    bos_token_id = eos_token_id = 0


def test_stock_vllm_and_ours_serve_a_pretrained_model(tmp_path):
    """QK-norm at head size 128, by CPU_ATTN and by sparq with a full budget."""
    options = "--data . --tokenizer . --out . --layers 2 --hidden 64 --intermediate 128"
    shape = "--heads 4 --kv-heads 2 --lengths 1024 --shares 1 --evaluate-lengths 512"
    args = pretrain.arguments_of(f"{options} {shape}".split())
    cpu = torch.device("cpu")
    model = pretrain.build(args, Tokenizer([0] * VOCABULARY), cpu)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15, generator=generator)
        elif "_norm" in name and "layernorm" not in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0, generator=generator)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "run.json").write_text("{}")
    pretrain.write(model, tmp_path / "tokenizer", tmp_path)
    prompts = random_prompts(40, 700)
    served = load_model(tmp_path / "model", cpu)
    expected = [continuation(served, prompt) for prompt in prompts]
    full = {"sparse": {"top_k": 1.0, "dense_below": 0}}
    for backend, more in (("CPU_ATTN", {}), ("sparq", full)):
        with running(
            model=str(tmp_path / "model"),
            attention_backend=backend,
            additional_config=more,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=1024,
        ) as llm:
            batch = [{"prompt_token_ids": p} for p in prompts]
            params = greedy(NEW, detokenize=False)
            assert tokens(llm.generate(batch, params, use_tqdm=False)) == expected

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""One family of models in vLLM's engine: alone, in company, from the prefix cache.

Everything runs in few blocks, so that requests and kinds of layers use each other's.
"""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from vllm import LLM

from .engines import (
    COLD,
    EXTENSION,
    assert_same_but_for_ties,
    greedy,
    running,
    stats,
    tokens,
)
from .families import FAMILIES, VOCABULARY, save_config, save_whisper_processor

# Long answers stay while others come and go.
PROMPTS = (300, 517, 130, 690, 257, 128, 400, 65)
ANSWERS = (130, 12, 24, 8, 90, 24, 8, 30)
FULL = {"top_k": 1.0, "dense_below": 0}
# vLLM's CPU kernels for gated delta nets take nothing else.
BFLOAT16 = ("Qwen3-Next", "Qwen3.5", "Qwen3.5-MoE")
# Stock vLLM 0.32 fails there on CPUs.
NO_PREFIX_CACHE = ("Granite hybrid", "Falcon-H1", "Nemotron-H", "Whisper")
# No layer of theirs can be ours, whatever the options.
REFUSED = ("BLOOM", "Mistral, all windows")
# Refused with a quantised cache: chunks, layers that share a cache.
NO_FORMAT = ("Llama 4", "Gemma 3n")


@contextmanager
def family(name: str, sparse: dict | None, device: str = "cpu", **options):
    """An engine with a family's model.

    Args:
        sparse: options of ours; None: stock vLLM.
    """
    model_type = FAMILIES[name][1]
    length = 400 if model_type == "whisper" else 1024
    settings = dict(
        load_format="by_name",
        dtype="bfloat16" if name in BFLOAT16 or device == "cuda" else "float32",
        max_model_len=length,
        max_num_batched_tokens=1024,
        max_num_seqs=3,
        num_gpu_blocks_override=60,
        enable_prefix_caching=name not in NO_PREFIX_CACHE,
        skip_tokenizer_init=model_type != "whisper",
    )
    if "vision_config" in FAMILIES[name][2]:
        settings["language_model_only"] = True
    if sparse is not None:
        settings |= dict(
            attention_backend="sparq",
            additional_config={"sparse": sparse},
            worker_extension_cls=EXTENSION,
        )
    elif device == "cpu":
        settings["attention_backend"] = "CPU_ATTN"
    else:  # blocks of 16 tokens: as many as fit
        del settings["num_gpu_blocks_override"]
    with tempfile.TemporaryDirectory() as folder:
        save_config(name, Path(folder))
        if model_type == "whisper":
            save_whisper_processor(Path(folder))
        with running(model=folder, **settings | options) as llm:
            if sparse is not None and "worker_extension_cls" not in options:
                # Engines before it in this process have counted, too.
                llm.collective_rpc("reset_sparse_stats")
            yield llm


def requests(name: str) -> list[dict]:
    """The same for every engine."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> dict:
        drawn = torch.randint(3, VOCABULARY, (count,), generator=generator)
        return {"prompt_token_ids": drawn.tolist()}

    if FAMILIES[name][1] != "whisper":
        return [ids(n) for n in PROMPTS]

    def heard() -> dict:
        sound = torch.randn(20_000, generator=generator).numpy()
        return {"prompt": "", "multi_modal_data": {"audio": (sound, 16_000)}}

    return [{"encoder_prompt": heard(), "decoder_prompt": ids(n // 4)} for n in PROMPTS]


def alone(llm: LLM, name: str) -> list[list[int]]:
    """Every request by itself, nothing cached: what the answers should be."""
    return tokens(alone_outputs(llm, name))


def alone_outputs(llm: LLM, name: str, **options) -> list:
    """The same as vLLM's outputs."""
    return [
        llm.generate([r], _greedy(n, **COLD, **options), use_tqdm=False)[0]
        for r, n in zip(requests(name), ANSWERS)
    ]


def together(llm: LLM, name: str, **options) -> list[list[int]]:
    """Three at a time, in the order of their numbers."""
    return tokens(answers(llm, name, **options))


def answers(llm: LLM, name: str, **options) -> list:
    """The same as vLLM's outputs."""
    params = [_greedy(n, **options) for n in ANSWERS]
    return llm.generate(requests(name), params, use_tqdm=False)


def _greedy(count: int, **options):
    return greedy(count, detokenize=False, **options)


def poison(llm: LLM) -> None:
    """Fill the KV cache with NaN (bytes of 255 are one in every dtype)."""
    seen = set()
    for layer in layers(llm):
        cache = getattr(layer, "kv_cache", None)
        for part in cache if isinstance(cache, list | tuple) else [cache]:
            if not isinstance(part, torch.Tensor) or not part.numel():
                continue
            memory = part.untyped_storage()
            if memory.data_ptr() not in seen:
                seen.add(memory.data_ptr())
                part.new_empty(0, dtype=torch.uint8).set_(memory).fill_(255)


def needs_clearing(llm: LLM) -> bool:
    """Whether vLLM clears blocks before they are used again."""
    core = llm.llm_engine.engine_core.engine_core
    return core.scheduler.kv_cache_config.needs_kv_cache_zeroing


def layers(llm: LLM) -> list:
    config = llm.llm_engine.vllm_config.compilation_config
    return list(config.static_forward_context.values())


def passes(llm: LLM, name: str) -> dict[str, list]:
    """vLLM's outputs alone, together with nothing cached, together and cached."""
    return {
        "alone": alone_outputs(llm, name, logprobs=4),
        "together": answers(llm, name, logprobs=4, **COLD),
        "cached": answers(llm, name, logprobs=4),
        "cached again": answers(llm, name, logprobs=4),
    }


def assert_same(name: str, got: list, expected: list) -> None:
    """The same texts; in bfloat16 they may part at ties."""
    if name in BFLOAT16:
        assert_same_but_for_ties(got, expected)
    else:
        assert tokens(got) == tokens(expected)


def sparse_share(llm: LLM) -> float:
    """Decode rows of our layers that chose tokens."""
    totals = stats(llm)
    return totals["sparse_rows"] / max(1, totals["decode_rows"])

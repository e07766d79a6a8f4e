# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A model's answers by one forward of transformers' with a mask, in fp32."""

from collections.abc import Callable
from functools import cache

import torch


def sinks_and_window(
    length: int, sinks: int, window: int, dense: int = 0
) -> torch.Tensor:
    """What each position attends to, [length, length] bool: the first ``sinks`` tokens,
    the ``window`` tokens before its own block of 128 and that block up to itself; the
    first ``dense`` positions attend to all before them."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for position in range(length):
        first = max(position // 128 * 128 - window, 0)
        if position < dense or first <= sinks:
            first = 0
        mask[position, first : position + 1] = True
        mask[position, : min(sinks, position + 1)] = True
    return mask


@cache
def _model(folder: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def log_probabilities(folder, tokens: list[int], mask: torch.Tensor) -> torch.Tensor:
    """Of every next token, [length, vocabulary]."""
    bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    with torch.inference_mode():
        logits = _model(str(folder))(
            torch.tensor([tokens]), attention_mask=bias[None, None]
        ).logits[0]
    return logits.log_softmax(-1)


def assert_answers(
    folder, prompts, outputs, mask_of: Callable[[int, int], torch.Tensor]
) -> None:
    """The tokens are the likeliest, and their log-probabilities the model's.

    Args:
        mask_of: a mask, of the prompt's length and the whole.
    """
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0]
        tokens = prompt + list(answer.token_ids)
        found = log_probabilities(folder, tokens, mask_of(len(prompt), len(tokens)))
        expected = found[len(prompt) - 1 : -1]
        assert list(answer.token_ids) == expected.argmax(-1).tolist()
        got = [s[t].logprob for s, t in zip(answer.logprobs, answer.token_ids)]
        torch.testing.assert_close(
            torch.tensor(got), expected.amax(-1), atol=1e-3, rtol=0
        )

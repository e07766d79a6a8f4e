# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A model's answers by one forward of transformers' with a mask, in fp32; also with a
state for what the mask leaves out (LESS), or with lower layers' keys (anchors)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F


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


@dataclass(frozen=True)
class State:
    """Learned features of a checkpoint, and which tokens never enter the sums.

    Attributes:
        kernels: tensors by the checkpoint's names.
        sinks: the first tokens of a context.
    """

    kernels: dict[str, torch.Tensor]
    sinks: int

    @classmethod
    def load(cls, folder, sinks: int) -> "State":
        from safetensors.torch import load_file

        return cls(load_file(Path(folder) / "checkpoint.safetensors"), sinks)

    def weights(self, layer: int, query, key, mask) -> torch.Tensor:
        """What stands for exp(q . k) of tokens that a position does not attend to:
        [heads, length, length]; as the paper writes phi and psi, head by head."""
        w = {
            n: self.kernels[f"layers.{layer}.{n}"]
            for n in ["q1", "q2", "k1", "k2", "k3", "s1", "s2"]
        }
        left = (~mask).tril()
        left[:, : self.sinks] = False
        group = query.shape[0] // key.shape[0]
        made = []
        for head in range(query.shape[0]):
            kv = head // group
            phi = F.gelu(F.gelu(query[head] @ w["q1"][head]) @ w["q2"][head]).abs()
            u = w["s1"][kv].abs() * F.gelu(F.gelu(key[kv] @ w["k1"][kv]) @ w["k2"][kv])
            psi = (u + u @ w["k3"][kv] * w["s2"][kv]).abs()
            made.append((phi @ psi.T) * left)
        return torch.stack(made)


@dataclass(frozen=True)
class Lower:
    """Layers that attend to a lower one's keys, too, by number; what of these a
    position sees, [length, length] bool."""

    layers: dict[int, int]
    mask: torch.Tensor


_given: dict = {}  # what the forward under way attends by
_caches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of its layers


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """transformers' interface: [1, heads, length, size] -> [1, length, heads, size]."""
    mask, state, lower = _given["mask"], _given["state"], _given["lower"]
    query, key, value = query[0], key[0], value[0]
    _caches[module.layer_idx] = key, value
    if lower is not None and module.layer_idx in lower.layers:
        other = _caches[lower.layers[module.layer_idx]]
        key, value = torch.cat([key, other[0]], 1), torch.cat([value, other[1]], 1)
        mask = torch.cat([mask, lower.mask], 1)
    group = query.shape[0] // key.shape[0]
    logits = query @ key.repeat_interleave(group, 0).mT * scaling
    weights = logits.exp() * mask
    if state is not None:
        weights = weights + state.weights(module.layer_idx, query, key, mask)
    out = weights @ value.repeat_interleave(group, 0) / weights.sum(-1, keepdim=True)
    return out.transpose(0, 1)[None], None


@cache
def _model(folder: str):
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("masked", _attention)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="masked"
    )


def log_probabilities(
    folder,
    tokens: list[int],
    mask: torch.Tensor,
    state: State | None = None,
    lower: Lower | None = None,
) -> torch.Tensor:
    """Of every next token, [length, vocabulary]."""
    _given.update(mask=mask, state=state, lower=lower)
    with torch.inference_mode():
        logits = _model(str(folder))(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


def assert_near(
    folder,
    prompts,
    outputs,
    mask_of: Callable[[int, int], torch.Tensor],
    state: State | None = None,
    gap: float = 0.3,
) -> None:
    """Of 16-bit engines: no token is less likely than the likeliest by more than
    ``gap`` nats, after the text that the engine itself has given."""
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = prompt + list(output.outputs[0].token_ids)
        mask = mask_of(len(prompt), len(tokens))
        found = log_probabilities(folder, tokens, mask, state)[len(prompt) - 1 : -1]
        chosen = found.gather(1, torch.tensor(tokens[len(prompt) :])[:, None])[:, 0]
        assert (found.amax(-1) - chosen).max() < gap


def assert_answers(
    folder,
    prompts,
    outputs,
    mask_of: Callable[[int, int], torch.Tensor],
    state: State | None = None,
) -> None:
    """The tokens are the likeliest, and their log-probabilities the model's.

    Args:
        mask_of: a mask, of the prompt's length and the whole.
    """
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0]
        tokens = prompt + list(answer.token_ids)
        mask = mask_of(len(prompt), len(tokens))
        found = log_probabilities(folder, tokens, mask, state)
        expected = found[len(prompt) - 1 : -1]
        assert list(answer.token_ids) == expected.argmax(-1).tolist()
        got = [s[t].logprob for s, t in zip(answer.logprobs, answer.token_ids)]
        torch.testing.assert_close(
            torch.tensor(got), expected.amax(-1), atol=1e-3, rtol=0
        )

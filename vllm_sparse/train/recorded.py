# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A model's attention, layer by layer, in transformers' forward: recorded, or replaced.

A step's function gets queries and keys after RoPE, as the serving engine's layers do.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F

# Of a layer's number, query [heads, n, D], key and value [kv heads, n, D], and the
# logits' scale: the layer's result [heads, n, D].
Attention = Callable[
    [int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor
]
NAME = "recorded"
_attention: Attention | None = None


def causal(layer, query, key, value, scale) -> torch.Tensor:
    """What the model does by itself."""
    group = query.shape[0] // key.shape[0]
    key, value = (t.repeat_interleave(group, 0)[None] for t in (key, value))
    out = F.scaled_dot_product_attention(
        query[None], key, value, is_causal=True, scale=scale
    )
    return out[0]


def _hook(module, query, key, value, attention_mask, scaling, **kwargs):
    assert _attention is not None, "outside of `attending`"
    out = _attention(module.layer_idx, query[0], key[0], value[0], scaling)
    return out.transpose(0, 1)[None].to(query.dtype), None


@contextmanager
def attending(model, attention: Attention):
    """Let a model's forwards of one sequence attend so."""
    from transformers import AttentionInterface

    global _attention
    AttentionInterface.register(NAME, _hook)
    before, _attention = model.config._attn_implementation, attention
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation, _attention = before, None

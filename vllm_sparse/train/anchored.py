# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A model's forward with anchors: the rules of cache/lines.py as masks of a batch.

Masks are dense, [batch, 1, n, n]: PyTorch's fused kernels take them, and whatever they
say is what is trained.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..anchor_config import AnchorConfig
from ..cache.lines import anchors, near_start, visible
from .forward import hidden_states

NAME = "lower_anchors"  # in transformers' table of attention functions


def line_ends(tokenizer) -> tuple[int, ...]:
    """Ids of tokens that end a line: their text has a line break, and behind it nothing
    but blanks (the next line's indentation).

    Raises:
        ValueError: there is none.
    """
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    found = tuple(i for i, text in enumerate(texts) if re.search(r"\n[ \t]*$", text))
    if not found:
        raise ValueError(
            "no token of this tokenizer ends a line: anchors of lines need a model "
            "whose tokens keep line breaks"
        )
    return found


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to logits: [..., n, m], 0 where ``seen``, else minus infinity."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))


@dataclass
class Lower:
    """What layers of one forward see of lower layers.

    Attributes:
        layers: as ``AnchorConfig.lower_layers``.
        mask: [batch, 1, n, 2 n], of a layer's own keys, then of the lower layer's.
        kept: by layer, key and value after RoPE, [batch, kv heads, n, D].
    """

    layers: Mapping[int, int]
    mask: torch.Tensor
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def _attend(module, query, key, value, attention_mask, lower: Lower, **kwargs):
    """transformers' attention, of more keys where a layer has a lower one."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = module.layer_idx
    if layer in lower.layers.values():
        lower.kept[layer] = key, value
    if layer in lower.layers:
        keys, values = lower.kept[lower.layers[layer]]
        key, value = torch.cat([key, keys], 2), torch.cat([value, values], 2)
        attention_mask = lower.mask
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


class Anchored:
    """The forward of a model whose old lines leave anchors.

    Raises:
        ValueError: the config names tokens or layers that the model does not have.
    """

    def __init__(self, model, config: AnchorConfig):
        layers = model.config.num_hidden_layers
        if (above := max(config.lower_layers, default=0)) >= layers:
            raise ValueError(f"layer {above} of lower layers: the model has {layers}")
        if max(config.line_ends) >= model.config.vocab_size:
            raise ValueError("line ends beyond the model's vocabulary: another model's")
        self.model, self.config = model, config
        self.ends = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        self.ends[list(config.line_ends)] = True
        self.ends = self.ends.to(model.device)

    def anchors(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens are anchors, each row being a context: [batch, n] bool."""
        return torch.stack([anchors(ends) for ends in self.ends[ids]])

    def seen(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens a position attends to: [batch, n, n] bool."""
        back = self.config.anchors_look_back
        return torch.stack([visible(row, back) for row in self.anchors(ids)])

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Last hidden states: [batch, n, hidden size]."""
        seen, dtype = self.seen(ids), self.model.dtype
        mask = additive(seen, dtype)[:, None]
        if not self.config.lower_layers:
            return hidden_states(self.model, ids, positions, attention_mask=mask)
        place = torch.arange(ids.shape[1], device=ids.device)
        older = seen & (place < near_start(place)[:, None])
        both = torch.cat([mask, additive(older, dtype)[:, None]], -1)
        lower = Lower(self.config.lower_layers, both)
        return self._with_lower(ids, positions, attention_mask=mask, lower=lower)

    def _with_lower(self, *given, **kwargs) -> torch.Tensor:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _attend)
        config = self.model.config
        before, config._attn_implementation = config._attn_implementation, NAME
        try:
            return hidden_states(self.model, *given, **kwargs)
        finally:
            config._attn_implementation = before

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A Llama as a Qwen3 with heads of twice the size and QK-norm, to be trained on.

Without the norms it would compute almost what the Llama does: RoPE of size 2D has the
frequencies of size D at its even pairs, so those hold the old channels. Norms take away
how long queries and keys are, which training has to make up for.
"""

import math

import torch

# Fields of both configurations that are not to be taken over.
DIFFERENT = {"architectures", "head_dim", "model_type", "torch_dtype", "dtype"}


def widened(model, ids: torch.Tensor, odd: float = 0.5):
    """The Qwen3, fp32, on the model's device.

    Args:
        model: transformers' LlamaForCausalLM, without biases.
        ids: [batch, length] int64, text that says how long queries and keys are.
        odd: which share of a query's and a key's length the odd pairs begin with. They
            repeat their neighbours, whose frequency is the next higher one.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    llama = model.config
    if llama.attention_bias or llama.mlp_bias:
        raise ValueError("the model has biases; Qwen3 has none")
    size = llama.head_dim
    # Qwen3's own defaults where a Llama has no such field.
    shared = Qwen3Config().to_dict().keys() & llama.to_dict().keys() - DIFFERENT
    own = {name: getattr(llama, name) for name in shared}
    config = Qwen3Config(**own, head_dim=2 * size)
    config._attn_implementation = "sdpa"
    lengths = _lengths(model, ids, size)
    wide = Qwen3ForCausalLM(config).float().to(model.device)
    weights = {name: weight.float() for name, weight in model.state_dict().items()}
    mix = torch.linalg.qr(torch.randn(2 * size, size)).Q.to(model.device)
    # Logits are divided by sqrt(2 D) instead of sqrt(D), and the product of two normed
    # vectors is 2 D times their cosine.
    scale = 1 / math.sqrt(size * math.sqrt(2))
    for layer, (query, key) in enumerate(lengths):
        at = f"model.layers.{layer}.self_attn."
        for name, length in (("q", query), ("k", key)):
            rows = weights[f"{at}{name}_proj.weight"].unflatten(0, (-1, size))
            weights[f"{at}{name}_proj.weight"] = _spread(rows, odd).flatten(0, 1)
            norm = torch.full((2 * size,), length * scale)
            weights[f"{at}{name}_norm.weight"] = norm
        values = weights[f"{at}v_proj.weight"].unflatten(0, (-1, size))
        weights[f"{at}v_proj.weight"] = (mix @ values).flatten(0, 1)
        back = weights[f"{at}o_proj.weight"].unflatten(1, (-1, size))
        weights[f"{at}o_proj.weight"] = (back @ mix.T).flatten(1, 2)
    wide.load_state_dict(weights)
    return wide


def _spread(rows: torch.Tensor, odd: float) -> torch.Tensor:
    """[heads, D, hidden] to [heads, 2 D, hidden]; RoPE pairs halves' channels."""
    even, rest = math.sqrt(1 - odd), math.sqrt(odd)
    halves = rows.unflatten(1, (2, -1))
    return torch.stack([even * halves, rest * halves], 3).flatten(1, 3)


@torch.no_grad()
def _lengths(model, ids: torch.Tensor, size: int) -> list[tuple[float, float]]:
    """Mean length of queries' and of keys' vectors, layer by layer."""
    found: dict[str, float] = {}

    def hook(name):
        def keep(_, __, output):
            found[name] = output.unflatten(-1, (-1, size)).norm(dim=-1).mean().item()

        return keep

    layers = model.model.layers
    handles = [
        getattr(layer.self_attn, f"{kind}_proj").register_forward_hook(hook((i, kind)))
        for i, layer in enumerate(layers)
        for kind in "qk"
    ]
    model.model(ids)
    for handle in handles:
        handle.remove()
    return [(found[i, "q"], found[i, "k"]) for i in range(len(layers))]

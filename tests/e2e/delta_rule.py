# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Gated delta nets token by token in 64 bits, in place of vLLM's bfloat16 kernels.

Takes rounding out: a token's result does not depend on where a chunk begins.
"""

import torch
import torch.nn.functional as F
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

EPSILON = 1e-6


def install(monkeypatch) -> None:
    """For engines in this process."""
    gdn_attention.register_cpu_gdn_attention_ops()
    monkeypatch.setattr(torch.ops.vllm, "cpu_gdn_attention_core", core)


def core(mixed_qkv, b, a, out, layer_name) -> None:
    """vLLM's ``cpu_gdn_attention_core``, without speculation; any dtype."""
    context = get_forward_context()
    layer = context.no_compile_layers[gdn_attention._resolve_layer_name(layer_name)]
    if context.attn_metadata is None:
        return
    step = context.attn_metadata[layer.prefix]
    convs, states = layer.kv_cache
    if not is_conv_state_dim_first():
        convs = convs.transpose(1, 2)  # [slots, channels, width - 1]
    slots, heads, v_size, k_size = states.shape
    states = states.view(slots, heads, k_size, v_size)
    starts = step.non_spec_query_start_loc.tolist()
    for i in range(step.num_decodes + step.num_prefills):
        rows = slice(starts[i], starts[i + 1])
        if rows.start == rows.stop:
            continue
        slot = int(step.non_spec_state_indices_tensor[i])
        if i >= step.num_decodes and not step.has_initial_state[i]:
            convs[slot] = 0
            states[slot] = 0
        y = convolve(layer, mixed_qkv[rows], convs[slot])
        query, key, value = (t[0].double() for t in layer.rearrange_mixed_qkv(y))
        rate = -layer.A_log.double().exp()
        decay = (rate * F.softplus(a[rows].double() + layer.dt_bias.double())).exp()
        out[rows], states[slot] = delta_rule(
            unit(query, heads) * k_size**-0.5,
            unit(key, heads),
            value,
            decay,
            b[rows].double().sigmoid(),
            states[slot].double(),
        )


def convolve(layer, new: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """[tokens, channels], and the state moves on."""
    weight = layer.conv1d.weight.flatten(1)  # [channels, width]
    x = torch.cat([state, new.t()], 1)
    y = sum(weight[:, i, None] * x[:, i:][:, : len(new)] for i in range(weight.size(1)))
    if layer.conv1d.bias is not None:
        y = y + layer.conv1d.bias[:, None]
    state.copy_(x[:, -state.size(1) :])
    return F.silu(y).t().contiguous()


def unit(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Vectors of length 1, for every head of V."""
    x = x * (x.pow(2).sum(-1, keepdim=True) + EPSILON).rsqrt()
    return x.repeat_interleave(heads // x.size(1), 1)


def delta_rule(query, key, value, decay, beta, state):
    """(output [tokens, heads, v], state [heads, k, v] after the last token)."""
    out = torch.empty_like(value)
    for t in range(len(query)):
        state = state * decay[t, :, None, None]
        error = value[t] - torch.einsum("hk,hkv->hv", key[t], state)
        state = state + key[t, :, :, None] * (beta[t, :, None] * error)[:, None]
        out[t] = torch.einsum("hk,hkv->hv", query[t], state)
    return out, state

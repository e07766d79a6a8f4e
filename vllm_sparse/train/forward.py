# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A Llama-like model of transformers (Llama, Qwen3), run for training."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

# transformers' model types whose layers `hidden_states` calls.
TRAINED = ("llama", "qwen3")


def load_model(folder, device: torch.device, theta: float | None = None):
    """The model on ``device``: bf16 as it is served on GPUs, fp32 on CPUs, frozen.

    Args:
        theta: base of RoPE instead of the model's own.

    Raises:
        ValueError: an architecture that ``hidden_states`` does not know; RoPE that
            scales positions, whose base alone says little.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in TRAINED:
        raise ValueError(
            f"{folder} is a {config.model_type}; only {' and '.join(TRAINED)} "
            "are trained"
        )
    if theta is not None:
        if (scaled := config.rope_parameters["rope_type"]) != "default":
            raise ValueError(
                f"{folder} has {scaled} RoPE; only plain RoPE is stretched"
            )
        config.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="sdpa"
    )
    return placed(model, device).requires_grad_(False)


def placed(model, device: torch.device):
    """The model on ``device``, its attention in flash kernels there."""
    if device.type == "cuda":
        # Never, in silence, the one that writes all scores to memory: 32K tokens would
        # need gigabytes a layer.
        torch.backends.cuda.enable_math_sdp(False)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # One kernel, where transformers' own lines are seven.
            module.forward = partial(_norm, module)
    return model.to(device)


def _norm(module, hidden: torch.Tensor) -> torch.Tensor:
    weight, epsilon = module.weight, module.variance_epsilon
    return F.rms_norm(hidden.to(weight.dtype), weight.shape, weight, epsilon)


def attention_kernels(cudnn: bool) -> AbstractContextManager:
    """Attention in cuDNN's kernels alone, or in those that PyTorch prefers."""
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if cudnn else nullcontext()


def hidden_states(
    model,
    ids: torch.Tensor,
    positions: torch.Tensor,
    checkpointing: bool = False,
    **attention,
) -> torch.Tensor:
    """Last hidden states, under plain causal attention unless layers are told more.

    Not ``model(ids, position_ids=...)``: transformers takes a jump of positions for the
    border of two documents, and would cut the attention that skipped positions train.

    Args:
        ids, positions: [batch, length] int64.
        checkpointing: keep only layers' inputs and compute layers again in backward.
        attention: what layers are given, too: ``attention_mask``, [batch, 1, length,
            length], added to logits.

    Returns:
        [batch, length, hidden size].
    """
    inner = model.model
    hidden = inner.embed_tokens(ids)
    rope = inner.rotary_emb(hidden, position_ids=positions)

    def run(layer, hidden):
        return layer(
            hidden, position_ids=positions, position_embeddings=rope, **attention
        )

    for layer in inner.layers:
        if checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(run, layer, hidden, use_reentrant=False)
        else:
            hidden = run(layer, hidden)
    return inner.norm(hidden)


def chunk_losses(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    logits = F.linear(hidden, head).float()
    return F.cross_entropy(logits, targets, reduction="none")


def token_losses(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    chunk: int = 4096,
    losses=chunk_losses,
) -> torch.Tensor:
    """Cross-entropy of each token; logits exist for ``chunk`` tokens at a time.

    Args:
        hidden: [tokens, hidden size]. head: [vocabulary, hidden size].
        targets: [tokens] int64.
        losses: ``chunk_losses``, or what torch.compile makes of it.

    Returns:
        [tokens] fp32, nats.
    """
    parts = []
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(losses, h, head, t, use_reentrant=False))
        else:
            parts.append(losses(h, head, t))
    return torch.cat(parts)

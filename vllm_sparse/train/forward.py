# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A Llama-like model of transformers, run for training."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def load_model(folder, device: torch.device, theta: float | None = None):
    """The model on ``device``: bf16 as it is served on GPUs, fp32 on CPUs, frozen.

    Args:
        theta: base of RoPE instead of the model's own.

    Raises:
        ValueError: an architecture that ``hidden_states`` does not know; RoPE that
            scales positions, whose base alone says little.
    """
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "llama":
        raise ValueError(f"{folder} is a {config.model_type}; only llama is trained")
    if theta is not None:
        if (scaled := config.rope_parameters["rope_type"]) != "default":
            raise ValueError(
                f"{folder} has {scaled} RoPE; only plain RoPE is stretched"
            )
        config.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = LlamaForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="sdpa"
    )
    if device.type == "cuda":
        # Never, in silence, the one that writes all scores to memory: 32K tokens would
        # need gigabytes a layer.
        torch.backends.cuda.enable_math_sdp(False)
    model.to(device)  # type: ignore[arg-type]
    return model.requires_grad_(False)


def hidden_states(
    model, ids: torch.Tensor, positions: torch.Tensor, checkpointing: bool = False
) -> torch.Tensor:
    """Last hidden states under plain causal attention.

    Not ``model(ids, position_ids=...)``: transformers takes a jump of positions for the
    border of two documents, and would cut the attention that skipped positions train.

    Args:
        ids, positions: [batch, length] int64.
        checkpointing: keep only layers' inputs and compute layers again in backward.

    Returns:
        [batch, length, hidden size].
    """
    inner = model.model
    hidden = inner.embed_tokens(ids)
    rope = inner.rotary_emb(hidden, position_ids=positions)

    def run(layer, hidden):
        return layer(hidden, position_ids=positions, position_embeddings=rope)

    for layer in inner.layers:
        if checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(run, layer, hidden, use_reentrant=False)
        else:
            hidden = run(layer, hidden)
    return inner.norm(hidden)


def token_losses(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int = 4096
) -> torch.Tensor:
    """Cross-entropy of each token; logits exist for ``chunk`` tokens at a time.

    Args:
        hidden: [tokens, hidden size]. head: [vocabulary, hidden size].
        targets: [tokens] int64.

    Returns:
        [tokens] fp32, nats.
    """

    def losses(hidden, targets):
        logits = F.linear(hidden, head).float()
        return F.cross_entropy(logits, targets, reduction="none")

    parts = []
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(losses, h, t, use_reentrant=False))
        else:
            parts.append(losses(h, t))
    return torch.cat(parts)

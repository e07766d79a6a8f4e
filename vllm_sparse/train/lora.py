# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Low-rank changes of a model's linear layers (LoRA, arXiv 2106.09685)."""

import torch
import torch.nn.functional as F
from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """``base``, frozen, plus B A x. The factors are fp32 whatever the model's type."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        device, dtype = base.weight.device, torch.float32
        a = torch.empty(rank, base.in_features, device=device, dtype=dtype)
        b = torch.zeros(base.out_features, rank, device=device, dtype=dtype)
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Added within the product: passes over activations are half of a step's time.
        flat = x.flatten(0, -2)
        low = F.linear(flat, self.A.to(x.dtype))
        found = self.base(flat).addmm_(low, (self.scale * self.B).to(x.dtype).T)
        return found.unflatten(0, x.shape[:-1])


def add_lora(model: nn.Module, rank: int, alpha: float, modules=ATTENTION) -> None:
    """Put factors beside every linear layer whose name ends in one of ``modules``.

    Raises:
        ValueError: there is none.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in modules
    ]
    if not found:
        raise ValueError(f"the model has none of the layers {', '.join(modules)}")
    for name in found:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, LoRALinear(getattr(owner, child), rank, alpha / rank))


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """``model.layers.0.self_attn.q_proj.A`` and so on: what is trained."""
    return {
        f"{name}.{factor}": getattr(module, factor)
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for factor in "AB"
    }


def factor_shapes(
    weights: dict[str, torch.Size], rank: int, modules
) -> dict[str, tuple[int, ...]]:
    """Shapes that ``factors`` have for a model of these weights' shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, size in weights.items():
        name = key.removesuffix(".weight")
        if len(size) == 2 and name.rpartition(".")[2] in modules:
            shapes[f"{name}.A"] = (rank, size[1])
            shapes[f"{name}.B"] = (size[0], rank)
    return shapes

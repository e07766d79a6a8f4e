# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A small Llama with quantised weights, in the formats in which checkpoints come."""

import json
from functools import partial
from pathlib import Path

import torch

from .tiny import save_llama

GROUP = 64
# AutoAWQ's order of the values of a word.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def save_quantised(name: str, folder: Path) -> Path:
    """The random Llama of tiny.py; all but embeddings and norms in format ``name``."""
    from safetensors.torch import load_file, save_file

    save_llama(folder)
    quantise, config = FORMATS[name]
    weights = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if "_proj." in key:
            module = key.removesuffix(".weight")
            parts = quantise(tensor)
            weights |= {f"{module}.{p}": t.contiguous() for p, t in parts.items()}
        else:
            weights[key] = tensor.bfloat16()
    save_file(weights, folder / "model.safetensors")
    file = folder / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"quantization_config": config})
    )
    return folder


def grouped(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values of 4 bits around 8 [in, out], scales [in / GROUP, out])."""
    groups = weight.t().unflatten(0, (-1, GROUP))  # [in / GROUP, GROUP, out]
    scales = groups.abs().amax(1) / 7
    values = (groups / scales[:, None]).round() + 8
    return values.flatten(0, 1).int(), scales.half()


def packed(values: torch.Tensor, order=range(8)) -> torch.Tensor:
    """Eight values of the last dimension to a word, the first in the lowest bits."""
    words = values.unflatten(-1, (-1, 8))
    return sum(words[..., of] << 4 * place for place, of in enumerate(order))


def awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scales = grouped(weight)
    zeros = torch.full_like(scales, 8, dtype=torch.int32)
    return {
        "qweight": packed(values, AWQ_ORDER),
        "qzeros": packed(zeros, AWQ_ORDER),
        "scales": scales,
    }


def gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scales = grouped(weight)
    zeros = torch.full_like(scales, 7, dtype=torch.int32)  # the format adds one
    return {
        "qweight": packed(values.t()).t(),
        "qzeros": packed(zeros),
        "scales": scales,
        "g_idx": torch.arange(len(values), dtype=torch.int32) // GROUP,
    }


def int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def fp8(weight: torch.Tensor, dim: int | None = 1) -> dict[str, torch.Tensor]:
    """A scale per output channel; ``dim`` None: one for all."""
    most = weight.abs().amax() if dim is None else weight.abs().amax(dim, keepdim=True)
    scale = most / torch.finfo(torch.float8_e4m3fn).max
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def compressed_tensors(form: str, kind: str) -> dict:
    """Weights of 8 bits with a scale per channel, inputs quantised token by token."""
    values = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": values | {"strategy": "channel", "dynamic": False},
        "input_activations": values | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


FORMATS = {
    "AWQ": (
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
    "GPTQ": (
        gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "sym": True,
            "desc_act": False,
        },
    ),
    "INT8": (int8, compressed_tensors("int-quantized", "int")),
    "FP8": (fp8, compressed_tensors("float-quantized", "float")),
    "FP8, a scale per matrix": (
        partial(fp8, dim=None),
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
    ),
}

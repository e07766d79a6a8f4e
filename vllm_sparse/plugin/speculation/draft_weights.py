# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Draft steps that read weights of 8 bits (``draft_weights: fp8``).

Where contexts are short or few, most of a draft step is reading weights. Drafts may be
wrong, so linear layers draft with copies in fp8, one scale per output channel and, of
activations, per token, by vLLM's CUTLASS kernel. Prompts and verification compute with
the target's own weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from vllm import _custom_ops as vllm_ops
from vllm.model_executor.layers.linear import (
    LinearBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.utils.torch_utils import direct_register_custom_op

from ...config import SparseConfigError
from ..versions import init_logger

logger = init_logger(__name__)
_drafting = False


@contextmanager
def drafting() -> Iterator[None]:
    """Linear layers that have a copy of their weights compute with it."""
    global _drafting
    before, _drafting = _drafting, True
    try:
        yield
    finally:
        _drafting = before


class DraftWeights:
    """The copies of one model's weights.

    Args:
        model: after its weights were loaded and processed.

    Raises:
        SparseConfigError: when no layer of it has weights that can be copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(_layers(model))
        if not self.layers:
            raise SparseConfigError(
                "sparse.draft_weights = 'fp8' copies linear layers of 16 bits, and "
                "this model has none: leave it out"
            )
        for layer in self.layers:
            layer.draft_codes, layer.draft_scales = _copy(layer.weight)
            embeds = isinstance(layer, VocabParallelEmbedding)
            layer.quant_method = _Embedding() if embeds else _Linear()
        copied = sum(layer.draft_codes.nbytes for layer in self.layers)
        logger.info(
            "Drafts compute with fp8 copies of %d linear layers' weights: %.2f GiB.",
            len(self.layers),
            copied / 2**30,
        )

    def refresh(self) -> None:
        """Copy the weights again, to where CUDA graphs read them."""
        for layer in self.layers:
            codes, scales = _copy(layer.weight)
            layer.draft_codes.copy_(codes)
            layer.draft_scales.copy_(scales)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Linear layers, those that make logits among them, whose weights we can copy."""
    heads = [getattr(module, "lm_head", None) for module in model.modules()]
    for module in model.modules():
        method = type(getattr(module, "quant_method", None))
        if isinstance(module, LinearBase):
            fits = method is UnquantizedLinearMethod
            # Routers: small, and rounding would choose other experts.
            fits = fits and not isinstance(module, ReplicatedLinear)
        else:
            # Embeddings are not multiplied by, unless logits are made with them.
            makes_logits = any(module is head for head in heads)
            makes_logits |= isinstance(module, ParallelLMHead)
            fits = method is UnquantizedEmbeddingMethod and makes_logits
        if fits and module.weight.dtype.itemsize == 2 and _aligned(module.weight):
            yield module


def _aligned(weight: torch.Tensor) -> bool:
    return all(size % 16 == 0 for size in weight.shape)


def _copy(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] codes and [N, 1] scales of [N, K] weights."""
    return vllm_ops.scaled_fp8_quant(weight.data, use_per_token_if_dynamic=True)


def _draft_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """[..., K] times [N, K] weights, or in draft steps their copies."""
    if not _drafting:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    few = len(rows)
    # The kernel for up to 64 rows is the fastest with 64 (H200: 88 us a layer of 8B
    # for 105 with 24 rows), but for that for up to 16.
    pad = 64 if 16 < few < 64 else None
    rows, factors = vllm_ops.scaled_fp8_quant(
        rows, num_token_padding=pad, use_per_token_if_dynamic=True
    )
    out = vllm_ops.cutlass_scaled_mm(
        rows, codes.t(), factors, scales, out_dtype=x.dtype, bias=bias
    )
    return out[:few].view(*x.shape[:-1], len(codes))


def _fake_linear(x, weight, codes, scales, bias) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


_library = torch.library.Library("vllm_sparse_drafts", "DEF")
direct_register_custom_op(
    "linear", _draft_linear, fake_impl=_fake_linear, target_lib=_library
)


class _Copied:
    """A method of vLLM's layers that computes with the copy while drafting."""

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        # A compiled model asks at run time, too, what kind of step it is in.
        compiling = torch.compiler.is_compiling()
        linear = torch.ops.vllm_sparse_drafts.linear if compiling else _draft_linear
        return linear(
            x,
            layer.weight,
            layer.draft_codes,
            layer.draft_scales,
            bias,
        )


class _Linear(_Copied, UnquantizedLinearMethod):
    pass


class _Embedding(_Copied, UnquantizedEmbeddingMethod):
    pass

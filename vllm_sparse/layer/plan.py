# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which kernel serves positions that attend to everything."""

from functools import partial

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..cache.formats import KvFormat
from ..methods import LayerShape
from ..ops import Ops
from .dense_rows import DenseRows
from .prefill_codes import plan_codes


def one_call(device: torch.device, fmt: KvFormat) -> bool:
    """Whether positions of one request that attend to everything go in one call.

    Over quantised blocks a call would read the context, write it as rows and read it
    again: more bytes than a few positions do. On CPUs vLLM's kernel would do the same,
    and ours takes rows of one request together (docs/speculation.md).
    """
    return device.type == "cuda" and not fmt.quantised


def plan_dense(
    common: CommonAttentionMetadata,
    requests: slice,
    shape: LayerShape,
    ops: Ops,
    scratch_blocks: int,
) -> list[DenseRows]:
    """Plan for the device and the format of the blocks.

    Args:
        requests: those of the step that attend to everything.
        ops: with the engine's kernels.
        scratch_blocks: of a scratch cache in quantised formats, unless one request
            needs more; more requests take turns.
    """
    if common.query_start_loc.is_cuda:
        from .prefill_fa import FlashCodes, FlashRows

        if shape.fmt.quantised:
            make = partial(FlashCodes, ops)
            return plan_codes(common, requests, scratch_blocks, make)
        return [FlashRows.of(common, requests)]
    from .prefill_cpu import PackedCodes, PackedRows

    if shape.fmt.quantised:
        packed = partial(PackedCodes, shape, ops)
        return plan_codes(common, requests, scratch_blocks, packed)
    return [PackedRows.of(common, requests, shape, ops)]


def flash_schedule(shape: LayerShape, vllm_config, device: torch.device):
    """What plans tiles of dense rows for all layers; None: each does for itself."""
    if device.type != "cuda":
        return None
    from .prefill_fa import FlashSchedule, flash_attention_version

    if flash_attention_version(shape.head_size, 0.0) != 3:
        return None
    return FlashSchedule(shape, vllm_config, device)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which of a step's requests are in their prompts."""

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..config import EVICTING
from ..methods import Phase
from ..plugin.prompts import in_prompts
from ..plugin.versions import init_logger

logger = init_logger(__name__)


def prefilling(common: CommonAttentionMetadata, builder) -> torch.Tensor:
    """[num_reqs] bool on the host.

    vLLM leaves it out where it cuts a batch anew (chunked local attention, two halves
    of a batch in turns, some draft models). All of them then: dense is never wrong.
    """
    known = in_prompts()
    if known is None:
        known = common.is_prefilling
    if known is not None:
        return known
    if Phase.PREFILL not in builder.method.dense_phases:
        # Nothing but the figures depends on it.
        return torch.zeros(common.num_reqs, dtype=torch.bool)
    if builder.config.selector in EVICTING:
        raise NotImplementedError(
            "vLLM does not say which rows are prompts here, and blocks that these "
            "would attend to are given back: set sparse.prefill to streaming"
        )
    if builder.phase not in builder.method.dense_phases:
        logger.warning_once(
            "vLLM does not say which rows are prompts: %d layers, from %s on, are "
            "served densely.",
            len(builder.layer_names),
            builder.layer_names[0],
        )
    return torch.ones(common.num_reqs, dtype=torch.bool)


def rows_of_prompts(
    flags: torch.Tensor, num_decodes: int, device: torch.device
) -> torch.Tensor | None:
    """The first requests' flags on the device; None when none is in its prompt."""
    if not flags[:num_decodes].any():
        return None
    # Padding requests have no flag.
    host = torch.zeros(num_decodes, dtype=torch.bool, pin_memory=device.type == "cuda")
    host[: len(flags)] = flags[:num_decodes]
    return host.to(device, non_blocking=True)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which requests are in their prompts, where vLLM 0.32 and 0.33 say otherwise.

For models with Mamba layers vLLM's GPU model runner calls a prompt's last token a
decode where it comes alone (``prefill_runs_as_decode_np``): the state then goes through
the decode kernel. Builders of attention see the same flags, and would choose tokens for
a row of a prompt, so that a prefix-cache hit changed the first token of the answer.

Upstream: ``MambaHybridModelState.prepare_attn(input_batch, ...)`` and
``InputBatch.is_prefilling_np``. To go when attention metadata carries both facts.
"""

from functools import wraps

import torch

_in_prompts: torch.Tensor | None = None


def in_prompts() -> torch.Tensor | None:
    """[num_reqs] bool on the host of the step that is being prepared; None: as vLLM's
    metadata says."""
    return _in_prompts


def install() -> None:
    """Keep the flags of hybrid models' steps for :func:`in_prompts`. Idempotent."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

    original = MambaHybridModelState.prepare_attn
    if getattr(original, "vllm_sparse", False):
        return

    @wraps(original)
    def prepare_attn(self, input_batch, *args, **kwargs):
        global _in_prompts
        _in_prompts = torch.from_numpy(input_batch.is_prefilling_np)
        try:
            return original(self, input_batch, *args, **kwargs)
        finally:
            _in_prompts = None

    prepare_attn.vllm_sparse = True
    MambaHybridModelState.prepare_attn = prepare_attn

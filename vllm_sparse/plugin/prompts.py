# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which requests are in their prompts, where vLLM 0.32 and 0.33 say otherwise.

Two of the states that vLLM's GPU model runner keeps of a model pass other flags to the
builders of attention, or none:

- models with Mamba layers call a prompt's last token a decode where it comes alone
  (``prefill_runs_as_decode_np``): the state then goes through the decode kernel. We
  would choose tokens for a row of a prompt, so that a prefix-cache hit changed the
  first token of the answer;
- encoder-decoder models pass no flags: we would attend to everything in all rows.

Upstream: ``prepare_attn(input_batch, ...)`` of ``MambaHybridModelState`` and
``EncoderDecoderModelState``, ``InputBatch.is_prefilling_np``. To go when attention
metadata carries the flags of attention for both.
"""

from functools import wraps
from importlib import import_module

import torch

STATES = {
    "mamba_hybrid": "MambaHybridModelState",
    "encoder_decoder": "EncoderDecoderModelState",
}
_in_prompts: torch.Tensor | None = None


def in_prompts() -> torch.Tensor | None:
    """[num_reqs] bool on the host of the step that is being prepared; None: as vLLM's
    metadata says."""
    return _in_prompts


def install() -> None:
    """Keep the flags of these models' steps for :func:`in_prompts`. Idempotent."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return
    for module, name in STATES.items():
        path = f"vllm.v1.worker.gpu.model_states.{module}"
        _keep_flags(getattr(import_module(path), name))


def _keep_flags(state: type) -> None:
    original = state.prepare_attn
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
    state.prepare_attn = prepare_attn

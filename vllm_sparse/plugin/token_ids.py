# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The token ids of the step that is being prepared, which vLLM 0.32 and 0.33 do not
give to the builders of attention.

Upstream: ``GPUModelRunner._build_attention_metadata``, which CPUs have, too, with
``input_ids``; ``prepare_attn(input_batch, ...)`` of the V2 runner's model states. To go
when attention metadata carries them.
"""

from functools import wraps

import torch

_ids: torch.Tensor | None = None


def token_ids() -> torch.Tensor:
    """[>= num_tokens] int32 on the model's device.

    Raises:
        RuntimeError: no step is being prepared.
    """
    if _ids is None:
        raise RuntimeError("vLLM prepares attention without a step's token ids")
    return _ids


def install() -> None:
    """Keep the ids of steps for :func:`token_ids`. Idempotent."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _keep(GPUModelRunner, "_build_attention_metadata", _of_v1)
    if current_platform.is_cuda():
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        _keep(DefaultModelState, "prepare_attn", _of_v2)


def _of_v1(runner, *args) -> torch.Tensor:
    return runner.input_ids.gpu


def _of_v2(state, input_batch, *args) -> torch.Tensor:
    return input_batch.input_ids


def _keep(owner: type, name: str, ids) -> None:
    original = getattr(owner, name)
    if getattr(original, "vllm_sparse", False):
        return

    @wraps(original)
    def kept(self, *args, **kwargs):
        global _ids
        _ids = ids(self, *args)
        try:
            return original(self, *args, **kwargs)
        finally:
            _ids = None

    kept.vllm_sparse = True
    setattr(owner, name, kept)

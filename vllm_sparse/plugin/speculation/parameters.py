# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sampling parameters that requests to a lossless engine may have.

vLLM refuses ``min_p`` and ``logit_bias`` beside any speculation, for its first runner's
sake. Lossless engines serve them: on CPUs by v1_parameters.py, on GPUs as vLLM's second
runner samples all rows of a step alike.

Upstream: ``SamplingParams._validate_spec_decode``, called in the process that takes
requests. To go when vLLM asks which speculation it is.
"""

from collections.abc import Callable

from .configure import is_ours

# What was replaced, by name.
vllms: dict[str, Callable] = {}


def install() -> None:
    """Let requests to lossless engines pass in this process. Idempotent."""
    from vllm.sampling_params import SamplingParams

    if SamplingParams._validate_spec_decode is not _validate_spec_decode:
        vllms["_validate_spec_decode"] = SamplingParams._validate_spec_decode
        SamplingParams._validate_spec_decode = _validate_spec_decode


def _validate_spec_decode(params, speculative_config) -> None:
    """vLLM's for other engines.

    Raises:
        VLLMValidationError: a lossless engine cannot serve the request.
    """
    if not is_ours(speculative_config):
        return vllms["_validate_spec_decode"](params, speculative_config)
    from vllm.exceptions import VLLMValidationError

    if params.logprob_token_ids is not None:
        # V1 fails at the first verified draft, V2 returns none.
        raise VLLMValidationError(
            "logprob_token_ids is not served with sparse.lossless, ask for logprobs",
            parameter="logprob_token_ids",
        )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A vLLM logits processor that makes a request emit a given list of tokens.

Prompt log-probabilities go through prefill, which is dense. Forcing the continuation
measures decoding: every token after the first is computed by a decode step, and
``logprobs_mode="raw_logprobs"`` reports the model's distribution from before forcing.
"""

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

KEY = "forced_token_ids"


def forced_params(token_ids: list[int], num_logprobs: int) -> SamplingParams:
    """Sampling parameters that emit exactly ``token_ids``."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=len(token_ids),
        ignore_eos=True,
        logprobs=num_logprobs,
        detokenize=False,
        extra_args={KEY: token_ids},
    )


class ForceTokens(AdapterLogitsProcessor):
    """Requests with ``extra_args["forced_token_ids"]`` emit those tokens in order."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams):
        forced = (params.extra_args or {}).get(KEY)
        if forced is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            """output_ids: emitted so far; logits: [vocab], changed in place."""
            logits.fill_(float("-inf"))
            # Asynchronous scheduling may run one step past the last token.
            logits[forced[min(len(output_ids), len(forced) - 1)]] = 0.0
            return logits

        return force

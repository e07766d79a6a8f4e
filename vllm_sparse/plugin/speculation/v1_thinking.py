# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``thinking_token_budget`` on rows of drafts in vLLM's first model runner, on CPUs.

Beside drafts vLLM 0.32 and 0.33 end a request's thinking at other tokens than without:
they look ahead of drafts that are rejected later, and count tokens forced in chunks of
a prompt. Here a request's state sees its tokens one by one, as without drafts, and
those that are drafted on a copy. With drafts or without, vLLM gives a request without a
budget that of an ended one whose row it moves to; not here.

Upstream: ``ThinkingBudgetStateHolder``, which ``Sampler`` updates once per step and
both samplers apply. To go when vLLM's passes tests/e2e/test_lossless_parameters.py.
"""

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

FORCED = 1e9


class ThinkingBudgets(ThinkingBudgetStateHolder):
    """Of requests in a V1 batch."""

    def sync_batch(self, batch_update: BatchUpdate | None) -> None:
        if not batch_update:
            return
        super().sync_batch(replace(batch_update, moved=[]))
        states = self._state
        for old, new, direction in batch_update.moved:
            moved, there = states.pop(old, None), states.pop(new, None)
            if moved is not None:
                states[new] = moved
            if there is not None and direction is MoveDirectionality.SWAP:
                states[old] = there

    def update_state(
        self,
        output_token_ids: list[list[int]],
        spec_token_ids: list[list[int]] | None,
        repeat_indices: torch.Tensor | None = None,
    ) -> None:
        """Find what is forced on each request's drafts and the token after them."""
        for req, state in self._state.items():
            output, drafts = output_token_ids[req], _of(spec_token_ids, req)
            for length in range(state.get("seen", -1) + 1, len(output) + 1):
                self._see(state, output[:length])
            state["seen"] = len(output)
            ahead = dict(state)
            state["forced"] = [self._forced(ahead)]
            for drafted in range(1, len(drafts) + 1):
                self._see(ahead, output + drafts[:drafted])
                state["forced"].append(self._forced(ahead))

    def _see(self, state: dict[str, Any], output: list[int]) -> None:
        state |= {"output_tok_ids": output, "spec_token_ids": [], "force_index": []}
        self._update_think_state(state)

    def _forced(self, state: dict[str, Any]) -> int | None:
        ends = self.think_end_token_ids
        if not (state["in_end"] and state["force_index"]):
            return None
        return ends[state["end_count"]] if state["end_count"] < len(ends) else None

    def apply_to_logits(
        self,
        logits: torch.Tensor,
        predict_bonus_token: bool,
        spec_token_ids: list[list[int]] | None,
    ) -> torch.Tensor:
        """Force tokens on drafts' rows, or on one row per request."""
        if not len(logits):  # a step in which nobody drafted
            return logits
        one_each = predict_bonus_token or not any(spec_token_ids or [])
        row = 0
        for req in range(max(self._state, default=-1) + 1):
            drafts = len(_of(spec_token_ids, req))
            forced = self._state[req]["forced"] if req in self._state else []
            forced = forced[-1:] if one_each else forced[:drafts]
            for i, token in enumerate(forced):
                if token is not None:
                    logits[row + i, token] = FORCED
            row += 1 if one_each else drafts
        return logits


def _of(spec_token_ids: list[list[int]] | None, req: int) -> list[int]:
    return spec_token_ids[req] if spec_token_ids else []

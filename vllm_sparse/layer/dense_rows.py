# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Positions that attend to everything before them: one call for all of a request."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..methods import LayerShape


class DenseRows(ABC):
    """Requests of one step, planned once for all layers of a group.

    Attributes:
        tokens: their positions among the step's.
    """

    tokens: slice

    def save(self, kv_cache: torch.Tensor, shape: LayerShape) -> Any:
        """Copy what storing the step's tokens overwrites, for :meth:`attend`."""
        return None

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        saved: Any,
        kv_cache: torch.Tensor,
        shape: LayerShape,
        out: torch.Tensor,
    ) -> None:
        """Causal attention of the positions over their contexts, which are stored.

        Args:
            query, out: [num_tokens, num_heads, head_size] of :attr:`tokens`.
            key, value: [num_tokens, num_kv_heads, head_size], likewise; None where the
                layer reads another layer's cache.
            saved: what :meth:`save` returned before the step's tokens were stored.
        """


def host_lens(common: CommonAttentionMetadata, requests: slice) -> list[int]:
    """Context lengths; on GPUs exact where no drafts are under way."""
    lens = common.seq_lens_cpu_upper_bound
    # vLLM forgets the bound where a draft model's requests get further tokens.
    if lens is None or not common.seq_lens.is_cuda:
        lens = common.seq_lens.cpu()
    return lens[requests].tolist()


def token_slice(common: CommonAttentionMetadata, requests: slice) -> slice:
    starts = common.query_start_loc_cpu
    return slice(int(starts[requests.start]), int(starts[requests.stop]))

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Attention to everything, over blocks of any format."""

import torch

from .base import DecodeRows, Method, Phase


class Dense(Method):
    """Keeps all tokens in all phases."""

    devices = ("cpu", "cuda")
    dense_phases = frozenset(Phase)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: DecodeRows,
        out: torch.Tensor,
        layer_name: str,
    ) -> None:
        # No lists at all: what the other layers chose is left alone.
        self.ops.attend(
            query,
            kv_cache,
            rows.block_table,
            rows.seq_lens,
            scale=self.shape.scale,
            soft_cap=self.shape.soft_cap,
            out=out,
            workspace=rows.workspace,
            fmt=self.shape.fmt,
            sinks=self.shape.sinks,
        )

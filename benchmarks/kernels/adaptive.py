# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Layers with adaptive budgets that keep as many tokens as a real model does."""

import argparse
from dataclasses import replace

import torch

from benchmarks.kernels.layer import Layer
from vllm_sparse.cache.layout import BLOCK_SIZE


class AdaptiveLayer(Layer):
    """Every (row, KV head) draws a count from ``args.kept`` (record_kept.py); its query
    is sharpened until ``args.top_p`` keeps that many."""

    def __init__(self, args: argparse.Namespace, seq_lens: list[int]) -> None:
        super().__init__(args, seq_lens)
        self.plain = self.options
        self.options = replace(self.plain, top_p=args.top_p)
        shape = (*self.counts.shape, max(seq_lens))
        self.indices = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self.budgets = self.lens - 1
        self._sharpen(self._wanted())
        mean = round(self.counts.float().mean().item())
        self.means = torch.full_like(self.lens, max(BLOCK_SIZE, mean))

    def _wanted(self) -> torch.Tensor:
        """[rows, num_kv_heads] tokens, from quantiles of recorded counts."""
        values = torch.tensor(self.args.kept["quantiles"], device=self.device)
        length = max(self.seq_lens)
        if self.args.share:
            values = values * (length / self.args.kept["context"])
        drawn = torch.randint(len(values), self.counts.shape, device=self.device)
        return values[drawn].clamp(BLOCK_SIZE, length - BLOCK_SIZE)

    def _sharpen(self, wanted: torch.Tensor) -> None:
        base = self.query.clone().unflatten(1, (self.args.kv_heads, -1))
        low, high = (torch.full_like(wanted, x, dtype=torch.float) for x in (1e-3, 30))
        for _ in range(16):
            middle = (low * high).sqrt()
            factor = middle[:, :, None, None].to(base.dtype)
            self.query.copy_((base * factor).flatten(1, 2))
            self.select()
            many = self.counts > wanted
            low, high = torch.where(many, middle, low), torch.where(many, high, middle)

    def top_p(self) -> None:
        self.sparq()

    def fixed(self) -> None:
        """Plain top-k of the mean count."""
        self.choose(self.means, self.plain, self.out)

    def fixed_select(self) -> None:
        self.choose(self.means, self.plain, None)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What features are trained on: of some positions of a text, what a layer's dense
attention gives and what sinks and window alone give; and the same with a state.

Everything but the state is computed once, whatever the number of epochs.
"""

import math
from dataclasses import dataclass

import torch

from ..methods.less import LEAST, Kernels

# By device, of states: so many are sums over runs of tokens, more are found among those
# of all tokens. A CPU loops fast, other devices wait for their host (64).
FEW_EDGES = {"cpu": 512}


@dataclass(frozen=True)
class Kept:
    """Which tokens a position attends to exactly.

    Attributes:
        sinks: first tokens of a text.
        window: tokens before the block that a position is in.
        block: tokens of a block; 1: every position has a window of its own.
    """

    sinks: int
    window: int
    block: int

    @property
    def tokens(self) -> int:
        """The most that a position attends to."""
        return self.sinks + self.window + self.block

    def first(self, rows: torch.Tensor) -> torch.Tensor:
        """Where the windows of positions begin: [n] int64."""
        return (rows // self.block * self.block - self.window).clamp(min=0)

    def mask(self, rows: torch.Tensor, length: int) -> torch.Tensor:
        """What positions attend to: [n, length] bool."""
        token = torch.arange(length, device=rows.device)
        kept = (token < self.sinks) | (token >= self.first(rows)[:, None])
        return kept & (token <= rows[:, None])


def attend_exactly(
    rows: torch.Tensor, query, key, value, scale: float, kept: Kept
) -> tuple[torch.Tensor, torch.Tensor]:
    """To what positions keep: the result [H, n, D] and its lse [H, n], fp32.

    Args:
        rows: [n]; few that follow each other are fast, as they keep the same tokens.
        query: [H, length, D] of all positions; key, value: [G, length, D].
    """
    group = query.shape[0] // key.shape[0]
    mask = kept.mask(rows, key.shape[1])
    some = mask.any(0).nonzero().squeeze(1)
    keys, values = (
        t[:, some].repeat_interleave(group, 0).float() for t in (key, value)
    )
    logits = query[:, rows].float() @ keys.mT * scale
    logits = logits.masked_fill(~mask[:, some], -math.inf)
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp() @ values, lse


@dataclass(frozen=True)
class Rows:
    """Of one layer, query heads H, KV heads G, n positions of a text.

    Attributes:
        kept: what ``exact`` and ``lse`` attend to.
        rows: [n] int64.
        query: [H, n, D]; key, value: [G, length, D], after RoPE.
        exact: [H, n, D], what sinks and window give; lse: [H, n] fp32, its logarithm
            of the sum of weights.
        expected: [H, n, D], what dense attention gives; whole: [H, n] fp32, its lse;
            where they are trained on.
    """

    kept: Kept
    rows: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    exact: torch.Tensor
    lse: torch.Tensor
    expected: torch.Tensor | None = None
    whole: torch.Tensor | None = None

    @classmethod
    def recorded(cls, rows, query, key, value, scale, kept: Kept, out) -> "Rows":
        """To be kept for long: in 16 bits.

        Args:
            query, out: [H, length, D] of all positions, ``out`` dense attention's.
        """
        exact, lse = attend_exactly(rows, query, key, value, scale, kept)
        everything = Kept(0, query.shape[1], 1)
        whole = attend_exactly(rows, query, key, value, scale, everything)[1]
        long = (query[:, rows], key, value, exact, out[:, rows])
        query, key, value, exact, expected = (tensor.half() for tensor in long)
        return cls(kept, rows, query, key, value, exact, lse, expected, whole)

    def states(self, kernels: Kernels) -> torch.Tensor:
        """Of what has left, as each position finds it: [n, G, STATE_RANK, D + 1]."""
        psi, value = kernels.psi(self.key), self.value.float()
        given = torch.cat([value, torch.ones_like(value[..., :1])], -1)
        sinks = self.kept.sinks
        first = self.kept.first(self.rows).clamp(min=sinks)
        edges, where = first.unique(return_inverse=True)
        if len(edges) > FEW_EDGES.get(psi.device.type, 64):
            each = psi[:, sinks:, :, None] * given[:, sinks:, None]
            sums = torch.nn.functional.pad(each.cumsum(1), (0, 0, 0, 0, 1, 0))
            return sums[:, first - sinks].transpose(0, 1)
        begins = [sinks, *edges.tolist()]
        parts = [
            psi[:, begin:end].mT @ given[:, begin:end]
            for begin, end in zip(begins, begins[1:])
        ]
        return torch.stack(parts).cumsum(0)[where]

    def merged(self, kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
        """With the state: the result [H, n, D] fp32, and the logarithm of what the
        state takes for the sum of the weights of what has left, [H, n]."""
        phi = kernels.phi(self.query).transpose(0, 1)
        grouped = phi.unflatten(1, (self.key.shape[0], -1))
        sums = (grouped @ self.states(kernels)).flatten(1, 2).transpose(0, 1)
        mass = sums[..., -1].clamp(min=LEAST).log()
        total = torch.logaddexp(self.lse, mass)
        near = self.exact.float() * (self.lse - total).exp()[..., None]
        return near + sums[..., :-1] * (-total).exp()[..., None], mass

    def mass_left(self) -> torch.Tensor:
        """Of what has left, the logarithm of the sum of its weights: [H, n]."""
        share = -torch.expm1(self.lse - self.whole)
        return self.whole + share.clamp(min=1e-6).log()

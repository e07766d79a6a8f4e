# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What features are trained on: of some positions of a text, what dense attention gives
and what sinks and window alone give, of all layers at once; and the same with a state.

Everything but the state is computed once, whatever the number of epochs. Nothing here
waits for a device.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..methods.less import LEAST, Kernels

# Tokens that are summed at once, for all positions; or a block, if that is more.
RUN = 16


@dataclass(frozen=True)
class Kept:
    """Which tokens a position attends to exactly.

    Attributes:
        sinks: first tokens of a text; whole blocks.
        window: tokens before the block that a position is in; whole blocks.
        block: tokens of a block; 1: every position has a window of its own.
    """

    sinks: int
    window: int
    block: int

    @property
    def tokens(self) -> int:
        """The most that a position attends to."""
        return self.sinks + self.window + self.block

    def left(self, rows: torch.Tensor) -> torch.Tensor:
        """How many tokens behind the sinks have left, for positions: [n] int64."""
        first = rows // self.block * self.block - self.window
        return (first - self.sinks).clamp(min=0)

    def mask(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Which tokens positions attend to: [..., n], [..., m] -> [..., n, m] bool."""
        rows, tokens = rows[..., None], tokens[..., None, :]
        behind = tokens - self.sinks
        return ((behind < 0) | (behind >= self.left(rows))) & (tokens <= rows)


def logits_of(query, key, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """[..., H, n, D], [..., G, m, D], [..., n, m] bool -> [..., H, n, m] fp32."""
    grouped = query.float().reshape(*key.shape[:-2], -1, key.shape[-1])
    logits = (grouped @ key.float().mT * scale).reshape(*query.shape[:-1], -1)
    return logits.masked_fill(~mask[..., None, :, :], -torch.inf)


def attended(logits, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., H, n, m], [..., G, m, D] -> the result [..., H, n, D], its lse [..., H, n],
    fp32."""
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp()
    grouped = weights.reshape(*value.shape[:-2], -1, value.shape[-2])
    return (grouped @ value.float()).reshape(*lse.shape, -1), lse


@dataclass(frozen=True)
class Rows:
    """n positions of a text, query heads H, KV heads G; in front of each tensor but
    ``left`` may be a dimension of layers.

    Attributes:
        kept: what ``exact`` and ``lse`` attend to.
        left: [n] int64, how many of ``key`` have left.
        query: [H, n, D]; key, value: [G, m, D], those behind the sinks that can have
            left; after RoPE.
        exact: [H, n, D], what sinks and window give; lse: [H, n] fp32, its logarithm
            of the sum of weights.
        expected: [H, n, D], what dense attention gives; whole: [H, n] fp32, its lse;
            where they are trained on.
    """

    kept: Kept
    left: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    exact: torch.Tensor
    lse: torch.Tensor
    expected: torch.Tensor | None = None
    whole: torch.Tensor | None = None

    @classmethod
    def of(cls, kept: Kept, rows, query, key, value, *exact) -> "Rows":
        """Of one layer.

        Args:
            rows: [n] int64.
            query: [H, length, D] of all positions; key, value: [G, length, D].
            exact: the other fields.
        """
        most = int(kept.left(torch.tensor(key.shape[1] - 1)))
        can = slice(kept.sinks, kept.sinks + most)
        given = (query[:, rows], key[:, can], value[:, can])
        return cls(kept, kept.left(rows), *given, *exact)

    def states(self, kernels: Kernels) -> torch.Tensor:
        """Of what has left, by position: [..., G, n, STATE_RANK, D + 1]."""
        psi, given = kernels.psi(self.key), F.pad(self.value.float(), (0, 1), value=1.0)
        run = max(RUN, self.kept.block)
        count = psi.shape[-2] // run
        each, value = (
            t[..., : count * run, :].unflatten(-2, (count, run)) for t in (psi, given)
        )
        sums = F.pad((each.mT @ value).cumsum(-3), (0, 0, 0, 0, 1, 0))
        states = sums.index_select(-3, self.left // run)
        if self.kept.block % run == 0:
            return states
        # And the tokens of a run of which only the first have left.
        token = self.left[:, None] // run * run
        token = token + torch.arange(run, device=token.device)
        gone = (token < self.left[:, None])[..., None]
        token = token.clamp(max=psi.shape[-2] - 1)
        each, value = (
            t.index_select(-2, token.flatten()).unflatten(-2, token.shape)
            for t in (psi, given)
        )
        return states + (each * gone).mT @ value

    def sums(self, kernels: Kernels) -> torch.Tensor:
        """Of queries and states: [..., H, n, D + 1] fp32, the last one of weights."""
        phi = kernels.phi(self.query).unflatten(-3, (self.key.shape[-3], -1))
        found = phi.transpose(-3, -2) @ self.states(
            kernels
        )  # [..., G, n, H / G, D + 1]
        return found.transpose(-3, -2).flatten(-4, -3)

    def merged(self, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """With the state: the result [..., H, n, D] fp32, and the logarithm of what the
        state takes for the sum of the weights of what has left, [..., H, n]."""
        mass = sums[..., -1].clamp(min=LEAST).log()
        total = torch.logaddexp(self.lse, mass)
        near = self.exact.float() * (self.lse - total).exp()[..., None]
        return near + sums[..., :-1] * (-total).exp()[..., None], mass

    def mass_left(self) -> torch.Tensor:
        """Of what has left, the logarithm of the sum of its weights: [..., H, n]."""
        share = -torch.expm1(self.lse - self.whole)
        return self.whole + share.clamp(min=1e-6).log()


def recorded(layers: list[Rows]) -> Rows:
    """Of one text, to be kept for long: together, in 16 bits."""

    def together(name: str) -> torch.Tensor:
        tensors = torch.stack([getattr(rows, name) for rows in layers])
        return tensors if name in ("lse", "whole") else tensors.half()

    names = ("query", "key", "value", "exact", "lse", "expected", "whole")
    return Rows(layers[0].kept, layers[0].left, *map(together, names))

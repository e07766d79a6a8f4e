# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""From measurements to a proposal: docs/calibration.md has the rule in words."""

import itertools
from dataclasses import dataclass

import torch

from .measure import Setting

TOP_P = (0.8, 0.9, 0.95, 0.98)
# A layer that keeps more of its context than this is faster when it is read in order:
# docs/calibration.md.
DENSE_ABOVE = 0.5


def grid(head_size: int) -> list[Setting]:
    """1/4, 3/8, 1/2 and all of the channels, by every p."""
    ranks = [head_size * eighths // 8 for eighths in (2, 3, 4, 8)]
    return list(itertools.starmap(Setting, itertools.product(ranks, TOP_P)))


@dataclass(frozen=True)
class Measurements:
    """What the probe found.

    Attributes:
        layers: [num_layers] indices of the layers that our backend serves, ascending.
        seq_lens: [num_rows] tokens of each decode row's context.
        kept: [num_rows, num_layers, num_settings, num_kv_heads] tokens.
        error: [num_rows, num_layers, num_settings] relative error of the output.
        read: [num_rows, num_layers, num_settings] bytes; dense: without the last.
    """

    settings: list[Setting]
    layers: list[int]
    seq_lens: torch.Tensor
    kept: torch.Tensor
    error: torch.Tensor
    read: torch.Tensor
    dense: torch.Tensor

    @classmethod
    def from_notes(
        cls, settings: list[Setting], notes: dict[int, list[dict]]
    ) -> "Measurements":
        """``notes``: as :meth:`ProbeExtension.take_probe` returns them."""
        layers = sorted(notes)

        def stacked(name: str) -> torch.Tensor:
            by_layer = [[row[name] for row in notes[layer]] for layer in layers]
            return torch.tensor(by_layer, dtype=torch.float64).transpose(0, 1)

        names = ("kept", "error", "read", "dense")
        seq_lens = stacked("seq_len")[:, 0]
        return cls(settings, layers, seq_lens, *map(stacked, names))

    def index(self, point: "Outcome") -> int:
        """Place of a setting in ``settings``."""
        return self.settings.index(Setting(point.rank, point.top_p))

    def kept_share(self, index: int) -> torch.Tensor:
        """Mean share of the context that a setting keeps:
        [num_layers, num_kv_heads]."""
        return (self.kept[:, :, index] / self.seq_lens[:, None, None]).mean(0)


@dataclass(frozen=True)
class Outcome:
    """A setting and what it costs, the leading layers being dense.

    Attributes:
        error: mean relative error of the attention output over rows and layers.
        worst_error: the largest of the layers' means, found in ``worst_layer``.
        read: KV bytes read as a share of what dense attention reads.
        kept, kept_p50, kept_p99: tokens per row and KV head in layers that choose; 0
            where there are none.
    """

    rank: int
    top_p: float
    dense_layers: int
    error: float
    worst_layer: int
    worst_error: float
    read: float
    kept: float
    kept_p50: float
    kept_p99: float

    @property
    def options(self) -> dict:
        """For ``--additional-config``'s namespace."""
        return {
            "top_p": self.top_p,
            "rank": self.rank,
            "dense_layers": self.dense_layers,
        }


def outcome(found: Measurements, index: int, dense_layers: int = 0) -> Outcome:
    """Setting number ``index``, layers below ``dense_layers`` attended densely."""
    setting = found.settings[index]
    dense = torch.tensor(found.layers) < dense_layers
    error = found.error[:, :, index].masked_fill(dense, 0.0)
    read = torch.where(dense, found.dense, found.read[:, :, index])
    kept = found.kept[:, ~dense, index].flatten()
    by_layer = error.mean(0)
    worst = int(by_layer.argmax())
    quantiles = torch.tensor([0.5, 0.99], dtype=kept.dtype)
    p50, p99 = kept.quantile(quantiles).tolist() if len(kept) else (0.0, 0.0)
    return Outcome(
        rank=setting.rank,
        top_p=setting.top_p,
        dense_layers=dense_layers,
        error=float(error.mean()),
        worst_layer=found.layers[worst],
        worst_error=float(by_layer[worst]),
        read=float(read.sum() / found.dense.sum()),
        kept=float(kept.mean()) if len(kept) else 0.0,
        kept_p50=p50,
        kept_p99=p99,
    )


def dense_prefix(found: Measurements, index: int) -> int:
    """``dense_layers`` for a setting: leading layers that keep over DENSE_ABOVE."""
    layers = 0
    for layer, share in zip(found.layers, found.kept_share(index).mean(1).tolist()):
        if share <= DENSE_ABOVE:
            break
        layers = layer + 1
    return layers


def alternatives(found: Measurements) -> list[Outcome]:
    """Every setting with no layer dense, in the grid's order."""
    return [outcome(found, i) for i in range(len(found.settings))]


def propose(found: Measurements, target: float) -> Outcome | None:
    """The fewest bytes among settings whose mean error is at most ``target``, then
    with ``dense_layers``; None where no setting is that good."""
    tried = alternatives(found)
    good = [i for i, point in enumerate(tried) if point.error <= target]
    if not good:
        return None
    best = min(good, key=lambda i: (tried[i].read, tried[i].error))
    return outcome(found, best, dense_prefix(found, best))

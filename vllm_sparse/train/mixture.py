# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Batches of the long-context recipe, each a function of the seed and the step."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from .corpus import Corpus
from .positions import skipped
from .synthetic import Sample, Synthetic


@dataclass(frozen=True)
class Batch:
    """Windows of one length: ids, positions [n, length] int64, weights fp32."""

    ids: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor

    def split(self, windows: int) -> "list[Batch]":
        parts = (self.ids, self.positions, self.weights)
        return [Batch(*p) for p in zip(*(t.split(windows) for t in parts), strict=True)]

    def to(self, device: torch.device) -> "Batch":
        parts = (self.ids, self.positions, self.weights)
        return Batch(*(tensor.to(device) for tensor in parts))


@dataclass(frozen=True)
class Windows:
    """Where the windows of a step come from.

    Attributes:
        batch_tokens: of a step.
        steps: in all.
        synthetic, code: shares of windows: made on the spot; of code rather than prose.
    """

    corpus: Corpus
    synthetic_samples: Synthetic
    batch_tokens: int
    steps: int
    synthetic: float
    code: float
    seed: int

    def sample(self, length: int, rng) -> Sample:
        kind = "code" if rng.random() < self.code else "prose"
        window = partial(self.corpus.window, f"train-{kind}", rng=rng)
        if rng.random() < self.synthetic:
            return self.synthetic_samples.sample(kind, window, length, rng)
        return Sample(window(length), np.ones(length, dtype=np.float32))


@dataclass(frozen=True)
class Mixture(Windows):
    """What a step of the long-context recipe trains on.

    Attributes:
        context: tokens that the model shall handle.
        window: tokens of a window with skipped positions.
        full_share: of the steps, the last ones: with windows of ``context``.
        replay: share of windows with plain positions, among those shorter.
    """

    context: int
    window: int
    full_share: float
    replay: float

    def is_full(self, step: int) -> bool:
        return step >= round(self.steps * (1 - self.full_share))

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        length = self.context if self.is_full(step) else self.window
        samples, positions = [], []
        for _ in range(max(1, self.batch_tokens // length)):
            samples.append(self.sample(length, rng))
            plain = self.is_full(step) or rng.random() < self.replay
            place = np.arange(length) if plain else skipped(length, self.context, rng)
            positions.append(place)
        return batched(samples, positions)


@dataclass(frozen=True)
class Curriculum(Windows):
    """What a step of training from random weights trains on: plain positions, windows
    that grow.

    Attributes:
        lengths, shares: tokens of a window, one stage after the other, and each one's
            share of the steps; shares add up to 1.
    """

    lengths: tuple[int, ...]
    shares: tuple[float, ...]

    def length(self, step: int) -> int:
        ends = np.cumsum(self.shares)[:-1] * self.steps
        return self.lengths[int(np.searchsorted(np.round(ends), step, side="right"))]

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        length = self.length(step)
        number = max(1, self.batch_tokens // length)
        samples = [self.sample(length, rng) for _ in range(number)]
        return batched(samples, [np.arange(length)] * number)


def batched(samples: list[Sample], positions: list[np.ndarray]) -> Batch:
    return Batch(
        torch.from_numpy(np.stack([sample.ids for sample in samples])),
        torch.from_numpy(np.stack(positions)),
        torch.from_numpy(np.stack([sample.weights for sample in samples])),
    )

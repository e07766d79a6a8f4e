# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Positions of tokens in training windows, and the base of RoPE for long contexts."""

import numpy as np


def skipped(
    length: int, target: int, rng: np.random.Generator, max_pieces: int = 4
) -> np.ndarray:
    """PoSE (arXiv 2309.10400): a window as if it were pieces of a longer context.

    The window is cut into 2 to ``max_pieces`` runs at random places, and positions are
    skipped between them, so that over many windows all distances up to ``target`` occur
    while attention costs what ``length`` costs.

    Returns:
        [length] int64, rising, from 0 to below ``target``.
    """
    if length > target:
        raise ValueError(f"windows of {length} tokens exceed the context of {target}")
    pieces = min(int(rng.integers(2, max_pieces + 1)), length)
    cuts = np.sort(rng.choice(np.arange(1, length), pieces - 1, replace=False))
    skips = np.sort(rng.integers(0, target - length + 1, pieces - 1))
    return np.arange(length) + np.repeat([0, *skips], np.diff([0, *cuts, length]))


def default_theta(theta: float, factor: float, head_size: int) -> float:
    """The base of RoPE for a context ``factor`` times as long.

    factor^(d / (d - 2)) keeps the slowest channel's phase within what was trained
    (NTK-aware scaling): a lower bound, since the base that a model needs to tell far
    tokens from near ones grows faster than the context (arXiv 2405.14591). 2.5 times as
    much is ten times the base for 8K to 32K.
    """
    if factor <= 1:
        return theta
    raised = 2.5 * theta * factor ** (head_size / (head_size - 2))
    return float(f"{raised:.2g}")

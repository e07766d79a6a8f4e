# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Features of all layers together, after each layer's have been trained by themselves.

Layer by layer they learn from what a dense model's layers are given. Served, every
layer is given what the features before it have left undone. So the whole model runs as
it is served and features are trained towards the dense model's predictions.
"""

from collections.abc import Iterator
from dataclasses import fields
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..methods.less import Kernels
from .forward import token_losses
from .less_evaluate import forward, serving
from .less_layers import LessTrainee
from .recorded import attending, causal


def divergences(
    hidden: torch.Tensor, head: torch.Tensor, dense: torch.Tensor
) -> torch.Tensor:
    """KL from what the dense model predicts, nats: [n] fp32.

    Args:
        hidden, dense: [n, hidden size], last hidden states. head: [vocabulary, hidden
            size].
    """
    found, asked = (F.linear(h, head).float().log_softmax(-1) for h in (hidden, dense))
    return F.kl_div(found, asked, log_target=True, reduction="none").sum(-1)


class JointTrainee(LessTrainee):
    """Goes on with the features of another; its steps have texts of their own."""

    def __init__(self, before: LessTrainee) -> None:
        vars(self).update(vars(before))
        self._recorded = {}

    def losses(self, step: int) -> Iterator[tuple[torch.Tensor, int]]:
        args, rng = self.args, np.random.default_rng([self.args.seed, step, 2])
        scored = self.kept.tokens
        for _ in range(args.joint_batch):
            kind = "code" if rng.random() < args.code else "prose"
            ids = self.corpus.window(f"train-{kind}", args.length, rng)
            predicting = slice(scored - 1, -1)
            with torch.no_grad(), attending(self.model, causal):
                dense = forward(self.model, ids)[0, predicting]
            kernels = self.kernels
            parts = [getattr(kernels, f.name).unbind() for f in fields(Kernels)]
            layers = [Kernels(*tensors) for tensors in zip(*parts)]
            served = serving(scored, self.kept, layers)
            # Logits of a window for every position: one layer's at a time.
            attention = partial(checkpoint, served, use_reentrant=False)
            with attending(self.model, attention):
                hidden = forward(self.model, ids)[0, predicting]
            head = self.model.lm_head.weight
            apart = token_losses(hidden, head, dense, 1024, divergences)
            yield apart.mean() / args.joint_batch, args.length

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Measures inside a running engine: a selector that attends densely and takes notes.

It is no option of ``SparseConfig``: :class:`ProbeExtension` puts it into the layers of
an engine that ``run.py`` has started with the sparq backend, eagerly.
"""

from dataclasses import asdict

import torch
from vllm.model_executor.models.utils import extract_layer_index

from ...layer.impl import SparseAttentionImpl
from ...methods import DecodeRows
from ...methods.base import SelectingMethod
from ...worker import WorkerExtension
from .measure import Setting, measure_row, read_context


class Probe(SelectingMethod):
    """Dense attention; every decode row's :class:`RowResult` goes into ``notes``."""

    def __init__(self, impl: SparseAttentionImpl, settings: list[Setting]) -> None:
        super().__init__(impl.config, impl.shape, impl.ops)
        self.settings = settings
        self.notes: list[dict] = []

    def select(
        self, query: torch.Tensor, kv_cache: torch.Tensor, rows: DecodeRows
    ) -> None:
        """Keep everything, and measure what the settings would keep."""
        rows.counts.fill_(-1)
        shape = self.shape
        grouped = query.float().unflatten(1, (shape.num_kv_heads, -1))
        lens, budgets = rows.seq_lens.tolist(), rows.budgets.tolist()
        for row, (seq_len, budget) in enumerate(zip(lens, budgets)):
            if budget < 0 or seq_len == 0:  # a prompt's token, or padding
                continue
            context = read_context(kv_cache, rows.block_table[row], seq_len, shape)
            found = measure_row(
                grouped[row], context, shape, self.config, self.settings
            )
            self.notes.append({"seq_len": seq_len, **asdict(found)})


class ProbeExtension(WorkerExtension):
    """Worker methods for ``LLM(worker_extension_cls=...)``."""

    def start_probe(self, settings: list[tuple[int, float]]) -> None:
        """From here on decode rows are dense and measured, until
        ``reconfigure_sparse`` gives the layers their methods back.

        Args:
            settings: (rank, top_p) of every point of the grid.
        """
        self.probes: dict[int, Probe] = {}
        grid = [Setting(*setting) for setting in settings]
        layers = self.vllm_config.compilation_config.static_forward_context
        for name, layer in layers.items():
            impl = getattr(layer, "impl", None)
            if isinstance(impl, SparseAttentionImpl):
                probe = Probe(impl, grid)
                impl.method = self.probes[extract_layer_index(name)] = probe

    def take_probe(self) -> dict[int, list[dict]]:
        """By layer index: ``seq_len`` and the fields of :class:`RowResult`, a row
        each, since the last call."""
        notes = {index: probe.notes for index, probe in self.probes.items()}
        for probe in self.probes.values():
            probe.notes = []
        return notes

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Worker methods: statistics of one worker, and other options between requests."""

from dataclasses import asdict

from .config import NAMESPACE, SparseConfig
from .layer.impl import SparseAttentionImpl
from .ops.kept import summary
from .stats.recorder import recorder
from .step.builder import SparseMetadataBuilder


class WorkerExtension:
    """Worker methods for ``LLM(worker_extension_cls=...)`` and ``collective_rpc``."""

    def sparse_stats(self) -> dict[str, int]:
        """Totals of this worker: the fields of :class:`SparseStats`."""
        return recorder.snapshot()

    def sparse_kept_tokens(self) -> dict[str, list[dict[str, float]]]:
        """Tokens that sparse rows kept since the last reset, per KV head, by layer:
        the fields of :class:`vllm_sparse.ops.kept.KeptTokens`."""
        return {
            name: [asdict(summary(head)) for head in heads]
            for name, heads in recorder.kept_tokens().items()
        }

    def sparse_kept_histograms(self) -> dict[str, list[list[int]]]:
        """The same as counts: [num_kv_heads][KEPT_BINS], by layer."""
        return {name: heads.tolist() for name, heads in recorder.kept_tokens().items()}

    def reset_sparse_stats(self) -> None:
        recorder.reset()

    def reconfigure_sparse(self, options: dict) -> None:
        """Switch the running engine to other options; for evaluation, between requests.

        Args:
            options: as under ``additional_config["sparse"]``.

        Raises:
            SparseConfigError: when they cannot be taken; nothing is changed then.
        """
        given = {NAMESPACE: options}
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        parts = [getattr(layer, "impl", None) for layer in layers]
        groups = [g for groups in self.model_runner.attn_groups for g in groups]
        # A lossless engine's drafts have builders of their own.
        drafter = getattr(self.model_runner, "drafter", None)
        groups += getattr(drafter, "draft_attn_groups", [])
        speculator = getattr(self.model_runner, "speculator", None)
        groups += [g for gs in getattr(speculator, "attn_groups", []) for g in gs]
        for group in groups:
            parts += group.metadata_builders
        ours = (SparseAttentionImpl, SparseMetadataBuilder)
        parts = [part for part in parts if isinstance(part, ours)]
        configs = [
            SparseConfig.from_additional_config(given, part.defaults) for part in parts
        ]
        for part, config in zip(parts, configs):
            part.check(config)
        for part, config in zip(parts, configs):
            part.configure(config)

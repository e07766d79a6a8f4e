# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Blocks of lines and of their anchors (arena.py): vLLM's own managers, whose figures
are ours.

Importing this registers the specs; it is imported wherever a spec is unpickled.
"""

from dataclasses import dataclass

from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .held import CountsBlocks


@dataclass(frozen=True, kw_only=True)
class LinesSpec(SlidingWindowSpec):
    """Lines that are near: a window of whole blocks."""


@dataclass(frozen=True, kw_only=True)
class ArenaSpec(FullAttentionSpec):
    """Anchors: one state for LINE_GROUP tokens."""


class LinesManager(CountsBlocks, SlidingWindowManager):
    """Frees old lines."""


class ArenaManager(CountsBlocks, FullAttentionManager):
    """Frees nothing while a request runs."""

    # A place is one of LINE_GROUP tokens.
    supports_fine_grained_hash_lookup = False

    def _cache_partial_tail_block(self, request, num_tokens: int) -> None:
        """Never: see ``supports_fine_grained_hash_lookup``."""


# vLLM registers its own specs only while the registry is empty.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    LinesSpec, LinesManager, uniform_type_base_spec=SlidingWindowSpec
)
KVCacheSpecRegistry.register(
    ArenaSpec, ArenaManager, uniform_type_base_spec=FullAttentionSpec
)

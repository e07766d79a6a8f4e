# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What requests that give blocks back hold, for the live figures. Managers are in the
scheduler's process, so no worker is asked."""

from collections.abc import Iterable

from .evicting import EvictingManager


class HeldBlocks:
    """Of an engine's running requests.

    Args:
        managers: those of ours, each with the bytes that one of its blocks has in all
            layers, on all ranks.
    """

    def __init__(self, managers: Iterable[tuple[EvictingManager, int]]) -> None:
        self._managers = tuple(managers)

    @classmethod
    def of(cls, scheduler, ranks: int) -> "HeldBlocks | None":
        """
        Args:
            scheduler: vLLM's; None where none of its managers gives blocks back.
            ranks: of tensor parallelism, whose blocks are alike.
        """
        cache = scheduler.kv_cache_manager
        groups = cache.kv_cache_config.kv_cache_groups
        found = [
            (m, m.kv_cache_spec.page_size_bytes * len(group.layer_names) * ranks)
            for m, group in zip(cache.coordinator.single_type_managers, groups)
            if isinstance(m, EvictingManager)
        ]
        return cls(found) if found else None

    def counts(self) -> dict[str, int]:
        """Since the engine started."""
        return {"blocks_given_back": sum(m.given_back for m, _ in self._managers)}

    def now(self) -> dict[str, int]:
        """Of the requests that have blocks at present, states included."""
        held: dict[str, int] = {}
        for manager, size in self._managers:
            for name, blocks in manager.held_blocks().items():
                held[name] = held.get(name, 0) + blocks * size
        each = held.values()
        return {
            "requests_holding": len(held),
            "kv_bytes_held": sum(each),
            "kv_bytes_held_most": max(each, default=0),
        }

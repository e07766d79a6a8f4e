# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What requests that give blocks back hold, for the live figures. Managers are in the
scheduler's process, so no worker is asked."""

from collections.abc import Iterable


class CountsBlocks:
    """Goes before a manager of vLLM's in the bases."""

    given_back = 0  # blocks since the engine started

    def held_blocks(self) -> dict[str, int]:
        """Of every request that has some; blocks that requests share count for each."""
        null = self._null_block
        return {
            name: sum(block is not null for block in blocks)
            for name, blocks in self.req_to_blocks.items()
            if blocks
        }

    def _remove_blocks_in_range(
        self, request_id: str, first_block: int, last_block: int
    ) -> None:
        # Those before are null already: vLLM, too, looks from the end for the first.
        blocks = self.req_to_blocks.get(request_id, ())[first_block:last_block]
        for block in reversed(blocks):
            if block is self._null_block:
                break
            self.given_back += 1
        super()._remove_blocks_in_range(request_id, first_block, last_block)


class HeldBlocks:
    """Of an engine's running requests.

    Args:
        managers: those of ours, each with the bytes that one of its blocks has in all
            layers, on all ranks.
    """

    def __init__(self, managers: Iterable[tuple[CountsBlocks, int]]) -> None:
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
            if isinstance(m, CountsBlocks)
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

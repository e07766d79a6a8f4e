# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Requests that give blocks back while they run (cache/eviction.py).

vLLM's own sliding windows and ``RSWAManager`` are the precedents: a block that leaves
becomes the null block in the request's list, and vLLM says up to which token all steps
are through (``processed_computed_tokens``), steps under way and drafts left out.

Importing this registers the spec; it is imported wherever a spec is unpickled.
"""

from dataclasses import dataclass, fields, replace
from functools import cache
from math import inf

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from ..cache.eviction import LAG_BLOCKS, Eviction
from ..cache.layout import BLOCK_SIZE
from .held import CountsBlocks


@dataclass(frozen=True, kw_only=True)
class EvictingSpec(FullAttentionSpec):
    """Full attention whose requests keep their first and last blocks.

    Attributes:
        eviction: in blocks of the kernels, of which a block here holds one or more.
        in_flight_tokens: the most that steps under way compute.
        alone: no other layers have blocks. Beside others vLLM cuts what the prefix
            cache has to what all have, and would cut a prefix with a gap in the middle
            of what is needed: then only whole prefixes are found.
    """

    eviction: Eviction = Eviction(0, 0, prompts=False)
    in_flight_tokens: int = 0
    alone: bool = True

    @classmethod
    def asked_of(cls, get_kv_cache_spec, eviction: Eviction, alone: bool, vllm_config):
        """A layer's spec, as its method says, with what its requests keep."""
        spec = get_kv_cache_spec(vllm_config)
        values = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec)}
        tokens = vllm_config.max_in_flight_tokens
        return cls(**values, eviction=eviction, in_flight_tokens=tokens, alone=alone)

    def gone(self, computed_tokens: int) -> range:
        """Blocks that no position from ``computed_tokens`` on needs."""
        gone, parts = (
            self.eviction.evicted(computed_tokens),
            self.block_size // BLOCK_SIZE,
        )
        return range(cdiv(gone.start, parts), gone.stop // parts)

    @property
    def most_blocks(self) -> int | None:
        """That a request holds at a time; None: those of its context, as prompts are
        held whole."""
        if not self.eviction.prompts:
            return None
        kept = (self.eviction.kept_blocks + LAG_BLOCKS) * BLOCK_SIZE
        # Neither end of the window need be one of a block.
        return cdiv(kept + self.in_flight_tokens, self.block_size) + 2

    def max_memory_usage_bytes(self, vllm_config) -> int:
        whole = super().max_memory_usage_bytes(vllm_config)
        if self.most_blocks is None:
            return whole
        return min(whole, self.most_blocks * self.page_size_bytes)

    @classmethod
    def merge(cls, specs):
        # vLLM tries whether specs are alike, and takes an assertion for a no.
        assert all(isinstance(spec, EvictingSpec) for spec in specs)
        own = {(s.eviction, s.in_flight_tokens, s.alone) for s in specs}
        assert len(own) == 1, "layers of a group must keep the same blocks"
        ((eviction, tokens, alone),) = own
        own = dict(eviction=eviction, in_flight_tokens=tokens, alone=alone)
        return replace(super().merge(specs), **own)


class EvictingManager(CountsBlocks, FullAttentionManager):
    """Frees what no later position needs."""

    # What is left of a context ends with a whole block.
    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: EvictingSpec, **kwargs) -> None:
        # vLLM does so for its own windows.
        kwargs["max_admission_blocks_per_request"] = kv_cache_spec.most_blocks
        super().__init__(kv_cache_spec, **kwargs)
        # Tokens that attend to everything before them, by request: its prompt, or all
        # that a preempted one computes anew.
        self._dense_until: dict[str, float] = {}
        self._new: set[str] = set()

    def get_num_blocks_to_allocate(
        self, request_id: str, *args, prefill_end: int = 0, **kwargs
    ) -> int:
        if request_id not in self._dense_until:
            # 0: vLLM does not say, and `cache_blocks` will.
            self._dense_until[request_id] = prefill_end + 1 if prefill_end else inf
            self._new.add(request_id)
        return super().get_num_blocks_to_allocate(
            request_id, *args, prefill_end=prefill_end, **kwargs
        )

    def cache_blocks(self, request, *args, **kwargs) -> None:
        name = request.request_id
        if request.resumable:  # more of its prompt may come at any time
            self._dense_until[name] = inf
        elif name in self._new:
            tokens = max(request.num_prompt_tokens, request.num_tokens)
            self._dense_until[name] = tokens
        self._new.discard(name)
        super().cache_blocks(request, *args, **kwargs)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        spec, done = self.kv_cache_spec, processed_computed_tokens
        if spec.eviction.prompts or done >= self._dense_until.get(request_id, inf):
            gone = spec.gone(done)
            self._remove_blocks_in_range(request_id, gone.start, gone.stop)

    def pop_blocks_for_free(self, request_id: str):
        self._dense_until.pop(request_id, None)
        self._new.discard(request_id)
        return super().pop_blocks_for_free(request_id)

    def _cache_partial_tail_block(self, request, num_tokens: int) -> None:
        """Never: see ``supports_fine_grained_hash_lookup``."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool,
        kv_cache_spec: EvictingSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **kwargs,
    ):
        """Where prompts are streamed, only what is still used of a prefix must be
        there: its sinks, and the blocks at its end."""
        if not kv_cache_spec.eviction.prompts or not kv_cache_spec.alone:
            return super().find_longest_cache_hit(
                block_hashes,
                max_length,
                kv_cache_group_ids,
                block_pool,
                kv_cache_spec,
                drop_eagle_block,
                alignment_tokens,
                **kwargs,
            )
        assert not drop_eagle_block, "refused at start"
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        cached = cache(
            lambda block: block_pool.get_cached_block(hashes[block], kv_cache_group_ids)
        )
        length, missing = min(max_length // size, len(hashes)), 0
        while missing is not None:
            length -= length * size % alignment_tokens // size
            gone = kv_cache_spec.gone(length * size)
            sinks = range(min(gone.start, length))
            # The window first: what is missing of it is the shorter prefix's bound.
            window = range(max(gone.start, gone.stop), length)
            missing = next((b for b in reversed(window) if not cached(b)), None)
            if missing is None:
                missing = next((b for b in sinks if not cached(b)), None)
            if missing is not None:
                length = missing  # all that is longer needs it, too
        kept = [*sinks, *window]
        hits = tuple([block_pool.null_block] * length for _ in kv_cache_group_ids)
        for block in kept:
            for hit, found in zip(hits, cached(block), strict=True):
                hit[block] = found
        return hits, length * size


# vLLM registers its own specs only while the registry is empty.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    EvictingSpec, EvictingManager, uniform_type_base_spec=FullAttentionSpec
)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Blocks that a request holds ahead of its tokens, for quantised formats.

The rows of a block that is not full lie in the chunks of the blocks to come
(layout.py), so a request needs those before it has tokens for them. Nothing else
changes: what is cached, shared, preempted and freed are still whole blocks.

Importing this registers the spec; it is imported wherever a spec is unpickled.
"""

from dataclasses import dataclass, fields, replace

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class LookaheadSpec(FullAttentionSpec):
    """Full attention whose requests hold blocks for ``lookahead_tokens`` more."""

    lookahead_tokens: int = 0

    @classmethod
    def of(cls, spec: FullAttentionSpec, **changes) -> "LookaheadSpec":
        """``spec`` with further fields."""
        values = {f.name: getattr(spec, f.name) for f in fields(spec)}
        return cls(**values | changes)

    @classmethod
    def asked_of(cls, get_kv_cache_spec, ahead: int, vllm_config) -> "LookaheadSpec":
        """A layer's spec, as its method says, that looks ``ahead`` tokens ahead."""
        return cls.of(get_kv_cache_spec(vllm_config), lookahead_tokens=ahead)

    def max_memory_usage_bytes(self, vllm_config) -> int:
        ahead = cdiv(self.lookahead_tokens, self.block_size) * self.page_size_bytes
        return super().max_memory_usage_bytes(vllm_config) + ahead

    def max_num_blocks_per_req(self, vllm_config, max_len: int) -> int:
        return super().max_num_blocks_per_req(
            vllm_config, max_len + self.lookahead_tokens
        )

    @classmethod
    def merge(cls, specs):
        # vLLM tries whether specs are alike, and takes an assertion for a no.
        assert all(isinstance(spec, LookaheadSpec) for spec in specs)
        ahead = {spec.lookahead_tokens for spec in specs}
        assert len(ahead) == 1, "layers of a group must look equally far ahead"
        return replace(super().merge(specs), lookahead_tokens=ahead.pop())


class LookaheadManager(FullAttentionManager):
    """Allocates blocks for ``lookahead_tokens`` more than there are."""

    # A block that is not full has nothing in it that another request could use.
    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: LookaheadSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._ahead = kv_cache_spec.lookahead_tokens

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        **kwargs,
    ) -> int:
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens + self._ahead,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model + self._ahead,
            **kwargs,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ):
        return super().allocate_new_blocks(
            request_id, num_tokens + self._ahead, num_tokens_main_model + self._ahead
        )

    def _cache_partial_tail_block(self, request, num_tokens: int) -> None:
        """Never: see ``supports_fine_grained_hash_lookup``."""


# vLLM registers its own specs only while the registry is empty.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    LookaheadSpec, LookaheadManager, uniform_type_base_spec=FullAttentionSpec
)

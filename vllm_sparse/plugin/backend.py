# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the backends can do, as vLLM asks it, and the KV bytes they need."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch

from .versions import require_supported

require_supported()

from vllm.v1.attention.backend import (  # noqa: E402
    AttentionBackend,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout  # noqa: E402

from ..cache.formats import ROWS, KvFormat  # noqa: E402
from ..cache.layout import BLOCK_SIZE, BlockLayout  # noqa: E402
from ..config import BACKEND_DEFAULTS  # noqa: E402
from .mode import BlockMode  # noqa: E402
from .refusals import DTYPES, HEAD_SIZES  # noqa: E402


@cache
def _with_defaults(backend: type, part: type) -> type:
    """``part`` (implementation or builder) with a backend's own options, if any."""
    if not backend.defaults:
        return part
    name = f"{backend.__name__}{part.__name__}"
    own = {"defaults": backend.defaults, "backend": backend.get_name().lower()}
    return type(name, (part,), own)


@cache
def keeping(backend: type, fmt: KvFormat) -> type:
    """``backend`` for layers whose blocks have a format.

    vLLM asks a backend's class how large blocks are, without saying of which layer.
    """
    if fmt == backend.fmt:
        return backend
    # vLLM groups layers by their backend's full name.
    own = {"fmt": fmt, "__module__": backend.__module__}
    return type(backend.__name__, (backend,), own)


class SparqBackend(AttentionBackend):
    """``--attention-backend sparq``."""

    # Storing may seal blocks, which needs the metadata.
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = list(DTYPES)
    # Quantised formats have an option of ours: vLLM's list of dtypes is closed.
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "SPARQ"

    # Options that differ from SparseConfig's defaults.
    defaults: ClassVar[Mapping[str, Any]] = {}

    # How the layers' blocks keep K and V (see ``keeping``).
    fmt: ClassVar[KvFormat] = ROWS

    @classmethod
    def get_impl_cls(cls):
        from ..layer.impl import SparseAttentionImpl

        return _with_defaults(cls, SparseAttentionImpl)

    @classmethod
    def get_builder_cls(cls):
        from ..step.builder import SparseMetadataBuilder

        return _with_defaults(cls, SparseMetadataBuilder)

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec=None,
    ) -> list[int | MultipleOf]:
        # Larger blocks are split into these by vLLM; codes belong to one kernel block.
        return [BLOCK_SIZE]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Head-major: each (block, KV head) is one contiguous chunk.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        # Blocks carry their sidecar; connectors.py has those that are served.
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Size every block: see cache/layout.py."""
        if spec.state_content_bytes is not None:
            return spec
        layout = BlockLayout(spec.head_size, spec.dtype.itemsize, cls.fmt)
        content = {
            "state_content_bytes": layout.content_bytes,
            "kv_quant_mode": BlockMode.SPARSE,
        }
        if not cls.fmt.quantised:
            return replace(spec, **content)
        from .managers import LookaheadSpec

        ahead = layout.lookahead_blocks * BLOCK_SIZE
        ahead = max(ahead, getattr(spec, "lookahead_tokens", 0))
        return LookaheadSpec.of(spec, **content, lookahead_tokens=ahead)


class TwilightBackend(SparqBackend):
    """``--attention-backend twilight``: sparq with budgets that adapt to every head."""

    defaults: ClassVar[Mapping[str, Any]] = BACKEND_DEFAULTS["TWILIGHT"]

    @staticmethod
    def get_name() -> str:
        return "TWILIGHT"


class StreamingBackend(SparqBackend):
    """``--attention-backend streaming``: sinks and a window, the rest given back."""

    defaults: ClassVar[Mapping[str, Any]] = BACKEND_DEFAULTS["STREAMING"]

    @staticmethod
    def get_name() -> str:
        return "STREAMING"


class LessBackend(SparqBackend):
    """``--attention-backend less``: streaming, with a learned state for what left."""

    defaults: ClassVar[Mapping[str, Any]] = BACKEND_DEFAULTS["LESS"]

    @staticmethod
    def get_name() -> str:
        return "LESS"


class AnchorBackend(SparqBackend):
    """``--attention-backend anchor``: of eight old tokens one stays."""

    defaults: ClassVar[Mapping[str, Any]] = BACKEND_DEFAULTS["ANCHOR"]

    @staticmethod
    def get_name() -> str:
        return "ANCHOR"

    @classmethod
    def get_builder_cls(cls):
        from ..step.anchors import AnchorMetadataBuilder

        return _with_defaults(cls, AnchorMetadataBuilder)

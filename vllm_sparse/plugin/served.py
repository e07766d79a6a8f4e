# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which of a model's attention layers are ours, asked of the layers themselves.

The engine checks and logs it when the layers have been made, whatever vLLM remembers
of an earlier engine and whoever chose the backend of a layer; the doctor asks the same.
"""

from collections import Counter
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionImplBase, AttentionType
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec

from ..config import SparseConfigError
from ..layer.impl import SparseAttentionImpl
from ..methods.dense import Dense
from .backend import keeping
from .registry import chosen_names
from .versions import init_logger

logger = init_logger(__name__)

FULL = "full attention"
SLIDING = "sliding-window attention"
CHUNKED = "chunked local attention"
CROSS = "cross-attention"
ENCODER = "encoder attention"


@dataclass(frozen=True)
class LayerKind:
    """Attention layers that are served alike.

    Attributes:
        dense: who or what keeps them dense; None where they choose tokens.
        ours: whether they lie in our blocks.
        num_heads, num_kv_heads: on this rank.
        chunk: the most tokens that they look back on; None: all.
    """

    kind: str
    ours: bool
    dense: str | None
    head_size: int
    num_heads: int
    num_kv_heads: int
    chunk: int | None = None


def layer_kinds(vllm_config: VllmConfig) -> Counter[LayerKind]:
    """The attention layers of a model that has been made, counted."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return Counter(
        _kind(layer)
        for layer in layers
        if isinstance(getattr(layer, "impl", None), AttentionImplBase)
    )


def _kind(layer) -> LayerKind:
    impl = layer.impl
    ours = isinstance(impl, SparseAttentionImpl)
    kind, dense, chunk = FULL, None, getattr(layer, "attention_chunk_size", None)
    attn_type = getattr(layer, "attn_type", AttentionType.DECODER)
    if attn_type == AttentionType.ENCODER_DECODER:
        kind = CROSS
    elif attn_type != AttentionType.DECODER:
        kind = ENCODER
    elif getattr(layer, "sliding_window", None) is not None:
        kind = SLIDING
    elif chunk is not None:
        kind = CHUNKED
    if not ours:
        dense = layer.get_attn_backend().get_name()
    elif kind == CHUNKED:
        dense = "chunks are short"
    elif impl.config.selector == "dense":
        dense = "sparse.selector"
    elif isinstance(impl.method_of(layer), Dense):
        dense = "sparse.dense_layers"
    # Layers that are not ours may be of any class.
    shape = (getattr(layer, n, 0) for n in ("head_size", "num_heads", "num_kv_heads"))
    return LayerKind(kind, ours, dense, *shape, chunk)


def check_layers(vllm_config: VllmConfig) -> None:
    """Refuse what our layers cannot do in this model, and log how many there are; vLLM
    can ask them for the size of their blocks then.

    Raises:
        ValueError: a layer of ours needs more than is served, or there is none.
    """
    layers = vllm_config.compilation_config.static_forward_context
    for name, layer in layers.items():
        impl = getattr(layer, "impl", None)
        if isinstance(impl, SparseAttentionImpl):
            layer.attn_backend = keeping(layer.attn_backend, impl.fmt)
            _check_spec(name, layer, vllm_config)
    kinds = layer_kinds(vllm_config)
    total, ours = kinds.total(), sum(n for k, n in kinds.items() if k.ours)
    backends = " and ".join(chosen_names(vllm_config))
    others = "; ".join(
        f"{count} x {kind.kind}: {kind.dense}"
        for kind, count in kinds.items()
        if kind.dense is not None
    )
    found = f"serves {ours} of {total} attention layers"
    if ours == 0 and vllm_config.parallel_config.pipeline_parallel_size == 1:
        raise ValueError(
            f"--attention-backend {backends} {found} of this model "
            f"({others or 'it has none'}), so it would do nothing: leave "
            "--attention-backend out"
        )
    log = logger.warning if 2 * ours < total else logger.info
    log("%s %s%s", backends, found, f" (dense are {others})" if others else "")


def _check_spec(name: str, layer, vllm_config: VllmConfig) -> None:
    spec = layer.get_kv_cache_spec(vllm_config)
    kind = type(spec)
    served = f"--attention-backend {layer.impl.backend} does not serve"
    if kind not in (FullAttentionSpec, ChunkedLocalAttentionSpec):
        raise ValueError(
            f"{served} the cache of {name} ({kind.__name__}): leave "
            "--attention-backend out"
        )
    if getattr(spec, "non_causal", False):
        raise ValueError(
            f"{served} {name}, whose attention is not causal: leave "
            "--attention-backend out"
        )
    if kind is ChunkedLocalAttentionSpec and layer.impl.fmt.quantised:
        raise SparseConfigError(
            f"sparse.kv_format = {layer.impl.fmt.name!r} does not serve models with "
            f"{CHUNKED} ({name}): leave it out"
        )

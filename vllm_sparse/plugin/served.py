# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which of a model's attention layers are ours, asked of the layers themselves.

The engine checks and logs it when the layers have been made, whatever vLLM remembers
of an earlier engine and whoever chose the backend of a layer; the doctor asks the same.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionImplBase, AttentionType
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec

from ..cache.layout import BLOCK_SIZE
from ..config import TOP_P, SparseConfig, SparseConfigError
from ..layer.holders import norms_queries
from ..layer.impl import SparseAttentionImpl
from ..methods.dense import Dense
from .backend import keeping
from .registry import is_ours, names_for_drafts, names_for_target
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


def layer_kinds(vllm_config: VllmConfig, drafts: bool = False) -> Counter[LayerKind]:
    """The attention layers of a model that has been made, counted.

    Args:
        drafts: of the draft model instead.
    """
    layers = vllm_config.compilation_config.static_forward_context.values()
    return Counter(
        _kind(layer)
        for layer in layers
        if isinstance(getattr(layer, "impl", None), AttentionImplBase)
        and getattr(layer, "is_draft_layer", False) is drafts
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
            if impl.eviction is not None:
                _give_back(name, layer, vllm_config)
    if any(_leaves_anchors(layer) for layer in layers.values()):
        from .arena import add_arena

        add_arena(vllm_config)
    _look_equally_far(layers.values(), vllm_config)
    if names := names_for_target(vllm_config):
        _report(" and ".join(names), layer_kinds(vllm_config), vllm_config)
        _mind_norms(layers.values(), vllm_config)
    if drafts := layer_kinds(vllm_config, drafts=True):
        _report_drafts(drafts, vllm_config)
    _log_options(layers.values())


def _leaves_anchors(layer) -> bool:
    impl = getattr(layer, "impl", None)
    return isinstance(impl, SparseAttentionImpl) and impl.config.selector == "anchor"


def _give_back(name: str, layer, vllm_config: VllmConfig) -> None:
    """Let the layer's requests give blocks back."""
    from .evicting import EvictingSpec

    kind = type(layer.get_kv_cache_spec(vllm_config))
    if kind is not FullAttentionSpec:
        raise ValueError(
            f"{name}: --attention-backend {layer.impl.backend} gives blocks of full "
            f"attention back, and this layer's are {kind.__name__}: leave "
            "--attention-backend out"
        )
    layers = vllm_config.compilation_config.static_forward_context.values()
    others = [
        other
        for other in layers
        if isinstance(other, AttentionLayerBase)
        and not isinstance(getattr(other, "impl", None), SparseAttentionImpl)
        and other.get_kv_cache_spec(vllm_config) is not None
    ]
    if others and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            f"--attention-backend {layer.impl.backend} gives blocks back, and other "
            "layers of this model would lose theirs: remove "
            "--disable-hybrid-kv-cache-manager"
        )
    # Asked again later: vLLM has not settled the size of blocks yet.
    layer.get_kv_cache_spec = partial(
        EvictingSpec.asked_of,
        layer.get_kv_cache_spec,
        layer.impl.eviction,
        not others,
    )


def _look_equally_far(layers, vllm_config: VllmConfig) -> None:
    """Let layers with full attention hold as many blocks ahead as the farthest of ours.

    vLLM puts them into one group, whose requests hold the same blocks for all: so a
    draft model's plain blocks have them beside the target's quantised ones.
    """
    layers = [layer for layer in layers if isinstance(layer, AttentionLayerBase)]
    ours = (getattr(layer, "impl", None) for layer in layers)
    layouts = (i.shape.layout for i in ours if isinstance(i, SparseAttentionImpl))
    blocks = max((layout.lookahead_blocks for layout in layouts), default=0)
    if not blocks:
        return
    from .managers import LookaheadSpec

    for layer in layers:
        if type(layer.get_kv_cache_spec(vllm_config)) is FullAttentionSpec:
            # Asked again later: vLLM has not settled the size of blocks yet.
            layer.get_kv_cache_spec = partial(
                LookaheadSpec.asked_of, layer.get_kv_cache_spec, blocks * BLOCK_SIZE
            )


def _report(backends: str, kinds: Counter[LayerKind], vllm_config: VllmConfig) -> None:
    total, ours = kinds.total(), sum(n for k, n in kinds.items() if k.ours)
    others = _dense(kinds)
    found = f"serves {ours} of {total} attention layers"
    if ours == 0 and vllm_config.parallel_config.pipeline_parallel_size == 1:
        raise ValueError(
            f"--attention-backend {backends} {found} of this model "
            f"({others or 'it has none'}), so it would do nothing: leave "
            "--attention-backend out"
        )
    log = logger.warning if 2 * ours < total else logger.info
    log("%s %s%s", backends, found, f" (dense are {others})" if others else "")


def _mind_norms(layers, vllm_config: VllmConfig) -> None:
    """Let budgets adapt where the model norms queries and keys and options leave them
    open, and say what that is about (docs/adaptive.md)."""
    normed = (x for x in layers if _of_target(x) and norms_queries(x.impl))
    if any(_kind(layer).kind != CHUNKED for layer in normed):
        _tell_of_norms(layers, vllm_config)
    if text := about_norms(vllm_config):
        logger.warning("%s", text)


def about_norms(vllm_config: VllmConfig) -> str | None:
    """What to know of budgets in a model that norms queries and keys, once
    :func:`check_layers` was there; None: nothing."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    sparse = [x for x in layers if _of_target(x) and _kind(x).dense is None]
    risky = [
        layer
        for layer in sparse
        if norms_queries(layer.impl)
        and _asked(layer.impl, vllm_config).guesses(layer.head_size)
    ]
    if not risky:
        return None
    text = (
        f"{len(risky)} of {len(sparse)} sparse layers norm their queries and keys "
        "(QK-norm)"
    )
    if any(layer.impl.config.top_p is None for layer in risky):
        return (
            f"{text} and have a fixed budget: there a few channels may not tell where "
            "a fact stands, and answers miss it silently. Leave sparse.top_k out and "
            "budgets adapt, or use the options that `vllm-sparse calibrate` writes."
        )
    return (
        f"{text}, where fixed budgets may lose facts silently: budgets adapt (top_p "
        f"{TOP_P}), and read more where attention is flat. sparse.top_k fixes them, as "
        f"does sparse.rank = {risky[0].head_size}, which reads all channels."
    )


def _asked(impl: SparseAttentionImpl, vllm_config: VllmConfig) -> SparseConfig:
    """The options as they were given."""
    given = vllm_config.additional_config
    return SparseConfig.from_additional_config(given, impl.defaults)


def _log_options(layers) -> None:
    ours = (getattr(layer, "impl", None) for layer in layers)
    ours = [impl for impl in ours if isinstance(impl, SparseAttentionImpl)]
    for impl in {impl.config: impl for impl in ours}.values():
        logger.info("Sparse attention: %s", impl.summary)
    sparse = (x for x in layers if _of_target(x) and _kind(x).dense is None)
    costly = [x.impl.fmt for x in sparse if x.impl.fmt.reads_whole_keys]
    for name, bits in {(fmt.name, fmt.key_bits) for fmt in costly}:
        logger.info(
            "sparse.kv_format = %r keeps K by channel: where decoding is sparse, all "
            "of K is read in every block with a chosen token, up to %.1f %% of the "
            "bytes of a 16-bit cache, however few are chosen. kv_format 'k8v4' holds "
            "less and reads chosen tokens alone.",
            name,
            100 * bits / 32,
        )


def _tell_of_norms(layers, vllm_config: VllmConfig) -> None:
    """All layers of ours, a draft model's too: one builder may serve several."""
    for layer in layers:
        impl = getattr(layer, "impl", None)
        if isinstance(impl, SparseAttentionImpl):
            impl.normed = True
            config = _asked(impl, vllm_config)
            if impl.check(config) != impl.config:
                impl.configure(config)


def _of_target(layer) -> bool:
    """Whether a layer of ours is the target model's."""
    ours = isinstance(getattr(layer, "impl", None), SparseAttentionImpl)
    return ours and not getattr(layer, "is_draft_layer", False)


def _report_drafts(kinds: Counter[LayerKind], vllm_config: VllmConfig) -> None:
    names, total = names_for_drafts(vllm_config), kinds.total()
    ours, others = sum(n for k, n in kinds.items() if k.ours), _dense(kinds)
    asked = vllm_config.speculative_config.attention_backend
    inherits = vllm_config.use_v2_model_runner and is_ours(
        vllm_config.attention_config.backend
    )
    if ours and asked is not None and not names and inherits:
        raise ValueError(
            f"attention_backend {asked.name} in --speculative-config does nothing: "
            "vLLM's V2 runner gives a draft model the target's backend. Remove it"
        )
    if ours and not names:  # by backend_per_kind, which holds for drafts, too
        names = names_for_target(vllm_config)
    if names and not ours:
        raise ValueError(
            f"attention_backend {names[0]} in --speculative-config serves 0 of {total} "
            f"attention layers of the draft model ({others}), so it would do nothing: "
            "remove it"
        )
    if not names:
        logger.info(
            "The draft model's %d attention layers are dense (%s); attention_backend "
            "in --speculative-config chooses for them.",
            total,
            others,
        )
        return
    sparse = sum(n for k, n in kinds.items() if k.dense is None)
    log = logger.info if sparse else logger.warning
    dense = f" (dense are {others})" if others else ""
    log("%s serves %d of %d draft layers%s", names[0], ours, total, dense)


def _dense(kinds: Counter[LayerKind]) -> str:
    """The layers that do not choose tokens, and why."""
    return "; ".join(
        f"{count} x {kind.kind}: {kind.dense}"
        for kind, count in kinds.items()
        if kind.dense is not None
    )


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

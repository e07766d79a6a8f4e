# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A model's attention layers, by its configuration: which would be sparse."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import BACKEND_DEFAULTS, SparseConfig, SparseConfigError

FULL, SLIDING = "full attention", "sliding-window attention"
# Names of transformers' ``layer_types``.
LAYER_TYPES = {
    "full_attention": FULL,
    "attention": FULL,
    "sliding_attention": SLIDING,
}


class DoctorError(RuntimeError):
    """The question cannot be answered; the message says what to change."""


@dataclass(frozen=True)
class LayerKind:
    """Layers that are served alike.

    Attributes:
        reason: why they are not sparse, None where they are.
        refused: vLLM would not start.
    """

    kind: str
    count: int
    reason: str | None = None
    refused: bool = False


@dataclass(frozen=True)
class Model:
    """Shapes on one rank.

    Attributes:
        weight_bytes: of all ranks; None where the weights are not on this machine.
    """

    name: str
    head_size: int
    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype
    max_model_len: int
    tensor_parallel_size: int
    layers: list[LayerKind]
    weight_bytes: int | None

    @property
    def sparse_layers(self) -> int:
        return sum(kind.count for kind in self.layers if kind.reason is None)

    @property
    def dense_layers(self) -> int:
        """Layers of the same cache that read all of it."""
        return sum(k.count for k in self.layers if k.kind == FULL and k.reason)

    @property
    def refused(self) -> bool:
        return any(kind.refused for kind in self.layers)


def inspect_model(
    name: str,
    backend: str,
    config: SparseConfig,
    tensor_parallel_size: int = 1,
    **engine_args: Any,
) -> Model:
    """Read a model's configuration; no weights are loaded.

    Args:
        name: name or folder, as for vLLM.
        engine_args: further arguments of vLLM's ``EngineArgs``.

    Raises:
        DoctorError: vLLM cannot read the model, or its heads cannot be split so.
    """
    from vllm.engine.arg_utils import EngineArgs

    try:
        model = EngineArgs(model=name, **engine_args).create_model_config()
    except Exception as error:
        text = f"vLLM cannot read the model {name!r}: {error}"
        raise DoctorError(text) from error
    heads = model.model_arch_config.total_num_attention_heads
    if heads % tensor_parallel_size:
        raise DoctorError(
            f"{heads} attention heads cannot be split over --tensor-parallel-size "
            f"{tensor_parallel_size}"
        )
    num_heads = heads // tensor_parallel_size
    kv_heads = model.get_total_num_kv_heads()
    if kv_heads % tensor_parallel_size and tensor_parallel_size % kv_heads:
        raise DoctorError(
            f"{kv_heads} KV heads cannot be split over --tensor-parallel-size "
            f"{tensor_parallel_size}"
        )
    num_kv_heads = max(1, kv_heads // tensor_parallel_size)
    return Model(
        name=name,
        head_size=model.get_head_size(),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        tensor_parallel_size=tensor_parallel_size,
        layers=_layers(model, backend, config, num_heads // num_kv_heads),
        weight_bytes=_weight_bytes(name),
    )


def _layers(model, backend: str, config: SparseConfig, group: int) -> list[LayerKind]:
    counts = Counter(_layer_types(model))
    result = []
    for kind, count in counts.items():
        if kind not in (FULL, SLIDING):
            result.append(LayerKind(kind, count, "a kind that is not served"))
            continue
        refusal = _refusal(model, backend, config, group, kind == SLIDING)
        if refusal is not None:
            result.append(LayerKind(kind, count, refusal, refused=True))
        elif kind == SLIDING:
            result.append(LayerKind(kind, count, "vLLM's own backend serves them"))
        else:
            first = _layer_types(model)[: config.dense_layers].count(FULL)
            dense = count if config.selector == "dense" else first
            why = "selector = dense" if dense == count else "sparse.dense_layers"
            if dense:
                result.append(LayerKind(kind, dense, why))
            if count > dense:
                result.append(LayerKind(kind, count - dense))
    return result


def _layer_types(model) -> list[str]:
    text = model.hf_text_config
    types = getattr(text, "layer_types", None) or getattr(
        text, "layers_block_type", None
    )
    if types:
        return [LAYER_TYPES.get(t, t) for t in types]
    window = model.get_sliding_window() is not None
    window &= getattr(text, "use_sliding_window", True) is not False
    return [SLIDING if window else FULL] * model.get_total_num_hidden_layers()


def _refusal(model, backend: str, config, group: int, sliding: bool) -> str | None:
    """What vLLM would say when it starts, from the code that would say it."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from ..platform import refuse_quantised

    layer = AttentionSelectorConfig(
        head_size=model.get_head_size(),
        dtype=model.dtype,
        kv_cache_dtype="auto",
        block_size=None,
        use_mla=model.use_mla,
        has_sink=model.hf_text_config.model_type == "gpt_oss",
        has_sliding_window=sliding,
    )
    try:
        member = AttentionBackendEnum[backend.upper()]
        current_platform.get_attn_backend_cls(member, layer)
        if sliding:
            refuse_quantised(config)
        else:
            config.resolve(model.get_head_size(), group, current_platform.device_type)
    except (ValueError, NotImplementedError, SparseConfigError) as error:
        return str(error).split(" The layer: ")[0]
    return None


def parse_config(backend: str, additional_config: Any) -> SparseConfig:
    """The options that a backend would run with.

    Raises:
        DoctorError: they are wrong; the message names what is allowed.
    """
    try:
        return SparseConfig.from_additional_config(
            additional_config, BACKEND_DEFAULTS[backend.upper()]
        )
    except SparseConfigError as error:
        raise DoctorError(str(error)) from error


def _weight_bytes(name: str) -> int | None:
    folder = Path(name)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception:  # not downloaded yet: the question has no answer
            return None
    # Some folders hold the weights a second time, under a name of their own.
    patterns = ("model*.safetensors", "*.safetensors", "*.bin")
    files = next((found for p in patterns if (found := list(folder.glob(p)))), [])
    return sum(file.stat().st_size for file in files) or None

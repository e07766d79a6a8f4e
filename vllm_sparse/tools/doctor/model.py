# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A model's attention layers, as the engine would make them: which would be sparse.

vLLM makes the layers, without memory for their weights, and the engine's own check is
asked (plugin/served.py): what is said here is what a start would say.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...config import BACKEND_DEFAULTS, NAMESPACE, SparseConfig, SparseConfigError
from ...plugin.served import LayerKind, about_norms, check_layers, layer_kinds
from ..errors import reason
from .weights import weight_files


class DoctorError(RuntimeError):
    """The question cannot be answered; the message says what to change."""


@dataclass(frozen=True)
class Layers(LayerKind):
    """So many of a kind, on one rank."""

    count: int = 0


# What decodes in one kernel on Hopper GPUs (csrc/cuda/decode/launch.cu).
FAST_HEAD_SIZE, FAST_GROUP = 128, 8


def why_slow(layers: Layers, config: SparseConfig) -> str | None:
    """Why a chain of kernels serves sparse layers on GPUs, which takes longer."""
    if layers.dense is not None or not layers.ours:
        return None
    size, group = layers.head_size, layers.num_heads // layers.num_kv_heads
    formats = ("auto", "k8v4") if size in (64, 128) else ("auto",)
    if size > FAST_HEAD_SIZE:
        return f"head size {size}"
    if group > FAST_GROUP:
        return f"{group} query heads of a KV head"
    if config.kv_format not in formats:
        return f"kv_format {config.kv_format} with head size {size}"
    if config.resolve(size, group, "cuda").mean_value:
        return "mean_value"
    return None


@dataclass(frozen=True)
class Model:
    """Shapes on one rank.

    Attributes:
        refusal: why the engine would not start, None where it would.
        weight_bytes: of all ranks; None where the weights are not on this machine.
        about_norms: what to know of budgets where layers that choose tokens norm their
            queries and keys (QK-norm); None: nothing.
    """

    name: str
    head_size: int
    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype
    max_model_len: int
    tensor_parallel_size: int
    layers: list[Layers]
    refusal: str | None
    weight_bytes: int | None
    # Whether layers of other kinds (windows, states) share the memory with ours.
    other_layers: bool = False
    about_norms: str | None = None

    @property
    def served(self) -> list[Layers]:
        """The layers in our blocks."""
        return [layers for layers in self.layers if layers.ours]


def inspect_model(
    name: str,
    backend: str,
    config: SparseConfig,
    tensor_parallel_size: int = 1,
    **engine_args: Any,
) -> Model:
    """Make a model's layers without their weights, and look at them.

    Args:
        name: name or folder, as for vLLM.
        engine_args: further arguments of vLLM's ``EngineArgs``.

    Raises:
        DoctorError: vLLM cannot read or make the model, or its heads cannot be split
            so.
    """
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=name,
        attention_backend=backend,
        additional_config={NAMESPACE: _given(config, backend)},
        skip_tokenizer_init=True,
        load_format="dummy",
        **engine_args,
    )
    try:
        model = arguments.create_model_config()
    except Exception as error:
        text = f"vLLM cannot read the model {name!r}: {error}"
        raise DoctorError(text) from error
    ranks = tensor_parallel_size
    heads = model.model_arch_config.total_num_attention_heads
    kv_heads = model.get_total_num_kv_heads()
    _check_split("attention heads", heads, ranks, fits=heads % ranks == 0)
    fits = kv_heads % ranks == 0 or ranks % kv_heads == 0
    _check_split("KV heads", kv_heads, ranks, fits)
    layers, refusal, about = _layers(arguments, ranks)
    return Model(
        name=name,
        head_size=model.get_head_size(),
        num_heads=heads // ranks,
        num_kv_heads=max(1, kv_heads // ranks),
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        tensor_parallel_size=ranks,
        layers=layers,
        refusal=refusal,
        weight_bytes=_weight_bytes(name),
        other_layers=model.is_hybrid or any(not found.ours for found in layers),
        about_norms=about,
    )


def _given(config: SparseConfig, backend: str) -> Mapping[str, Any]:
    """The options that a user must have given to have ``config``."""
    usual = asdict(SparseConfig()) | BACKEND_DEFAULTS[backend.upper()]
    return {k: v for k, v in asdict(config).items() if v != usual[k]}


def _check_split(what: str, count: int, ranks: int, fits: bool) -> None:
    if not fits:
        raise DoctorError(
            f"{count} {what} cannot be split over --tensor-parallel-size {ranks}"
        )


def _layers(arguments, ranks: int) -> tuple[list[Layers], str | None, str | None]:
    """The model's attention layers, why the engine would refuse them, and what it says
    of their norms."""
    found: list[Layers] = []
    try:
        vllm_config = arguments.create_engine_config()
        _make(vllm_config)
        found = [
            Layers(**asdict(_on_one_rank(kind, ranks)), count=count)
            for kind, count in layer_kinds(vllm_config).items()
        ]
        check_layers(vllm_config)
    except (ValueError, NotImplementedError, SparseConfigError) as error:
        return found, reason(error), None
    except Exception as error:
        text = f"vLLM cannot make the layers of {arguments.model!r}: {error}"
        raise DoctorError(text) from error
    return found, None, about_norms(vllm_config)


def _on_one_rank(kind: LayerKind, ranks: int) -> LayerKind:
    return replace(
        kind,
        num_heads=kind.num_heads // ranks,
        num_kv_heads=max(1, kind.num_kv_heads // ranks),
    )


def _make(vllm_config) -> None:
    """The model in ``vllm_config``, as one rank of one, its weights without memory."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    places: list[AbstractContextManager] = [torch.device("meta"), _NoWeights()]
    with set_current_vllm_config(vllm_config), _one_rank(), _own_rotary_tables():
        for place in places:
            vllm_config.compilation_config.static_forward_context.clear()
            try:
                with place:
                    initialize_model(vllm_config)
                return
            except (NotImplementedError, RuntimeError) as error:
                # Some models read a tensor that they have just made (ALiBi's slopes).
                if place is places[-1] or "meta" not in str(error):
                    raise


class _NoWeights(TorchFunctionMode):
    """Tensors made to be filled later get no memory; others are real."""

    UNFILLED = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.UNFILLED:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def _own_rotary_tables() -> Iterator[None]:
    """vLLM shares them among all models of a process: later engines need real ones."""
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    others = dict(_ROPE_DICT)
    _ROPE_DICT.clear()
    try:
        yield
    finally:
        _ROPE_DICT.clear()
        _ROPE_DICT.update(others)


@contextmanager
def _one_rank() -> Iterator[None]:
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with tempfile.TemporaryDirectory() as folder:
        try:
            init_distributed_environment(1, 0, f"file://{folder}/rank", 0, "gloo")
            initialize_model_parallel()
            yield
        finally:
            cleanup_dist_env_and_memory()


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
    return sum(file.stat().st_size for file in weight_files(name) or ()) or None

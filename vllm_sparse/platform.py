# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Platforms that honour ``--attention-backend sparq`` as users mean it.

vLLM's CPU platform logs "Cannot use ... backend on CPU" and takes CPU_ATTN whatever was
chosen; its CUDA platform refuses without saying what to change.
Ours answer for our backends and are vLLM's in everything else.
"""

from functools import cache

from vllm.platforms import PlatformEnum, cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from .cache.formats import FORMATS
from .compat.live import install as install_live_figures
from .compat.vllm import init_logger, require_supported
from .config import BACKEND_DEFAULTS, SparseConfig
from .plugin import chosen_in, is_ours

SLIDING = "sliding-window"


class HonourOurBackends:
    """What a platform class of vLLM's needs; goes before it in the bases."""

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kw):
        """Path of the backend class for one kind of attention layer.

        Raises:
            ValueError: when our backend was chosen and cannot serve the model.
        """
        if not is_ours(selected_backend):
            return super().get_attn_backend_cls(
                selected_backend, attn_selector_config, *args, **kw
            )
        require_supported()
        name = selected_backend.name.lower()
        if cls._enum not in (PlatformEnum.CPU, PlatformEnum.CUDA):
            raise ValueError(
                f"--attention-backend {name} serves CPUs and NVIDIA GPUs, vLLM runs "
                f"on platform {cls.__name__.removeprefix('Sparse')}; leave "
                "--attention-backend out"
            )
        kind = _kind_left_to_vllm(attn_selector_config)
        if kind == SLIDING and cls.device_type == "cuda":
            # vLLM hands a block from one kind of layer to another without clearing it
            # (KVCacheConfig.needs_kv_cache_zeroing), and FlashAttention multiplies
            # rows that it masks by zero: our codes, read as V, can be NaN.
            raise ValueError(
                f"--attention-backend {name} does not serve models with sliding-window "
                "layers on GPUs yet; leave --attention-backend out"
            )
        if kind == SLIDING:
            _refuse_quantised(name)
        if kind is not None:
            init_logger(__name__).info_once(
                "%s: %s layers are served densely by vLLM's own backend.", name, kind
            )
            return super().get_attn_backend_cls(None, attn_selector_config, *args, **kw)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=cls.get_device_capability(),
            **attn_selector_config._asdict(),
        )
        if reasons:
            raise ValueError(
                f"--attention-backend {name} cannot serve this model: "
                f"{'; '.join(reasons)}. Change what is named here, or leave "
                f"--attention-backend out. The layer: {attn_selector_config}"
            )
        return selected_backend.get_path()

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        """vLLM's own, after our options: their errors reach the user's process."""
        attention = vllm_config.attention_config
        chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
        for backend in filter(is_ours, chosen):
            require_supported()
            SparseConfig.from_additional_config(
                vllm_config.additional_config, BACKEND_DEFAULTS[backend.name]
            )
        if chosen_in(vllm_config):
            install_live_figures()
        super().check_and_update_config(vllm_config)


@cache
def honouring(platform: type) -> type:
    """``platform``, a platform class of vLLM's, with our backends honoured."""
    if issubclass(platform, HonourOurBackends):
        return platform
    return type(f"Sparse{platform.__name__}", (HonourOurBackends, platform), {})


# CpuPlatform, or vLLM's variant of it for the processor at hand.
SparseCpuPlatform = honouring(
    resolve_obj_by_qualname(cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform")
)


def _refuse_quantised(name: str) -> None:
    """Sliding-window layers take over blocks that held codes: NaN, on CPUs too."""
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None:
        return
    refuse_quantised(
        SparseConfig.from_additional_config(
            vllm_config.additional_config, BACKEND_DEFAULTS[name.upper()]
        )
    )


def refuse_quantised(config: SparseConfig) -> None:
    """Raise where sliding-window layers would lie beside quantised blocks.

    Raises:
        ValueError: says which option to leave out.
    """
    if FORMATS[config.kv_format].quantised:
        raise ValueError(
            f"sparse.kv_format = {config.kv_format!r} does not serve models with "
            "sliding-window layers: leave it out"
        )


def _kind_left_to_vllm(attn_selector_config) -> str | None:
    """Name of a layer kind that is never sparse, None where our backend serves."""
    # Imported late: the module needs current_platform, which this file is defining.
    from vllm.v1.attention.backend import AttentionType

    if attn_selector_config.attn_type != AttentionType.DECODER:
        return f"{attn_selector_config.attn_type} attention"
    if attn_selector_config.has_sliding_window:
        return SLIDING
    return None

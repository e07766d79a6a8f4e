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

from ..config import BACKEND_DEFAULTS, SparseConfig, SparseConfigError
from . import connectors, cpu_sampler, hooks
from .learned import check_checkpoint
from .registry import chosen_names, is_ours, names_for_drafts
from .speculation.configure import add_speculation, choose_classes
from .versions import init_logger, require_supported


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
        if kind is not None:
            init_logger(__name__).info_once(
                "%s: %s layers are served densely by vLLM's own backend.", name, kind
            )
            return super().get_attn_backend_cls(None, attn_selector_config, *args, **kw)
        # vLLM remembers the answer for the whole process: nothing that depends on our
        # options is asked here (see plugin/served.py).
        from .refusals import refusal

        reason = refusal(attn_selector_config, name, cls.get_device_capability())
        if reason is not None:
            raise ValueError(reason)
        return selected_backend.get_path()

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config) -> None:
        """vLLM's own, and the speculation of a lossless engine."""
        super().apply_config_platform_defaults(vllm_config)
        add_speculation(vllm_config)

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        """vLLM's own, after our options: their errors reach the user's process."""
        names = chosen_names(vllm_config)
        for name in names:
            require_supported()
            config = SparseConfig.from_additional_config(
                vllm_config.additional_config, BACKEND_DEFAULTS[name.upper()]
            )
            _check_dense_layers(config, vllm_config)
            check_checkpoint(config, vllm_config)
            if config.selector == "anchor":
                from .arena import check_anchors

                check_anchors(vllm_config)
        if names:
            _check_drafts(vllm_config)
            if cls._enum == PlatformEnum.CPU:
                cpu_sampler.check(vllm_config.speculative_config)
            connectors.configure(vllm_config)
            hooks.install()
        super().check_and_update_config(vllm_config)
        choose_classes(vllm_config)

    @classmethod
    def update_block_size_for_backend(cls, vllm_config) -> None:
        """vLLM's own; every worker calls it when the model's layers have been made."""
        if chosen_names(vllm_config):
            from .served import check_layers

            check_layers(vllm_config)
        super().update_block_size_for_backend(vllm_config)


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


def _check_dense_layers(config: SparseConfig, vllm_config) -> None:
    model_config = vllm_config.model_config
    if model_config is None or not config.dense_layers:
        return
    speculation = vllm_config.speculative_config
    if getattr(speculation, "target_model_config", model_config) is not model_config:
        return  # vLLM configures a draft model, which may have fewer layers
    layers = model_config.get_total_num_hidden_layers()
    if config.dense_layers > layers:
        raise SparseConfigError(
            f"sparse.dense_layers = {config.dense_layers} is more than the {layers} "
            "layers of this model"
        )


def _check_drafts(vllm_config) -> None:
    """Refuse a backend for drafts where nothing that drafts has attention."""
    speculation = vllm_config.speculative_config
    for name in names_for_drafts(vllm_config):
        if not (speculation.use_eagle() or speculation.uses_draft_model()):
            raise ValueError(
                f"attention_backend {name} in --speculative-config would do nothing, "
                f"as the method {speculation.method!r} has no attention: remove it"
            )


def _kind_left_to_vllm(attn_selector_config) -> str | None:
    """Name of a layer kind that is never sparse, None where our backend serves."""
    # Imported late: the module needs current_platform, which this file is defining.
    from vllm.v1.attention.backend import AttentionType

    if attn_selector_config.attn_type != AttentionType.DECODER:
        return f"{attn_selector_config.attn_type} attention"
    if attn_selector_config.has_sliding_window:
        return "sliding-window"
    return None

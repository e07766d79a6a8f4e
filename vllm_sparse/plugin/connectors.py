# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which KV connectors serve our blocks, and what they are told.

A connector that moves whole pages moves our blocks with all that is in them. What it
must not do is leave a request in the middle of a full block, see offloading.py: so the
class that vLLM makes is ours, named where vLLM lets users name one.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import asdict

from .. import __version__
from ..config import (
    BACKEND_DEFAULTS,
    DRAFT_OPTIONS,
    EVICTING,
    TOP_K,
    TOP_P,
    SparseConfig,
    SparseConfigError,
)
from .registry import chosen_names
from .speculation.configure import is_ours

OFFLOADING = "vllm_sparse.plugin.offloading"
# Connectors that are tested with our blocks -> module with our class of the same name.
SERVED = {"OffloadingConnector": OFFLOADING}
# Device types where they were run with our blocks.
DEVICES = ("cpu", "cuda")
# Where offloaded blocks lie: vLLM's ``spec_name``, and the same on CPUs.
HOST_MEMORY, FILES = "CPUOffloadingSpec", "TieringOffloadingSpec"
ON_CPUS = {HOST_MEMORY: "HostOffloadingSpec", FILES: "HostTieringSpec"}
# What of our blocks their files depend on, in ``kv_connector_extra_config``.
BLOCKS_KEY = "vllm_sparse_blocks"


def configure(vllm_config) -> None:
    """Choose the classes of a connector, if the engine has one.

    Raises:
        SparseConfigError: the engine has a connector that is not served.
    """
    name = _connector(vllm_config)
    if name is None:
        return
    found = list(_refusals(vllm_config, name))
    if found:
        raise SparseConfigError(
            f"--attention-backend {' and '.join(chosen_names(vllm_config))} cannot "
            f"serve this engine: {'; '.join(found)}"
        )
    from vllm.config import KVTransferConfig

    # Not the caller's own; vLLM completes it from --kv-offloading-size.
    transfer = copy(vllm_config.kv_transfer_config) or KVTransferConfig()
    transfer.kv_connector_extra_config = dict(transfer.kv_connector_extra_config)
    vllm_config.kv_transfer_config = transfer
    transfer.kv_connector_module_path = SERVED[name]
    if _on_cpu():
        extra = transfer.kv_connector_extra_config
        asked = extra.get("spec_name", HOST_MEMORY)
        extra["spec_name"] = ON_CPUS.get(asked, asked)
        extra["spec_module_path"] = OFFLOADING
        extra[BLOCKS_KEY] = _blocks(vllm_config)


def _blocks(vllm_config) -> str:
    """What makes blocks differ between engines of one model, dtype and parallelism.

    Blocks of a follow-up turn's prompt hold answers: what these attended to counts.
    """
    config = next(_configs(vllm_config))
    options = asdict(config)
    if config.top_k == "auto":  # the model says which, later
        options["top_k"] = f"auto: {TOP_K} or top_p {TOP_P}"
    for name in ("lossless", "kernels", *DRAFT_OPTIONS):
        del options[name]
    if config.lossless or config.selector == "dense":  # answers are dense attention's
        stored = ("kv_format", "kv_group_size", "mean_value")
        options = {name: options[name] for name in stored}
    return f"vllm_sparse {__version__} {options}"


def _configs(vllm_config) -> Iterator[SparseConfig]:
    """The options of each backend of ours that the engine has."""
    for name in chosen_names(vllm_config):
        yield SparseConfig.from_additional_config(
            vllm_config.additional_config, BACKEND_DEFAULTS[name.upper()]
        )


def _connector(vllm_config) -> str | None:
    """The connector's name; vLLM derives it from ``--kv-offloading-*`` later."""
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    if cache.kv_offloading_size is None:
        return transfer.kv_connector if transfer is not None else None
    if cache.kv_offloading_backend != "native":
        return "LMCacheMPConnector"
    from vllm import envs

    simple = envs.VLLM_USE_SIMPLE_KV_OFFLOAD
    return "SimpleCPUOffloadConnector" if simple else "OffloadingConnector"


def _refusals(vllm_config, name: str) -> Iterator[str]:
    """Why an engine so configured cannot have the connector ``name``."""
    by_size = vllm_config.cache_config.kv_offloading_size is not None
    if _device_type() not in DEVICES:
        option = "--kv-offloading-size" if by_size else "--kv-transfer-config"
        yield f"KV connectors run on {' and '.join(DEVICES)} only, remove {option}"
        return
    if by_size and name == "SimpleCPUOffloadConnector":
        yield f"{name} is not served, unset VLLM_USE_SIMPLE_KV_OFFLOAD"
    elif by_size and name not in SERVED:
        yield f"{name} is not served, use --kv-offloading-backend native"
    elif name not in SERVED:
        yield (
            f"the KV connector {name} is not served, remove --kv-transfer-config (to "
            "keep blocks in host memory: --kv-offloading-size GiB)"
        )
    if name not in SERVED:
        return
    speculation = vllm_config.speculative_config
    own = is_ours(speculation)
    if not own and getattr(speculation, "method", "ngram") not in ("ngram", "suffix"):
        yield "offloading beside drafts of a model is not served, choose one of them"
    transfer = vllm_config.kv_transfer_config
    if transfer is not None:
        if transfer.kv_connector_module_path not in (None, SERVED[name]):
            yield (
                f"{name} is served by a class of ours, remove kv_connector_module_path "
                "from --kv-transfer-config"
            )
        extra = transfer.kv_connector_extra_config
        yield from _refusals_of_spec(extra)
        if extra.get("canonical_layout"):
            yield (
                "canonical_layout takes blocks apart, remove it from "
                "kv_connector_extra_config"
            )
    if any(config.selector in EVICTING for config in _configs(vllm_config)):
        yield "blocks that are given back are not offloaded, choose one of them"
    if not vllm_config.cache_config.enable_prefix_caching:
        yield "blocks are offloaded by prefix, remove --no-enable-prefix-caching"
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        yield "offloading with pipeline parallelism is not served"


def _refusals_of_spec(extra: dict) -> Iterator[str]:
    spec, place = extra.get("spec_name", HOST_MEMORY), "kv_connector_extra_config"
    known = {HOST_MEMORY: HOST_MEMORY, FILES: FILES}
    if _on_cpu():  # after the first time, see ``configure``
        known |= {ours: vllms for vllms, ours in ON_CPUS.items()}
    if spec not in known:
        yield f"offloading with {spec} is not served, remove spec_name from {place}"
    elif known[spec] == FILES and not _on_cpu():
        yield f"{FILES} is served on CPUs only, remove spec_name from {place}"
    elif known[spec] == FILES:
        tiers = {tier.get("type") for tier in extra.get("secondary_tiers", [])}
        for tier in sorted(map(str, tiers - {"fs"})):
            yield (
                f"the offloading tier {tier} is not served, remove it from "
                f"secondary_tiers in {place} (to keep blocks in files: fs)"
            )


def _on_cpu() -> bool:
    return _device_type() == "cpu"


def _device_type() -> str:
    from vllm.platforms import current_platform

    return current_platform.device_type

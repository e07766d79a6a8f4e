# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which KV connectors serve our blocks, and what they are told.

A connector that moves whole pages moves our blocks with all that is in them. What it
must not do is leave a request in the middle of a full block, see offloading.py: so the
class that vLLM makes is ours, named where vLLM lets users name one.
"""

from collections.abc import Iterator

from .. import __version__
from ..config import BACKEND_DEFAULTS, SparseConfig, SparseConfigError
from .registry import chosen_names

OFFLOADING = "vllm_sparse.plugin.offloading"
# Connectors that are tested with our blocks -> module with our class of the same name.
SERVED = {"OffloadingConnector": OFFLOADING}
# Device types where they were run with our blocks.
DEVICES = ("cpu",)
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

    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        # vLLM completes it from --kv-offloading-size.
        transfer = vllm_config.kv_transfer_config = KVTransferConfig()
    transfer.kv_connector_module_path = SERVED[name]
    if _on_cpu():
        extra = transfer.kv_connector_extra_config
        asked = extra.get("spec_name", HOST_MEMORY)
        extra["spec_name"] = ON_CPUS.get(asked, asked)
        extra["spec_module_path"] = OFFLOADING
        extra[BLOCKS_KEY] = _blocks(vllm_config)


def _blocks(vllm_config) -> str:
    """What makes blocks differ between engines of one model, dtype and parallelism."""
    name = chosen_names(vllm_config)[0]
    config = SparseConfig.from_additional_config(
        vllm_config.additional_config, BACKEND_DEFAULTS[name.upper()]
    )
    options = config.kv_format, config.kv_group_size, config.mean_value
    return f"vllm_sparse {__version__} {options}"


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
    native = "--kv-offloading-size GiB"
    if name == "SimpleCPUOffloadConnector":
        yield f"{name} is not served, unset VLLM_USE_SIMPLE_KV_OFFLOAD and use {native}"
    elif name == "LMCacheMPConnector" and vllm_config.kv_transfer_config is None:
        yield f"{name} is not served, use --kv-offloading-backend native"
    elif name not in SERVED:
        yield (
            f"the KV connector {name} is not served, remove --kv-transfer-config (to "
            f"keep blocks in host memory: {native})"
        )
    if name not in SERVED:
        return
    if _device_type() not in DEVICES:
        yield f"{name} was run on CPUs only, remove --kv-offloading-size"
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

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Entry points: make our backend names and CPU platform known to vLLM.

vLLM calls ``register`` in every process, chosen or not, and a failure here would stop
every vLLM start in the environment: it imports no kernels and checks nothing, and what
goes wrong all the same is logged. A wrong vLLM version is refused when a backend is
chosen.
"""

import logging

from .registry import BACKENDS

PLATFORM = "vllm_sparse.plugin.platform.SparseCpuPlatform"
PLUGIN, PLATFORM_PLUGIN = "vllm_sparse", "vllm_sparse_cpu"


def register() -> None:
    """Register our attention backends (``vllm.general_plugins``); idempotent."""
    try:
        # The names come last: without a platform that honours them they would be
        # ignored, and an unknown name is an error.
        _cover_platform()
        _register_names()
    except Exception:
        logging.getLogger("vllm.vllm_sparse").exception(
            "vllm_sparse could not register its attention backends (%s), for the "
            "reason below. vLLM works without them. To use them, install "
            "vllm_sparse anew beside the vLLM that it supports; to be rid of this "
            "message, uninstall it.",
            ", ".join(BACKENDS).lower(),
        )


def _register_names() -> None:
    from vllm.v1.attention.backends.registry import (
        AttentionBackendEnum,
        register_backend,
    )

    for name, path in BACKENDS.items():
        if name not in AttentionBackendEnum.__members__:
            register_backend(name, path)
            member = AttentionBackendEnum[name]
            # Spawned processes unpickle vLLM's config before plugins load there, and an
            # unknown enum value cannot be unpickled: let our function restore it.
            member.__reduce_ex__ = lambda protocol, name=name: (restore, (name,))


def restore(name: str):
    """Return the enum member ``name``, registering it first in a fresh process."""
    register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from .hooks import install

    # This process was sent the configuration of an engine of ours.
    install()
    return AttentionBackendEnum[name]


def activate_cpu_platform() -> str | None:
    """Entry point of ``vllm.platform_plugins``: our platform's path on CPU builds.

    None where another platform plugin is installed: vLLM starts with one at most, and
    ``register`` covers the platform that it takes. On all of them it makes our names
    known: ``LLM(attention_config={"backend_per_kind": ...})`` reads them before
    ``register`` is called.
    """
    import vllm.envs as envs
    from vllm.platforms import cpu_platform_plugin

    path = None
    if cpu_platform_plugin() is not None and not _other_platform_plugins():
        # What this raises, vLLM survives here, but not when it imports the path.
        from . import platform  # noqa: F401

        path = PLATFORM
    # Without ``register`` no other platform would honour them.
    if envs.VLLM_PLUGINS is None or PLUGIN in envs.VLLM_PLUGINS:
        _register_names()
    return path


def _other_platform_plugins() -> list[str]:
    """Names of the platform plugins that vLLM asks beside ours."""
    from importlib.metadata import entry_points

    import vllm.envs as envs

    names = {plugin.name for plugin in entry_points(group="vllm.platform_plugins")}
    allowed = names if envs.VLLM_PLUGINS is None else envs.VLLM_PLUGINS
    return sorted(names & set(allowed) - {PLATFORM_PLUGIN})


def _cover_platform() -> None:
    """Honour our names also where vLLM took another platform than ours.

    That is on GPUs, beside other platform plugins, and where ``VLLM_TARGET_DEVICE=cpu``
    pins vLLM's own CPU platform, which ignores the chosen backend without an error.
    """
    from vllm.platforms import current_platform

    from .platform import honouring

    # Other modules hold this very object, so it changes class in place.
    current_platform.__class__ = honouring(type(current_platform))

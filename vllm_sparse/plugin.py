# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Entry points: make our backend names and CPU platform known to vLLM.

vLLM calls ``register`` in every process, chosen or not, and a failure here would stop
every vLLM start in the environment: it imports no kernels and checks nothing. A wrong
vLLM version is refused when a backend is chosen.
"""

# Name on the command line (any case) -> class.
BACKENDS = {
    "SPARQ": "vllm_sparse.attention.backend.SparqBackend",
    "TWILIGHT": "vllm_sparse.attention.backend.TwilightBackend",
}
PLATFORM = "vllm_sparse.platform.SparseCpuPlatform"


def register() -> None:
    """Register our attention backends (``vllm.general_plugins``); idempotent."""
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

    _cover_platform()


def restore(name: str):
    """Return the enum member ``name``, registering it first in a fresh process."""
    register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from .compat.live import install

    # This process was sent the configuration of an engine of ours.
    install()
    return AttentionBackendEnum[name]


def is_ours(backend) -> bool:
    """Whether ``backend`` (an enum member or None) is one of this package's."""
    return getattr(backend, "name", None) in BACKENDS


def chosen_in(vllm_config) -> bool:
    """Whether an engine so configured has one of our backends in any layer."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
    return any(map(is_ours, chosen))


def activate_cpu_platform() -> str | None:
    """Entry point of ``vllm.platform_plugins``: our platform's path on CPU builds."""
    from vllm.platforms import cpu_platform_plugin

    return PLATFORM if cpu_platform_plugin() is not None else None


def _cover_platform() -> None:
    """Honour our names also where vLLM consults no platform plugin of ours.

    That is on CUDA, and where ``VLLM_TARGET_DEVICE=cpu`` pins vLLM's own CPU platform,
    which ignores the chosen backend without an error.
    """
    import vllm.envs as envs
    from vllm.platforms import current_platform

    if envs.VLLM_TARGET_DEVICE == "cpu" or current_platform.is_cuda():
        from .platform import honouring

        # Other modules hold this very object, so it changes class in place.
        current_platform.__class__ = honouring(type(current_platform))

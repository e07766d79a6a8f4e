# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The backends' names, and whether a configuration has one. Imports nothing."""

# Name on the command line (any case) -> class.
BACKENDS = {
    "SPARQ": "vllm_sparse.plugin.backend.SparqBackend",
    "TWILIGHT": "vllm_sparse.plugin.backend.TwilightBackend",
}


def is_ours(backend) -> bool:
    """Whether ``backend`` (an enum member or None) is one of this package's."""
    return getattr(backend, "name", None) in BACKENDS


def chosen_in(vllm_config) -> bool:
    """Whether an engine so configured has one of our backends in any layer."""
    return bool(chosen_names(vllm_config))


def chosen_names(vllm_config) -> list[str]:
    """Our backends that an engine so configured has, as users write them."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
    return sorted({backend.name.lower() for backend in chosen if is_ours(backend)})

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The backends' names, and whether a configuration has one. Imports nothing."""

# Name on the command line (any case) -> class.
BACKENDS = {
    "SPARQ": "vllm_sparse.plugin.backend.SparqBackend",
    "TWILIGHT": "vllm_sparse.plugin.backend.TwilightBackend",
    "ANCHOR": "vllm_sparse.plugin.backend.AnchorBackend",
    "LESS": "vllm_sparse.plugin.backend.LessBackend",
    "STREAMING": "vllm_sparse.plugin.backend.StreamingBackend",
}


def is_ours(backend) -> bool:
    """Whether ``backend`` (an enum member or None) is one of this package's."""
    return getattr(backend, "name", None) in BACKENDS


def chosen_in(vllm_config) -> bool:
    """Whether an engine so configured has one of our backends in any layer."""
    return bool(chosen_names(vllm_config))


def chosen_names(vllm_config) -> list[str]:
    """Our backends that an engine so configured has, as users write them."""
    return sorted({*names_for_target(vllm_config), *names_for_drafts(vllm_config)})


def names_for_target(vllm_config) -> list[str]:
    """The same of the model that answers."""
    attention = vllm_config.attention_config
    return _names([attention.backend, *(attention.backend_per_kind or {}).values()])


def names_for_drafts(vllm_config) -> list[str]:
    """The same of its draft model, as its own options say: vLLM's V2 runner gives it
    the target's backend where they say nothing, the V1 runner one of vLLM's choice."""
    return _names([_of_drafts(vllm_config)])


def _of_drafts(vllm_config):
    speculation = getattr(vllm_config, "speculative_config", None)
    return getattr(speculation, "attention_backend", None)


def _names(backends) -> list[str]:
    return sorted({backend.name.lower() for backend in backends if is_ours(backend)})

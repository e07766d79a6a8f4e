# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What stands around an attention layer in the model: whether it norms Q and K.

vLLM tells an attention layer nothing of the module that holds it, where the norms of
queries and keys are. torch tells of every module that is put into another, so layers
of ours get to know theirs, whatever the model and however it was made.
"""

import re
import weakref

import torch
from torch.nn.modules.module import register_module_module_registration_hook

# As vLLM's models name the norm of queries, or of queries and keys.
_NORM = re.compile(r"(q|query|qk)_?(layer_?)?norm")
_handles: list = []


def remember_holders() -> None:
    """From now on in this process, what holds a layer of ours is known. Idempotent."""
    if not _handles:
        _handles.append(register_module_module_registration_hook(_remember))


def _remember(holder: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    impl = getattr(module, "impl", None)
    if impl is not None and hasattr(impl, "holder"):
        impl.holder = weakref.ref(holder)


def norms_queries(impl) -> bool:
    """Whether queries and keys are normed before they reach the layer (QK-norm)."""
    holder = impl.holder and impl.holder()
    if holder is None:
        return False
    return any(
        _NORM.fullmatch(name) and not isinstance(child, torch.nn.Identity)
        for name, child in holder.named_children()
    )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What chooses tokens; the classes by their names in ``selectors.py``."""

from pkgutil import resolve_name

from ..selectors import SELECTORS
from .base import DecodeRows, LayerShape, Method, Phase

METHODS: dict[str, type[Method]] = {
    name: resolve_name(path) for name, path in SELECTORS.items()
}

__all__ = ["METHODS", "DecodeRows", "LayerShape", "Method", "Phase"]

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The selectors by name. A new one is a file, a line here and a line in config.py."""

from .base import DecodeRows, LayerShape, Selector
from .compare.exact import ExactSelector
from .compare.quest import QuestSelector
from .compare.window import WindowSelector
from .sparq import SparqSelector

SELECTORS: dict[str, type[Selector]] = {
    cls.name: cls
    for cls in (SparqSelector, ExactSelector, QuestSelector, WindowSelector)
}

__all__ = ["SELECTORS", "DecodeRows", "LayerShape", "Selector"]

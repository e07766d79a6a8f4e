# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The methods by name. A new one is a file, a line here and a line in config.py."""

from .base import DecodeRows, LayerShape, Method, Phase
from .compare.exact import Exact
from .compare.quest import Quest
from .compare.window import Window
from .dense import Dense
from .sparq import Sparq

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (Sparq, Exact, Quest, Window, Dense)
}

__all__ = ["METHODS", "DecodeRows", "LayerShape", "Method", "Phase"]

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What a model that was trained with anchors says of itself: ``anchors.json``, beside
its ``config.json``. A model without it would answer nonsense, and is refused."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cache.layout import BLOCK_SIZE
from .cache.lines import LINE_GROUP, NEAR_BLOCKS

FILE = "anchors.json"
FORMAT = 2
# Of the rules, which a model is trained for.
FIXED = {
    "format": FORMAT,
    "block_size": BLOCK_SIZE,
    "line_group": LINE_GROUP,
    "near_blocks": NEAR_BLOCKS,
}


@dataclass(frozen=True)
class AnchorConfig:
    """How a model attends (cache/lines.py).

    Attributes:
        line_ends: ids of the tokens that end a line.
        anchors_look_back: whether anchors see older anchors.
        lower_layers: layers that attend to the anchors of a lower layer's cache, too,
            in one softmax with their own (layer-wise anchors), by number, and those
            lower layers.
        recipe: how it was trained, for readers.
    """

    line_ends: tuple[int, ...]
    anchors_look_back: bool = True
    lower_layers: Mapping[int, int] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, lower in self.lower_layers.items():
            if not 0 <= lower < layer:
                raise ValueError(
                    f"layer {layer} cannot attend to anchors of layer {lower}: it must "
                    "be a lower one"
                )

    def to_json(self) -> dict[str, Any]:
        return FIXED | asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "AnchorConfig":
        """
        Raises:
            ValueError: it is of another format, or was trained with other rules.
        """
        for name, value in FIXED.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{FILE} has {name} {found.get(name)}, this version serves "
                    f"{value}: train the model anew, or use the version that wrote it"
                )
        lower = {int(a): int(b) for a, b in found["lower_layers"].items()}
        return cls(
            line_ends=tuple(found["line_ends"]),
            anchors_look_back=found["anchors_look_back"],
            lower_layers=lower,
            recipe=found["recipe"],
        )

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(self.to_json(), indent=1) + "\n")

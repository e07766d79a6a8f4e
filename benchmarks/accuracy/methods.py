# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Methods and budgets: which options give a method a target share of the KV bytes."""

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vllm_sparse.config import SparseConfig
from vllm_sparse.methods import METHODS, LayerShape
from vllm_sparse.ops import Ops
from vllm_sparse.selectors import SELECTORS


@dataclass(frozen=True)
class ModelShape:
    """What the byte arithmetic needs of the model."""

    head_size: int
    num_layers: int
    # Bytes of one K or V element.
    itemsize: int = 2

    @property
    def row_bytes(self) -> int:
        """K and V of one token and KV head."""
        return 2 * self.head_size * self.itemsize


@dataclass(frozen=True)
class Method:
    """A selector with fixed options, e.g. ``sparq:rank=32``."""

    selector: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return ":".join(
            [self.selector, *(f"{k}={v}" for k, v in sorted(self.options.items()))]
        )

    @property
    def takes_budget(self) -> bool:
        fixed = {"top_k", "top_p"} & self.options.keys()
        return self.selector != "dense" and not fixed


def parse_method(text: str) -> Method:
    """``selector[:option=value]...``; options as in ``vllm_sparse.config``.

    A method with its own ``top_k`` or ``top_p`` runs once, whatever the budgets.

    Raises:
        ValueError: unknown selector, or not ``option=value``.
    """
    selector, *pairs = re.split(r"[:,]", text)
    if selector not in SELECTORS:
        names = ", ".join(SELECTORS)
        raise ValueError(f"unknown method {selector!r}; one of {names}")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} in method {text!r} must be option=value")
        options[key] = _parse_value(value)
    return Method(selector, options)


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def estimate_bytes(method: Method, shape: ModelShape, context: int) -> float:
    """Bytes per KV head read to *choose* among ``context`` tokens."""
    if method.selector == "dense":
        return 0.0
    dtype = torch.float32 if shape.itemsize == 4 else torch.bfloat16
    layer = LayerShape(2, 1, shape.head_size, dtype, 1.0)
    options = {**method.options, "selector": method.selector}
    config = SparseConfig(**options).resolve(shape.head_size, layer.num_queries_per_kv)
    cost = METHODS[method.selector](config, layer, Ops()).score_bytes
    read = cost.of_row(context)
    # Decoding opens a page of Quest's at once.
    return read + (shape.row_bytes if method.selector == "quest" else 0)


def options_for(
    method: Method, budget: float | None, context: int, shape: ModelShape
) -> dict[str, Any] | None:
    """Options for ``reconfigure_sparse``: all of them, so that nothing stays behind.

    ``top_k`` is the largest count whose total bytes, estimate included, stay within
    ``budget`` (share of dense KV bytes over all layers) at ``context`` tokens. It
    includes sinks, local window and the unsealed tail; a tail of up to 127 tokens
    may still exceed a small top_k, so the measured share is the one to report.
    None: not even sinks and window fit.
    """
    # A budget is kept at every length, also where the device's default is dense.
    options = asdict(SparseConfig(dense_below=0)) | method.options
    options["selector"] = method.selector
    if not method.takes_budget:
        return options
    dense_layers = min(options["dense_layers"], shape.num_layers)
    sparse_layers = shape.num_layers - dense_layers
    if budget is None or not sparse_layers:
        raise ValueError(f"{method.label} needs a budget and a sparse layer")
    share = (budget * shape.num_layers - dense_layers) / sparse_layers
    estimate = estimate_bytes(method, shape, context)
    top_k = int(share * context - estimate / shape.row_bytes)
    if top_k < options["sink_tokens"] + options["local_window"]:
        return None
    return options | {"top_k": top_k}

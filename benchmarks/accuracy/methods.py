# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Methods and budgets: which options give a method a target share of the KV bytes."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_sparse.config import SparseConfig, default_rank

SELECTORS = ("dense", "sparq", "exact", "quest", "window")
BLOCK_TOKENS = 128
QUEST_PAGE_TOKENS = 16


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
        return self.selector != "dense" and "top_k" not in self.options


def parse_method(text: str) -> Method:
    """``selector[:option=value]...``; options as in ``vllm_sparse.config``.

    A method with its own ``top_k`` runs once, whatever the budgets.

    Raises:
        ValueError: unknown selector, or not ``option=value``.
    """
    selector, *pairs = re.split(r"[:,]", text)
    if selector not in SELECTORS:
        raise ValueError(f"unknown method {selector!r}; one of {', '.join(SELECTORS)}")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} in method {text!r} must be option=value")
        options[key] = _parse_value(value)
    return Method(selector, options)


def _parse_value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def estimate_bytes(method: Method, shape: ModelShape, context: int) -> float:
    """Bytes per KV head read to *choose* among ``context`` tokens.

    sparq: rank channels of 4-bit codes, and their scale and minimum (2 x 16 bit), of
    every full 128-token block. quest: a minimum and a maximum per channel and page.
    exact: nothing is charged although it reads every key: an oracle, no method.
    """
    if method.selector == "sparq":
        rank = method.options.get("rank") or default_rank(shape.head_size)
        return context // BLOCK_TOKENS * (BLOCK_TOKENS * rank / 2 + 4 * rank)
    if method.selector == "quest":
        # Decoding opens a page at once, hence one more than fills the context.
        return (context // QUEST_PAGE_TOKENS + 1) * shape.row_bytes
    return 0.0


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

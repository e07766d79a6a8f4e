# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What each option may be (config.py), in words and as a check; where it belongs."""

import json
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from .cache.formats import FORMATS
from .selectors import SELECTORS

DRAFT_SAMPLE_METHODS = ("probabilistic", "greedy")
PREFILLS = ("exact", "streaming")
DRAFT_WEIGHTS = ("target", "fp8")
KERNEL_NAMES = ("auto", "cuda", "triton", "cpu")
# More than any context has: budgets are tables of 32-bit integers.
MOST_TOKENS = 2**24
MOST_LAYERS = 4096


def _is_int(value: Any, low: int, most: int = MOST_TOKENS) -> bool:
    return (
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= most
    )


def _is_top_k(value: Any) -> bool:
    return _is_int(value, 1) or (isinstance(value, float) and 0.0 < value <= 1.0)


def _is_top_p(value: Any) -> bool:
    return value is None or (isinstance(value, float) and 0.0 < value < 1.0)


_TOKENS = f"from 0 to {MOST_TOKENS}"
_COUNT_OR_SHARE = (
    f"an integer from 1 to {MOST_TOKENS} (tokens) or a fraction of the context in (0, "
    "1]"
)
# option -> (check, what is allowed, an example)
RULES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "selector": (
        lambda v: isinstance(v, str) and v in SELECTORS,
        f"one of {', '.join(SELECTORS)}",
        "sparq",
    ),
    "rank": (
        lambda v: v is None or _is_int(v, 1),
        "an integer from 1 to the head size",
        "16",
    ),
    "top_k": (
        lambda v: _is_top_k(v) or v == "auto",
        f'{_COUNT_OR_SHARE}, or "auto"',
        "0.125",
    ),
    "top_p": (_is_top_p, "a share of the attention mass in (0, 1)", "0.95"),
    "min_tokens": (lambda v: _is_int(v, 0), f"an integer {_TOKENS}", "128"),
    "max_tokens": (
        _is_top_k,
        _COUNT_OR_SHARE,
        "0.25",
    ),
    "local_window": (
        lambda v: _is_int(v, 1),
        f"an integer from 1 to {MOST_TOKENS}",
        "32",
    ),
    "sink_tokens": (lambda v: _is_int(v, 0), f"an integer {_TOKENS}", "4"),
    "prefill": (
        lambda v: v in PREFILLS,
        f"one of {', '.join(PREFILLS)}",
        "exact",
    ),
    "checkpoint": (
        lambda v: v is None or (isinstance(v, str) and bool(v)),
        "a folder",
        "FOLDER",
    ),
    "dense_layers": (
        lambda v: _is_int(v, 0, MOST_LAYERS),
        f"an integer from 0 to {MOST_LAYERS}",
        "2",
    ),
    "dense_below": (
        lambda v: _is_int(v, 0, 2**31 - 1) or v == "auto",
        f'an integer from 0 to {2**31 - 1}, or "auto"',
        "512",
    ),
    "mean_value": (
        lambda v: isinstance(v, bool) or v == "auto",
        'true, false or "auto"',
        "auto",
    ),
    "kv_format": (
        lambda v: isinstance(v, str) and v in FORMATS,
        f"one of {', '.join(FORMATS)}",
        "int4",
    ),
    "kv_group_size": (
        lambda v: v is None or _is_int(v, 1),
        "a number of channels, such as 16, 32 or 64",
        "32",
    ),
    "lossless": (lambda v: isinstance(v, bool), "true or false", "true"),
    "draft_tokens": (lambda v: _is_int(v, 1, 16), "an integer from 1 to 16", "4"),
    "draft_adapt": (lambda v: isinstance(v, bool), "true or false", "false"),
    "draft_above": (
        lambda v: _is_int(v, 0) or v == "auto",
        f'an integer {_TOKENS}, or "auto"',
        "8192",
    ),
    "draft_sample_method": (
        lambda v: v in DRAFT_SAMPLE_METHODS,
        f"one of {', '.join(DRAFT_SAMPLE_METHODS)}",
        "greedy",
    ),
    "draft_weights": (
        lambda v: v in DRAFT_WEIGHTS,
        f"one of {', '.join(DRAFT_WEIGHTS)}",
        "fp8",
    ),
    "kernels": (
        lambda v: v in KERNEL_NAMES,
        f"one of {', '.join(KERNEL_NAMES)}",
        "auto",
    ),
}


def misplaced(
    additional_config: Mapping,
    known: list[str],
    backends: Iterable[str],
    namespace: str,
) -> str | None:
    """What is wrong with a key beside our namespace that can only have been meant for
    it; None where there is none.

    Keys of other plugins are theirs.

    Args:
        known: our options.
    """
    names = [namespace, "vllm_sparse", "sparse_attention"]
    names += [name.lower() for name in backends]
    for key, value in additional_config.items():
        first, _, option = str(key).partition(".")
        options = value if isinstance(value, Mapping) else {option or key: value}
        near = get_close_matches(first.lower().replace("-", "_"), names, 1, cutoff=0.9)
        ours = bool(options) and set(options) <= {*known, namespace}
        if key == namespace or not (near or ours):
            continue
        meant = json.dumps({namespace: options.get(namespace, options)}, default=str)
        return (
            f"additional_config has {key!r} beside {namespace!r}, where nobody reads "
            f"it; options lie under {namespace!r}: --additional-config '{meant}'"
        )
    return None

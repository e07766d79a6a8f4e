# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Result files of the benchmarks that save as they go."""

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.accuracy.environment import describe


def save(
    args: argparse.Namespace,
    results: list[dict[str, Any]],
    hidden: Collection[str] = ("output",),
) -> None:
    """Write ``--output``, if there is one: versions, machine, options and results.

    Of folders, only the names are told.

    Args:
        hidden: options that say nothing of the result.
    """
    if args.output is None:
        return
    options = {
        k: v.name if isinstance(v, Path) else str(v)
        for k, v in vars(args).items()
        if k not in hidden
    }
    header = describe() | {"options": options}
    text = json.dumps({"header": header, "results": results}, indent=1)
    args.output.write_text(text + "\n")

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``python -m vllm_sparse.train COMMAND``; each command has a ``--help``."""

import argparse
import sys
from importlib import import_module

# Command: its module, which has main(arguments).
COMMANDS = {
    "data": "build",
    "longcontext": "longcontext",
    "merge": "merge",
    "less": "less",
    "anchor": "anchor",
    "anchor-eval": "anchor_eval",
    "pretrain": "pretrain",
}


def main() -> None:
    """Run one command.

    Raises:
        SystemExit: with its message, if something asked for is impossible.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vllm_sparse.train", description=__doc__
    )
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(sys.argv[1:2]).command
    module = import_module(f"vllm_sparse.train.{COMMANDS[command]}")
    try:
        module.main(sys.argv[2:])
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise SystemExit(f"{parser.prog} {command}: {error}") from error


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``vllm-sparse serve|doctor|calibrate ...``; each command has a ``--help``."""

import argparse
import sys
from importlib import import_module

COMMANDS = {"serve": "serve", "doctor": "doctor.cli", "calibrate": "calibrate.cli"}


def main() -> None:
    """``vllm-sparse``; the same as ``python -m vllm_sparse``."""
    parser = argparse.ArgumentParser(prog="vllm-sparse", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(sys.argv[1:2]).command
    sys.exit(import_module(f"vllm_sparse.tools.{COMMANDS[command]}").main(sys.argv[2:]))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``python -m vllm_sparse doctor|calibrate ...``; each command has a ``--help``."""

import argparse
import sys
from importlib import import_module

COMMANDS = ("doctor", "calibrate")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vllm_sparse", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(sys.argv[1:2]).command
    sys.exit(import_module(f"vllm_sparse.tools.{command}.cli").main(sys.argv[2:]))


if __name__ == "__main__":
    main()

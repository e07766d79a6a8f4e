# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``python -m vllm_sparse doctor``."""

import argparse
import sys

from .doctor.cli import add_arguments, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vllm_sparse")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor", help="what this machine and a model get from sparse attention"
    )
    add_arguments(doctor)
    sys.exit(run(parser.parse_args()))


if __name__ == "__main__":
    main()

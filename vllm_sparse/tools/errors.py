# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What an error says to a user."""

from pydantic import ValidationError


def reason(error: Exception) -> str:
    """Its message, without what vLLM's configuration puts around it."""
    if not isinstance(error, ValidationError):
        return str(error)
    problems = (found["msg"].removeprefix("Value error, ") for found in error.errors())
    return "\n".join(problems)

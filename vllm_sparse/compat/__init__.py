# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What is changed in vLLM's own classes, where one of our backends is chosen."""


def install() -> None:
    """Make all changes in this process. Idempotent."""
    from . import live, prompts, zeroing

    for change in (live, prompts, zeroing):
        change.install()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What is changed in vLLM's own classes, where one of our backends is chosen."""


def install() -> None:
    """Make all changes in this process. Idempotent.

    Raises:
        RuntimeError: vLLM has moved what a change needs; without it answers could be
            wrong.
    """
    from . import cpu_sampler, drafters, live, prompts, token_ids, zeroing
    from .speculation import parameters

    changes = (live, prompts, token_ids, zeroing, cpu_sampler, parameters, drafters)
    for change in changes:
        try:
            change.install()
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"{change.__name__} does not fit this vLLM: {error}. Choose another "
                "attention backend, or a vLLM that is supported"
            ) from error

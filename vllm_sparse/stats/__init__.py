# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Live figures: on /metrics, in the log, and from a running ``LLM``."""

from .figures import Figures


def live_figures(llm) -> Figures:
    """What sparse attention did since the engine started or its counts were reset.

    Waits for the device. It works between calls of ``generate``, whether the engine
    runs in this process or in others, and with log statistics off.

    Args:
        llm: a ``vllm.LLM`` with ``attention_backend`` sparq or twilight.

    Raises:
        ValueError: when the engine has another backend.
        RuntimeError: when the engine could not be asked.
    """
    from ..plugin.channel import ask
    from ..plugin.registry import chosen_in

    if not chosen_in(llm.llm_engine.vllm_config):
        raise ValueError(
            "this engine has no live figures of sparse attention: choose "
            "attention_backend='sparq' or 'twilight'"
        )
    return Figures.of_counts(ask(llm))

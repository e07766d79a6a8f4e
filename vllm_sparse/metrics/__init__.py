# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Live figures: on /metrics, in the log, and from a running ``LLM``."""

from .figures import Figures, add_up


def live_figures(llm) -> Figures:
    """What sparse attention did since the engine started or its counts were reset
    (``llm.collective_rpc("reset_sparse_stats")``).

    Waits for the device. It works between calls of ``generate``, whether the engine
    runs in this process or in others, and with log statistics off.

    Args:
        llm: a ``vllm.LLM`` with ``attention_backend`` sparq or twilight.

    Raises:
        ValueError: when the engine has another backend, or a
            ``worker_extension_cls`` that does not derive from
            :class:`vllm_sparse.attention.stats.WorkerExtension`.
    """
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from ..attention.stats import WorkerExtension
    from ..plugin import chosen_in

    config = llm.llm_engine.vllm_config
    if not chosen_in(config):
        raise ValueError(
            "this engine has no live figures of sparse attention: choose "
            "attention_backend='sparq' or 'twilight'"
        )
    name = config.parallel_config.worker_extension_cls
    if not issubclass(resolve_obj_by_qualname(name), WorkerExtension):
        raise ValueError(
            f"worker_extension_cls={name!r} must derive from "
            "vllm_sparse.attention.stats.WorkerExtension to have live figures"
        )
    return Figures.of_counts(add_up(llm.collective_rpc("sparse_figures")))

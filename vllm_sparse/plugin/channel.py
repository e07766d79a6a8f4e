# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What carries the live figures' counts through vLLM (live.py puts them there).

``SchedulerStats.num_kv_fetch_reqs_by_stage`` carries the counts: a dict[str, int] that
is msgpack'd with the rest; vLLM reads its own three keys, and asks whether there are
any at all.

``live_figures`` asks the engine core by a utility call, as vLLM's own methods of
``LLM`` do: ``call_utility`` of the client, or ``engine_core`` of one in this process.
"""

from collections.abc import Mapping

PREFIX = "vllm_sparse:"


def put(scheduler_stats, counts: Mapping[str, int]) -> None:
    """Let ``SchedulerStats`` carry ``counts`` to the front end."""
    carrier = scheduler_stats.num_kv_fetch_reqs_by_stage
    carrier.update({PREFIX + name: count for name, count in counts.items()})


def take(scheduler_stats) -> dict[str, int]:
    """What :func:`put` put there; it is gone then."""
    carrier = scheduler_stats.num_kv_fetch_reqs_by_stage
    names = [name for name in carrier if name.startswith(PREFIX)]
    return {name.removeprefix(PREFIX): carrier.pop(name) for name in names}


def ask(llm) -> dict[str, int]:
    """An ``LLM``'s counts: of its engine core, wherever that is.

    Raises:
        RuntimeError: when it has none.
    """
    client = llm.llm_engine.engine_core
    try:
        if hasattr(client, "engine_core"):
            return client.engine_core.sparse_figures()
        return client.call_utility("sparse_figures")
    except Exception as error:
        text = f"no live figures, the engine's log may say more: {error}"
        raise RuntimeError(text) from error

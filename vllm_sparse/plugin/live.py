# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The live figures' way through vLLM, all that is relied on in one place.

A worker's counts reach the engine core by ``collective_rpc`` of its executor (in the
process, over shared memory, or by Ray), and the front end in the statistics that the
engine core sends anyway. vLLM has two seams where that could enter without a patch,
and neither serves: its entry points for statistics loggers turn statistics on for
everybody who has the package installed, and a KV connector changes how vLLM schedules
and captures graphs. So two constructors are wrapped:

- ``EngineCore.__init__``: afterwards ``scheduler.make_stats``, which the engine core
  calls with arguments once after every step, goes through our reporter, which reads
  ``model_executor`` and its ``is_sleeping``, ``batch_queue``, ``log_stats`` and
  ``scheduler.has_unfinished_requests``.
- ``StatLoggerManager.__init__``: afterwards our logger is the first of its
  ``stat_loggers``, with the label values and metric classes of the
  ``PrometheusStatLogger`` there (Ray Serve has its own).

What carries the counts is in channel.py.

To go when vLLM lets attention backends add to its statistics.
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import wraps

from .registry import chosen_in, names_for_target
from .versions import init_logger

logger = init_logger(__name__)
NONE = "No live figures of sparse attention (all else works)."


def install() -> None:
    """Wrap both constructors, in a process whose engine has a backend of ours.

    Idempotent. Engines with other backends in the same process stay as they are.
    """
    try:
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.metrics.loggers import StatLoggerManager
    except ImportError:
        logger.exception(NONE)
        return
    _after_init(EngineCore, _report_from)
    _after_init(StatLoggerManager, _log_in)


def _after_init(cls: type, then: Callable) -> None:
    """Call ``then(self, vllm_config)`` at the end of every construction."""
    original = cls.__init__
    if getattr(original, "vllm_sparse", None) is not None:
        return

    @wraps(original)
    def __init__(self, vllm_config, *args, **kwargs):
        original(self, vllm_config, *args, **kwargs)
        if not chosen_in(vllm_config):
            return
        try:
            then(self, vllm_config)
        except Exception:
            logger.exception(NONE)

    __init__.vllm_sparse = then
    cls.__init__ = __init__


def _report_from(engine_core, vllm_config) -> None:
    from ..stats.reporter import Reporter
    from .held import HeldBlocks
    from .speculation.configure import options

    scheduler = engine_core.scheduler
    parallel = vllm_config.parallel_config
    executor = engine_core.model_executor
    collective_rpc = executor.collective_rpc
    if type(executor).__name__ == "RayDistributedExecutor":
        collective_rpc = _waiting(collective_rpc)
    reporter = Reporter(
        drafting=scheduler if options(vllm_config) is not None else None,
        held=HeldBlocks.of(scheduler, parallel.tensor_parallel_size),
        make_stats=scheduler.make_stats,
        collective_rpc=collective_rpc,
        is_idle=lambda: (
            not (scheduler.has_unfinished_requests() or engine_core.batch_queue)
        ),
        is_asleep=lambda: executor.is_sleeping,
        log_stats=engine_core.log_stats,
        engine_index=parallel.data_parallel_index,
    )
    reporter.start()
    scheduler.make_stats = reporter.make_stats
    engine_core.sparse_figures = reporter.figures


def _waiting(collective_rpc: Callable) -> Callable:
    """For vLLM's older Ray executor, whose futures take all answers for a model's
    output and fail: the answer is waited for, a few milliseconds per report."""

    def rpc(*args, non_block: bool = False, **kwargs):
        replies = collective_rpc(*args, **kwargs)
        if not non_block:
            return replies
        future: Future = Future()
        future.set_result(replies)
        return future

    return rpc


def _log_in(manager, vllm_config) -> None:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    from ..config import BACKEND_DEFAULTS, EVICTING, SparseConfig
    from ..stats.prometheus import SparseStatLogger
    from .speculation.configure import options

    lossless = options(vllm_config) is not None
    configs = (
        SparseConfig.from_additional_config(
            vllm_config.additional_config, BACKEND_DEFAULTS[name.upper()]
        )
        for name in names_for_target(vllm_config)
    )
    evicting = any(config.selector in EVICTING for config in configs)
    for other in manager.stat_loggers:
        if isinstance(other, PrometheusStatLogger):
            ours = SparseStatLogger(
                vllm_config,
                manager.engine_indexes,
                beside=other,
                lossless=lossless,
                evicting=evicting,
            )
            manager.stat_loggers.insert(0, ours)
            return
    logger.warning("No live figures on /metrics: vLLM has no Prometheus logger here.")

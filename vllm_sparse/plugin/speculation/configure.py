# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What lossless self-speculation asks of vLLM's configuration.

vLLM's list of speculative methods is closed, so the engine is configured for a draft
model that is the target itself: look-ahead slots, asynchronous scheduling, rejection
sampling and vLLM's metrics come with that. Our worker puts a drafter of ours in the
place of the one that vLLM makes (worker.py). vLLM copies and checks its configuration
several times, so all here may be called again.
"""

from ...config import BACKEND_DEFAULTS, SparseConfig, SparseConfigError
from ...methods.drafting import numbers_of_drafts
from ..registry import chosen_names
from .refusals import refusals

# vLLM's workers, and ours.
WORKERS = {
    "vllm.v1.worker.gpu_worker.Worker": "vllm_sparse.plugin.speculation.worker.Worker",
    "vllm.v1.worker.cpu_worker.CPUWorker": (
        "vllm_sparse.plugin.speculation.worker.Worker"
    ),
}
# vLLM's schedulers, and ours that decide how many tokens are drafted.
SCHEDULER = "vllm_sparse.plugin.speculation.scheduler"


def options(vllm_config) -> SparseConfig | None:
    """The options of a lossless engine; None where it is not one."""
    for name in chosen_names(vllm_config):
        config = SparseConfig.from_additional_config(
            vllm_config.additional_config, BACKEND_DEFAULTS[name.upper()]
        )
        if config.lossless:
            return config
    return None


def is_ours(speculative_config) -> bool:
    """Whether :func:`add_speculation` made it."""
    return getattr(speculative_config, "vllm_sparse_lossless", False)


def add_speculation(vllm_config) -> None:
    """Give a lossless engine its ``speculative_config``.

    Raises:
        SparseConfigError: when the engine has what lossless speculation cannot be with.
    """
    config = options(vllm_config)
    if config is None or vllm_config.model_config is None:
        return
    if is_ours(vllm_config.speculative_config):
        return
    found = list(refusals(vllm_config, config))
    if found:
        raise SparseConfigError(
            f"sparse.lossless cannot serve this engine: {'; '.join(found)}. Or leave "
            "sparse.lossless and the options of drafts out"
        )
    from vllm.config import SpeculativeConfig

    target, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculation = SpeculativeConfig(
        method="draft_model",
        model=target.model,
        num_speculative_tokens=config.draft_tokens,
        draft_sample_method=config.draft_sample_method,
        target_model_config=target,
        target_parallel_config=parallel,
        num_speculative_tokens_per_batch_size=_numbers(
            config, vllm_config.scheduler_config.max_num_seqs
        ),
    )
    # Not another of the same name: overrides of the target's hold for drafts, too.
    speculation.draft_model_config = target
    speculation.draft_parallel_config = parallel
    speculation.vllm_sparse_lossless = True
    vllm_config.speculative_config = speculation


def _numbers(config: SparseConfig, max_num_seqs: int) -> list[tuple[int, int, int]]:
    """The numbers of draft tokens that a step may have, as vLLM's schedule by batch
    size: it captures CUDA graphs for each, and our scheduler chooses among them.

    vLLM has no more graphs than batch sizes: with few, none and the most come first.
    """
    numbers = sorted({0, *numbers_of_drafts(config)})
    if max_num_seqs < len(numbers):
        numbers = [0, config.draft_tokens] if max_num_seqs == 2 else [_alone(config)]
    return [(i + 1, i + 1, number) for i, number in enumerate(numbers)]


def _alone(config: SparseConfig) -> int:
    """What an engine for one request has graphs for: that alone seldom pays."""
    return 0 if config.draft_adapt else config.draft_tokens


def choose_classes(vllm_config) -> None:
    """Our worker and scheduler for a lossless engine.

    Raises:
        SparseConfigError: when vLLM would run other ones than its own.
    """
    if options(vllm_config) is None or vllm_config.model_config is None:
        return
    parallel, scheduling = vllm_config.parallel_config, vllm_config.scheduler_config
    if parallel.worker_cls not in WORKERS.values():
        if parallel.worker_cls not in WORKERS:
            raise SparseConfigError(
                f"sparse.lossless needs vLLM's own worker, not {parallel.worker_cls}: "
                "leave --worker-cls out"
            )
        parallel.worker_cls = WORKERS[parallel.worker_cls]
    ours = f"{SCHEDULER}.{'Async' if scheduling.async_scheduling else ''}DraftScheduler"
    if scheduling.scheduler_cls is None:
        scheduling.scheduler_cls = ours
    elif not str(scheduling.scheduler_cls).startswith(SCHEDULER):
        raise SparseConfigError(
            "sparse.lossless schedules its drafts itself, leave --scheduler-cls out"
        )
    scheduling.scheduler_cls = ours

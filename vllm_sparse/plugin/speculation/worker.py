# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""vLLM's worker with a drafter of ours in the place of the one that it makes.

Upstream: ``init_device`` of the workers makes ``model_runner``, whose ``drafter`` (V1)
or ``speculator`` (V2) is made in the constructor and used from ``load_model`` on;
``initialize_from_config`` makes V1's ``input_batch`` anew. To go when vLLM has a
registry of drafters.
"""

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as VllmWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as VllmWorker


def __getattr__(name: str):
    """``Worker``, as vLLM finds it by name at each start of an engine.

    vLLM puts a ``worker_extension_cls`` among the bases of a worker's class, for good,
    and refuses one whose methods the class has already. Where an engine of this process
    has extended vLLM's own class, ours has the extension, too: say so in its bases.
    """
    if name != "Worker":
        raise AttributeError(name)
    own = LosslessWorker.__bases__
    further = [base for base in VllmWorker.__bases__[1:] if base not in own]
    LosslessWorker.__bases__ = (*own, *further)
    return LosslessWorker


class LosslessWorker(VllmWorker):
    """Serves a lossless engine."""

    def init_device(self) -> None:
        if current_platform.is_cpu():
            from .v1 import SelfDraftProposer
            from .v1_parameters import without_the_warning

            with without_the_warning():
                super().init_device()
            runner = self.model_runner
            runner.drafter = SelfDraftProposer(
                runner.vllm_config, runner.device, runner
            )
            self._draft_near_the_end()
        else:
            from .v2 import SelfSpeculator

            super().init_device()
            runner = self.model_runner
            runner.speculator = None  # its memory goes before ours is taken
            runner.speculator = SelfSpeculator(runner.vllm_config, runner.device)

    def update_max_model_len(self, max_model_len: int) -> None:
        super().update_max_model_len(max_model_len)
        if current_platform.is_cpu():
            self._draft_near_the_end()

    def initialize_from_config(self, kv_cache_config) -> None:
        super().initialize_from_config(kv_cache_config)
        if current_platform.is_cpu():
            from .v1_parameters import serve_all_parameters

            serve_all_parameters(self.model_runner)

    def reload_weights(self, *args, **kwargs) -> None:
        super().reload_weights(*args, **kwargs)
        self._copy_weights()

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._copy_weights()

    def _copy_weights(self) -> None:
        """Draft with copies of the new weights."""
        speculator = getattr(self.model_runner, "speculator", None)
        if speculator is not None and speculator.weights is not None:
            speculator.weights.refresh()

    def _draft_near_the_end(self) -> None:
        """Let our drafter be asked also beside a request that is near the end of its
        context, which drafts nothing then: V1 would hand out made-up drafts to all."""
        runner = self.model_runner
        longest = self.model_config.max_model_len + runner.num_spec_tokens
        runner.effective_drafter_max_model_len = longest

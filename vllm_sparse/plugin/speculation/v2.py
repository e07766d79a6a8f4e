# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Drafting in vLLM's second model runner, on GPUs: as v1.py, in CUDA graphs.

Target and drafter share weights, blocks and block tables; metadata builders, input
buffers and graphs are the drafter's own. A graph holds one draft step, and all that the
next one needs is moved on in it: positions, lengths, slots and budgets.
"""

from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.worker.gpu.attn_utils import (
    build_slot_mappings_by_layer,
    init_attn_backend,
)
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

from ...step.builder import SparseMetadataBuilder
from ..versions import init_logger
from .accepted import count_accepted
from .configure import options
from .draft_weights import DraftWeights, drafting

logger = init_logger(__name__)


class SelfSpeculator(DraftModelSpeculator):
    """Drafts with the target's own weights and sparse attention, one token per request
    and step."""

    def __init__(self, vllm_config, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.current_draft_step = torch.zeros((), dtype=torch.int64, device=device)
        self.starts = torch.arange(
            self.max_num_reqs + 1, dtype=torch.int32, device=device
        )
        self.graphs: SpeculatorCudaGraphManager | None = None
        self.weights: DraftWeights | None = None

    @property
    def longest(self) -> int:
        """Tokens of a context; auto-fit can lower it after we were made."""
        return self.vllm_config.model_config.max_model_len

    def load_draft_model(self, target_model, target_attn_layer_names: set[str]):
        self.layer_names = target_attn_layer_names
        return target_model

    def load_model(self, target_model) -> None:
        super().load_model(target_model)
        self.supports_mm_inputs = False  # drafts are text
        if options(self.vllm_config).draft_weights == "fp8":
            self.weights = DraftWeights(self.model)

    def set_attn(
        self,
        model_state,
        kv_cache_config,
        block_tables,
        target_input_buffers,
        target_attn_groups,
    ) -> None:
        """Metadata builders for drafting; once to measure memory, and once to serve."""
        self.model_state, self.block_tables = model_state, block_tables
        self.kv_cache_config = kv_cache_config
        # By name: the runner takes ``draft_attn_layer_names``, which is empty, away
        # from the target's layers.
        self.attn_groups, self.attn_cg_support, _ = init_attn_backend(
            kv_cache_config,
            self.vllm_config,
            self.device,
            active_layer_names=self.layer_names,
        )
        for groups in self.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    if isinstance(builder, SparseMetadataBuilder):
                        builder.draft()
        self._configure_decode_metadata_update()

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        if full and not self.supports_decode_metadata_update:
            logger.warning_once("Drafts run without CUDA graphs.")
            full = False
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        self.graphs = SpeculatorCudaGraphManager(
            self.vllm_config, self.device, mode, decode_query_len=1
        )

    def capture(self) -> None:
        self.idx_mapping.zero_()
        self.graphs.capture(
            self._graph,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing draft CUDA graphs",
        )

    @torch.inference_mode()
    def propose(
        self,
        input_batch,
        attn_metadata,
        slot_mappings,
        last_hidden_states,
        aux_hidden_states,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state=None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs=None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """[num_reqs, num_speculative_steps] drafted tokens; -1 beyond the number that
        the scheduler asked for."""
        rows, steps = input_batch.num_reqs, self.num_speculative_steps
        if num_speculative_tokens is not None:
            steps = num_speculative_tokens
        if not dummy_run:
            builders = (
                builder
                for groups in self.attn_groups
                for group in groups
                for builder in group.metadata_builders[:1]
            )
            count_accepted(builders, input_batch.seq_lens[:rows], num_sampled[:rows])
        if steps == 0:
            return self.draft_tokens[:rows].fill_(-1)
        self._copy_request_inputs(
            rows, input_batch.idx_mapping, temperature, seeds, dummy_run
        )
        self._begin(input_batch, num_sampled, num_rejected, last_sampled)
        desc, _ = dispatch_cg_and_sync_dp(
            self.graphs,
            rows,
            rows,
            uniform_token_count=1,
            dp_size=self.dp_size,
            dp_rank=self.dp_rank,
            need_eager=is_profile,
        )
        bound = input_batch.seq_lens_cpu_upper_bound
        self.draft_max_seq_len = self.longest
        for step in range(steps):
            if desc.cg_mode == CUDAGraphMode.FULL:
                self.graphs.run_fullgraph(desc)
                continue
            metadata = by_layer = None
            if not (dummy_run and skip_attn_for_dummy_run):
                slots = self._slots(rows, desc.num_tokens)
                by_layer = build_slot_mappings_by_layer(slots, self.kv_cache_config)
                metadata = self._build_uniform_attn_metadata(
                    batch_desc=desc,
                    num_reqs=rows,
                    num_query_per_req=1,
                    seq_lens_cpu_upper_bound=bound,
                    step=step + 1,
                )
            self._step(rows, desc.num_tokens, metadata, by_layer, desc.cg_mode)
        return self.draft_tokens[:rows]

    def _begin(self, input_batch, num_sampled, num_rejected, last_sampled) -> None:
        """The sampled token of every request at its position; nothing waits for the
        device."""
        rows, buffers = input_batch.num_reqs, self.input_buffers
        lens = input_batch.seq_lens[:rows] - num_rejected[:rows].int() + 1
        # A prompt that is not complete samples nothing. vLLM ends requests at
        # max_model_len, whatever was drafted.
        drafting = (num_sampled[:rows] > 0) & (lens <= self.longest)
        lens = torch.where(drafting, lens, 0)
        self.idx_mapping[:rows].masked_fill_(~drafting, -1)
        buffers.seq_lens[:rows] = lens
        buffers.seq_lens[rows:] = 0
        buffers.positions[:rows] = (lens - 1).clamp(min=0)
        buffers.input_ids[:rows] = last_sampled[input_batch.idx_mapping].view(rows)
        buffers.query_start_loc[: rows + 1] = self.starts[: rows + 1]
        buffers.query_start_loc[rows + 1 :] = rows
        self.current_draft_step.zero_()

    def _slots(self, rows: int, tokens: int) -> torch.Tensor:
        buffers = self.input_buffers
        return self.block_tables.compute_slot_mappings(
            self.idx_mapping[:rows],
            buffers.query_start_loc[: rows + 1],
            buffers.positions[:rows],
            tokens,
        )

    def _graph(
        self, rows, tokens, metadata, slots, num_tokens_across_dp, mode, **_
    ) -> None:
        """What a CUDA graph holds."""
        if metadata is not None:
            self._slots(rows, tokens)
            self._update_draft_decode_metadata(metadata, rows)
        self._step(rows, tokens, metadata, slots, mode)

    def _step(
        self,
        rows: int,
        tokens: int,
        metadata: dict[str, Any] | None,
        slots: dict[str, torch.Tensor] | None,
        mode: CUDAGraphMode,
    ) -> None:
        buffers = self.input_buffers
        forward = set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=tokens,
            cudagraph_runtime_mode=mode,
            slot_mapping=slots,
            batch_descriptor=BatchDescriptor(num_tokens=tokens),
        )
        with drafting():  # logits, too, are made with copies
            with forward:
                hidden = self.model(
                    input_ids=buffers.input_ids[:tokens],
                    positions=buffers.positions[:tokens],
                )
            drafts = self.sample_draft(
                hidden[:rows],
                buffers.positions[:rows],
                self.idx_mapping[:rows],
                self.temperature,
                self.seeds,
                self.current_draft_step,
                self.draft_logits,
            ).view(rows)
        # Only the device knows which step a graph's replay is.
        column = self.current_draft_step.expand(rows, 1)
        self.draft_tokens[:rows].scatter_(1, column, drafts.long()[:, None])
        buffers.input_ids[:rows] = drafts.int()
        lens, most = buffers.seq_lens[:rows], self.longest
        more = (lens > 0).int()
        buffers.positions[:rows].add_(more).clamp_(max=most - 1)
        lens.add_(more).clamp_(max=most)
        # Capturing runs more steps than there are.
        self.current_draft_step.add_(1).remainder_(self.num_speculative_steps)

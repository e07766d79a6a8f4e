# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Drafting in vLLM's first model runner, on CPUs: the model drafts in its own cache.

Draft step i stores its token's K and V in the request's own blocks at position p + i,
p being that of the last sampled token, which the next step computes anyway; that step
verifies, and stores dense K and V there before it reads them. What is rejected lies
beyond the request's length. vLLM's draft models begin with a pass over all tokens that
were verified, to fill a cache of their own: here that would overwrite dense K and V.
"""

from dataclasses import replace

import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.worker.utils import AttentionGroup

from ...methods.drafting import drafts_from
from ...step.builder import SparseMetadataBuilder
from .accepted import count_accepted
from .configure import options


class SelfDraftProposer(DraftModelProposer):
    """Drafts with the target's own weights and sparse attention.

    Args:
        runner: the model runner, whose drafter this is.
    """

    def __init__(self, vllm_config, device: torch.device, runner) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self.above = drafts_from(options(vllm_config), device.type)

    def load_model(self, target_model: torch.nn.Module) -> None:
        self.model = target_model
        self._draft_attn_layer_names: set[str] = set()

    def initialize_attn_backend(self, kv_cache_config, kernel_block_sizes=None) -> None:
        """The target's groups of layers, with metadata builders for drafting."""
        self.draft_attn_groups, self.kv_cache_gid = [], 0
        for gid, groups in enumerate(self.runner.attn_groups):
            for group in groups:
                ours = AttentionGroup(
                    backend=group.backend,
                    layer_names=group.layer_names,
                    kv_cache_spec=group.kv_cache_spec,
                    kv_cache_group_id=gid,
                )
                size = kernel_block_sizes[gid] if kernel_block_sizes else None
                ours.create_metadata_builders(self.vllm_config, self.device, size)
                for builder in ours.metadata_builders:
                    if isinstance(builder, SparseMetadataBuilder):
                        builder.draft()
                self.draft_attn_groups.append(ours)

    def prepare_next_token_ids_padded(self, *args, **kwargs):
        tokens, self.num_sampled = super().prepare_next_token_ids_padded(
            *args, **kwargs
        )
        return tokens, self.num_sampled

    def dummy_run(self, *args, **kwargs) -> None:
        """Nothing: drafting needs less memory than the target's own steps."""

    @torch.inference_mode()
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs=None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings=None,
    ) -> torch.Tensor:
        """[num_reqs, num_speculative_tokens] drafted tokens; rows of requests that do
        not draft are -1, which the scheduler drops."""
        self._last_draft_probs = None
        steps, num_reqs = num_speculative_tokens, next_token_ids.shape[0]
        drafts = next_token_ids.new_full((num_reqs, steps), -1)
        lens = common_attn_metadata.seq_lens[:num_reqs].clone()
        builders = (g.get_metadata_builder() for g in self.draft_attn_groups)
        count_accepted(builders, lens, self.num_sampled[:num_reqs])
        if num_rejected_tokens_gpu is not None:
            lens -= num_rejected_tokens_gpu
        # Auto-fit can lower it after we were made.
        longest = self.vllm_config.model_config.max_model_len
        # A prompt that is not complete samples nothing.
        drafting = ~self.runner.discard_request_mask.gpu[:num_reqs]
        drafting &= (lens >= self.above) & (lens + steps <= longest)
        rows = drafting.nonzero()[:, 0]
        if not len(rows) or not steps:
            return drafts
        self._use_adapters(rows)
        sampling = _of_rows(sampling_metadata, rows)
        ids, lens, probs = next_token_ids[rows], lens[rows], []
        for step in range(steps):
            lens = lens + 1
            hidden = self._forward(ids, rows, lens, step)
            ids, prob = self._sample_draft_tokens(hidden, sampling)
            drafts[rows, step] = ids.to(drafts.dtype)
            if prob is not None:
                probs.append(prob)
        if probs:
            whole = probs[0].new_zeros(num_reqs, steps, probs[0].shape[-1])
            whole[rows] = torch.stack(probs, 1)
            self._last_draft_probs = whole
        return drafts

    def _forward(
        self, ids: torch.Tensor, rows: torch.Tensor, lens: torch.Tensor, step: int
    ) -> torch.Tensor:
        """Hidden states of one token each, the last of contexts of ``lens`` tokens."""
        starts = torch.arange(len(rows) + 1, dtype=torch.int32)
        positions = lens.long() - 1
        metadata, slots = {}, {}
        for group in self.draft_attn_groups:
            builder = group.get_metadata_builder()
            blocks = self.runner.input_batch.block_table[group.kv_cache_group_id]
            table = blocks.get_device_tensor(self.runner.input_batch.num_reqs)[rows]
            size = builder.kv_cache_spec.block_size
            block = table.gather(1, (positions // size)[:, None])[:, 0].long()
            common = CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=lens.int(),
                seq_lens_cpu_upper_bound=lens.int(),
                num_reqs=len(rows),
                num_actual_tokens=len(rows),
                max_query_len=1,
                max_seq_len=int(lens.max()),
                block_table_tensor=table,
                slot_mapping=block * size + positions % size,
                is_prefilling=torch.zeros(len(rows), dtype=torch.bool),
                positions=positions,
            )
            built = builder.build_for_drafting(common, step)
            metadata |= dict.fromkeys(group.layer_names, built)
            slots |= dict.fromkeys(group.layer_names, common.slot_mapping)
        with set_forward_context(
            metadata, self.vllm_config, num_tokens=len(rows), slot_mapping=slots
        ):
            return self.model(input_ids=ids.int(), positions=positions)

    def _sample_draft_tokens(self, hidden_states, sampling_metadata):
        """vLLM's, with the generators of requests that have a seed."""
        ids, probs = super()._sample_draft_tokens(hidden_states, sampling_metadata)
        for row, generator in sampling_metadata.generators.items():
            if probs is not None and sampling_metadata.temperature[row] >= 1e-5:
                noise = torch.empty_like(probs[row]).exponential_(generator=generator)
                ids[row] = (probs[row] / noise).argmax()
        return ids, probs

    def _use_adapters(self, rows: torch.Tensor) -> None:
        """Let LoRA layers take each row's adapter: the step before had other rows."""
        if not self.runner.lora_config:
            return
        import numpy as np

        batch = self.runner.input_batch
        counts = np.zeros(batch.num_reqs, dtype=np.int32)
        counts[rows.numpy()] = 1
        self.runner.set_active_loras(batch, counts, counts)


def _of_rows(sampling: SamplingMetadata, rows: torch.Tensor) -> SamplingMetadata:
    """What drafting reads of it, for some rows of the batch."""
    temperature = sampling.temperature
    place = {int(row): i for i, row in enumerate(rows)}
    return replace(
        sampling,
        temperature=None if temperature is None else temperature[rows],
        generators={place[r]: g for r, g in sampling.generators.items() if r in place},
    )

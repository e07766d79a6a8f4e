# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Once per step on the CPU: which rows decode, which prefill, which blocks fill up."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from ..layer.prefill_codes import plan_quantised_prefill
from ..layer.prefill_cpu import (
    KernelShape,
    PrefillRows,
    QuantisedRows,
    plan_prefill,
    plan_quantised_rows,
)
from ..methods import DecodeRows
from ..methods.base import tokens_kept
from ..stats.recorder import recorder
from .builder import SparseMetadataBuilder, budget_for
from .seal import SealJobs, seal_jobs


@dataclass
class NewTokens:
    """All requests of a step, for storing in a quantised cache.

    Attributes:
        block_table: [num_requests, max_blocks] int32.
        seq_lens: [num_requests] int32.
        query_start_loc: [num_requests + 1] int32.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor


@dataclass
class SparseMetadata(AttentionMetadata):
    """Decode tokens come first in the batch, prefill tokens after them.

    Attributes:
        slot_mapping: [num_actual_tokens] int64.
        seal: blocks that the step fills; None in quantised formats.
        new: only in quantised formats.
    """

    num_actual_tokens: int
    num_decode_tokens: int
    slot_mapping: torch.Tensor
    decode: DecodeRows | None
    prefill: PrefillRows | QuantisedRows | None
    seal: SealJobs | None
    new: NewTokens | None


class CpuSparseMetadataBuilder(SparseMetadataBuilder[SparseMetadata]):
    """Builds :class:`SparseMetadata`; all decisions here use host numbers."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SparseMetadata:
        common = self.checked(common_attn_metadata)
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold
        )
        starts = common.query_start_loc_cpu.tolist()
        seq_lens = common.seq_lens[: common.num_reqs]
        lens = seq_lens.tolist()
        seal = new = prefill = None
        if self.fmt.quantised:
            last = common.num_reqs
            new = NewTokens(
                block_table=self.storing(common, last),
                seq_lens=seq_lens,
                query_start_loc=common.query_start_loc[: last + 1],
            )
        else:
            seal = seal_jobs(common.block_table_tensor, starts, lens)
        if num_prefills:
            prompts = common.num_actual_tokens - num_decode_tokens
            recorder.add_rows(self.layers, prefill=prompts)
            prefill = self._prefill_rows(common, starts, seq_lens, num_decodes)
        return SparseMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decode_tokens=num_decode_tokens,
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
            decode=self._decode_rows(common, starts, lens, num_decodes),
            prefill=prefill,
            seal=seal,
            new=new,
        )

    def _decode_rows(
        self,
        common: CommonAttentionMetadata,
        starts: list[int],
        lens: list[int],
        num_decodes: int,
    ) -> DecodeRows | None:
        prefilling = self.prefilling(common).tolist()
        rows, row_lens, budgets = [], [], []
        prompts = short = 0
        for req in range(num_decodes):
            query_len = starts[req + 1] - starts[req]
            prompts += query_len * prefilling[req]
            for i in range(query_len):
                seq_len = lens[req] - query_len + 1 + i
                short += seq_len < self.config.dense_below and not prefilling[req]
                rows.append(req)
                row_lens.append(seq_len)
                # A prompt's last token is prefill even when it comes alone, or a
                # prefix-cache hit would change the first answer token.
                budgets.append(
                    -1
                    if prefilling[req]
                    else budget_for(seq_len, self.config, self.fmt)
                )
        if not rows:
            return None
        sparse = sum(budget >= 0 for budget in budgets)
        recorder.totals.decode_tokens += len(rows)
        recorder.add_rows(
            self.layers,
            sparse=sparse,
            short=short,
            covered=len(rows) - sparse - short - prompts,
            prefill=prompts,
        )
        block_table = common.block_table_tensor
        one_each = rows == list(range(num_decodes))
        indices = counts = None
        if any(budget >= 0 for budget in budgets):
            max_kept = max(
                tokens_kept(
                    seq_len,
                    budget,
                    self.config.local_window,
                    self.config.sink_tokens,
                    self.fmt,
                )
                for seq_len, budget in zip(row_lens, budgets)
                if budget >= 0
            )
            shape = (len(rows), self.num_kv_heads)
            indices = torch.empty((*shape, max_kept), dtype=torch.int32)
            counts = torch.empty(shape, dtype=torch.int32)
        return DecodeRows(
            block_table=block_table[: len(rows)]
            if one_each
            else block_table[torch.tensor(rows)],
            seq_lens=torch.tensor(row_lens, dtype=torch.int32),
            budgets=torch.tensor(budgets, dtype=torch.int32),
            indices=indices,
            counts=counts,
            seq_lens_list=row_lens,
            budgets_list=budgets,
            kept_histograms=self.kept.by_layer,
        )

    def _prefill_rows(
        self,
        common: CommonAttentionMetadata,
        starts: list[int],
        seq_lens: torch.Tensor,
        num_decodes: int,
    ) -> PrefillRows | QuantisedRows:
        block_table = common.block_table_tensor[num_decodes : common.num_reqs]
        shape = KernelShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.kv_cache_spec.head_size,
            dtype=self.vllm_config.model_config.dtype,
        )
        if self.fmt.quantised:
            lens = seq_lens[num_decodes:].tolist()
            (plan,) = plan_quantised_prefill(starts[num_decodes:], lens, block_table)
            return plan_quantised_rows(plan, shape)
        return plan_prefill(
            query_start_loc=common.query_start_loc[num_decodes : common.num_reqs + 1],
            seq_lens=seq_lens[num_decodes:],
            block_table=block_table,
            shape=shape,
        )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Once per step on a GPU, without waiting for it: the device plans the decode rows.

The host does not know how many drafts were accepted (asynchronous scheduling), and a
FULL CUDA graph replays with the shapes of its capture. So budgets come from a table
over context lengths, and everything that a graph reads stays at one address.
"""

from dataclasses import dataclass, replace

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from .. import ops
from ..cache.layout import BLOCK_SIZE, BlockLayout
from ..config import SparseConfig, SparseConfigError
from ..layer.prefill_codes import QuantisedPrefill, plan_quantised_prefill
from ..layer.prefill_fa import GpuPrefillRows
from ..methods import DecodeRows
from ..stats.counters import DeviceCounter
from ..stats.recorder import recorder
from .builder import SparseMetadataBuilder, budget_table
from .seal import SealJobs, seal_jobs

# Decode rows share this much memory for scores and lists; more rows take turns.
SCRATCH_BYTES = 512 * 2**20


@dataclass
class NewTokens:
    """Decode requests (all requests in quantised formats), for storing and sealing.

    Attributes:
        block_table: [num_requests, max_blocks] int32.
        seq_lens: [num_requests] int32.
        query_start_loc: [num_requests + 1] int32.
        one_token_each: no request verifies drafts.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    one_token_each: bool


@dataclass
class GpuMetadata(AttentionMetadata):
    """Decode tokens come first in the batch, prefill tokens after them.

    Attributes:
        decode: rows served one part after another, as they share their buffers.
        slot_mapping: [num_actual_tokens] int64.
        prefill, seal: prefill rows, and the blocks that they fill, of plain rows.
        quantised: prefill rows in quantised formats, one part after another.
    """

    num_actual_tokens: int
    slot_mapping: torch.Tensor
    decode: list[DecodeRows]
    requests: NewTokens | None
    prefill: GpuPrefillRows | None
    quantised: list[QuantisedPrefill]
    seal: SealJobs | None


class GpuSparseMetadataBuilder(SparseMetadataBuilder[GpuMetadata]):
    """Builds :class:`GpuMetadata`."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, *args, **kwargs) -> None:
        self._buffers: _Buffers | None = None
        self._storing: torch.Tensor | None = None
        self._captured = False
        self.counter: DeviceCounter | None = None
        super().__init__(*args, **kwargs)

    def check(self, config: SparseConfig) -> None:
        super().check(config)
        compilation = self.vllm_config.compilation_config
        if (
            self._buffers is None
            or not compilation.cudagraph_mode.has_full_cudagraphs()
        ):
            return
        new, old = self.resolved(config), self.config
        free = ("top_k", "max_tokens", "dense_below")
        if replace(new, **{name: getattr(old, name) for name in free}) != old:
            raise SparseConfigError(
                f"CUDA graphs hold all sparse options but {', '.join(free)}: start "
                f"another engine, or this one with enforce_eager. Now: {old}"
            )
        kept = int(self._budgets(new).max())
        if kept > self._buffers.max_kept:
            name = "top_k" if new.top_p is None else "max_tokens"
            raise SparseConfigError(
                f"the new options keep up to {kept} tokens, but CUDA graphs were "
                f"captured for {self._buffers.max_kept}: start the engine with the "
                f"larger {name}, or with enforce_eager"
            )

    def _budgets(self, config: SparseConfig) -> torch.Tensor:
        """Tokens to keep, by context length: int32 on the host."""
        # Drafts may stand past the last position.
        last = self.vllm_config.model_config.max_model_len
        return budget_table(last + self.reorder_batch_threshold, config, self.fmt)

    def configure(self, config: SparseConfig) -> None:
        super().configure(config)
        config, spec = self.config, self.kv_cache_spec
        self.max_rows = max(
            self.vllm_config.scheduler_config.max_num_seqs
            * self.reorder_batch_threshold,
            self.vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        budgets = self._budgets(config)
        self.max_kept = max(1, int(budgets.max()))
        self.budget_table = budgets.to(self.device)
        buffers = self._buffers
        if buffers is not None and (
            self.max_kept > buffers.max_kept
            or buffers.adapts != (config.top_p is not None)
        ):
            self._buffers = None  # no graph holds them: see check
        layout = BlockLayout(spec.head_size, spec.dtype.itemsize, self.fmt)
        counter = DeviceCounter(
            device=self.device,
            layers=self.layers,
            num_kv_heads=self.num_kv_heads,
            layout=layout,
            block_score_bytes=layout.score_bytes(1, config.rank),
            row_score_bytes=2 * spec.head_size if config.mean_value else 0,
            dense_below=config.dense_below,
            kept=self.kept,
        )
        recorder.replace_counter(self.counter, counter)
        self.counter = counter

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> GpuMetadata:
        common = self.checked(common_attn_metadata)
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold
        )
        decode, requests, prefill, seal = [], None, None, None
        quantised: list[QuantisedPrefill] = []
        if num_decode_tokens:
            decode = self._decode_rows(common, num_decodes, num_decode_tokens)
        last = common.num_reqs if self.fmt.quantised else num_decodes
        if last:
            table = common.block_table_tensor[:last]
            if self.fmt.quantised:
                table = self.storing(common, last, self._storing_buffer(table))
            requests = NewTokens(
                block_table=table,
                seq_lens=common.seq_lens[:last],
                query_start_loc=common.query_start_loc[: last + 1],
                one_token_each=self._one_token_each(num_decodes, num_decode_tokens),
            )
        if num_prefills:
            new = common.query_start_loc_cpu[common.num_reqs].item()
            recorder.add_rows(self.layers, prefill=new - num_decode_tokens)
        if num_prefills and self.fmt.quantised:
            quantised = self._quantised_prefill(common, num_decodes)
        elif num_prefills:
            prefill = _prefill_rows(common, num_decodes, num_decode_tokens)
            seal = _prefill_seals(common, num_decodes)
        return GpuMetadata(
            num_actual_tokens=common.num_actual_tokens,
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
            decode=decode,
            requests=requests,
            prefill=prefill,
            quantised=quantised,
            seal=seal,
        )

    def _quantised_prefill(
        self, common: CommonAttentionMetadata, num_decodes: int
    ) -> list[QuantisedPrefill]:
        # One long request always fits; several take turns.
        config = self.vllm_config
        tokens = (
            config.model_config.max_model_len
            + config.scheduler_config.max_num_batched_tokens
        )
        return plan_quantised_prefill(
            common.query_start_loc_cpu.tolist()[num_decodes:],
            _host_lens(common)[num_decodes:],
            common.block_table_tensor[num_decodes : common.num_reqs],
            max_blocks=tokens // BLOCK_SIZE,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> GpuMetadata:
        metadata = self.build(0, common_attn_metadata)
        # Nothing was served yet, but vLLM's warm-up has decoded made-up requests: it
        # comes first, as graphs hold the workspaces that it makes grow. Later calls are
        # idle steps of data parallelism. Without FULL graphs there is no call, and the
        # warm-up stays counted (enforce_eager skips it).
        if not self._captured:
            self._captured = True
            recorder.reset()
        return metadata

    def _storing_buffer(self, table: torch.Tensor) -> torch.Tensor:
        """[max_rows, max_blocks] int32 at a fixed address: graphs hold it."""
        if self._storing is None:
            self._storing = table.new_zeros(self.max_rows, table.shape[1])
        return self._storing

    def _one_token_each(self, num_decodes: int, num_decode_tokens: int) -> bool:
        """Fixed for an engine: graphs of one batch size must not differ in it."""
        return self.reorder_batch_threshold == 1 and num_decode_tokens == num_decodes

    def _decode_rows(
        self,
        common: CommonAttentionMetadata,
        num_decodes: int,
        num_rows: int,
    ) -> list[DecodeRows]:
        buffers = self._buffers
        if buffers is None:
            buffers = self._buffers = _Buffers(self, common.block_table_tensor)
        dense = self._prompt_rows(common, num_decodes)
        table = common.block_table_tensor[:num_rows]
        seq_lens = common.seq_lens[:num_rows]
        if not self._one_token_each(num_decodes, num_rows):
            request, seq_lens = _rows_of_requests(common, num_decodes, num_rows)
            if dense is not None:
                dense = dense[request]
            # Copied, as graphs read the same addresses at every step.
            buffers.seq_lens[:num_rows] = seq_lens
            seq_lens = buffers.seq_lens[:num_rows]
            table = buffers.block_table[:num_rows]
            torch.index_select(common.block_table_tensor, 0, request, out=table)
        budgets = buffers.budgets[:num_rows]
        torch.index_select(self.budget_table, 0, seq_lens, out=budgets)
        if dense is not None:
            # A prompt's last token is prefill even when it comes alone, or a
            # prefix-cache hit would change the first answer token.
            budgets.masked_fill_(dense, -1)
        slots = common.slot_mapping[:num_rows]
        self.counter.add(seq_lens, budgets, slots, dense)
        parts = []
        for first in range(0, num_rows, buffers.rows_at_once):
            rows = slice(first, min(first + buffers.rows_at_once, num_rows))
            size = rows.stop - rows.start
            parts.append(
                DecodeRows(
                    block_table=table[rows],
                    seq_lens=seq_lens[rows],
                    budgets=budgets[rows],
                    indices=buffers.indices[:size],
                    counts=buffers.counts[:size],
                    kept_mass=buffers.kept_mass[:size],
                    workspace=buffers.workspace,
                    kept_histograms=self.kept.by_layer,
                )
            )
        return parts

    def _prompt_rows(
        self, common: CommonAttentionMetadata, num_decodes: int
    ) -> torch.Tensor | None:
        """[num_decodes] bool on the device; None when no request is in its prompt."""
        flags = self.prefilling(common)
        if not flags[:num_decodes].any():
            return None
        pin = self.device.type == "cuda"
        # Padding requests have no flag.
        host = torch.zeros(num_decodes, dtype=torch.bool, pin_memory=pin)
        host[: len(flags)] = flags[:num_decodes]
        return host.to(self.device, non_blocking=True)


class _Buffers:
    """Memory that decode rows share, at fixed addresses.

    Args:
        block_table: any step's; its width is that of all.
    """

    def __init__(self, builder: GpuSparseMetadataBuilder, block_table: torch.Tensor):
        max_blocks = block_table.shape[1]
        heads, kept = builder.num_kv_heads, builder.max_kept
        self.max_kept = kept
        self.adapts = builder.config.top_p is not None

        def scratch(rows: int) -> int:
            return ops.workspace_bytes(
                num_rows=rows,
                num_kv_heads=heads,
                group=builder.num_heads // heads,
                max_blocks=max_blocks,
                head_size=builder.kv_cache_spec.head_size,
                device=builder.device,
                adapts=self.adapts,
            )

        per_row = 4 * heads * kept + scratch(2) - scratch(1)
        self.rows_at_once = min(builder.max_rows, max(8, SCRATCH_BYTES // per_row))
        rows = self.rows_at_once

        def empty(*shape: int, dtype=torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=builder.device)

        self.indices = empty(rows, heads, kept)
        self.counts = empty(rows, heads)
        self.kept_mass = empty(rows, builder.num_heads, dtype=torch.float32)
        self.workspace = empty(scratch(rows), dtype=torch.uint8)
        self.budgets = empty(builder.max_rows)
        # Of rows that are not one per request.
        self.seq_lens = empty(builder.max_rows)
        self.block_table = empty(builder.max_rows, max_blocks)


def _rows_of_requests(
    common: CommonAttentionMetadata, num_decodes: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Request and context length of every decode token, both [num_rows] int32.

    A token sees the context up to itself; padding tokens see none.
    """
    ends = common.query_start_loc[1 : num_decodes + 1]
    row = torch.arange(num_rows, dtype=torch.int32, device=ends.device)
    request = torch.searchsorted(ends, row, right=True, out_int32=True)
    padding = request >= num_decodes
    request = request.clamp_(max=num_decodes - 1)
    seq_lens = common.seq_lens[request] - (ends[request] - 1 - row)
    return request, seq_lens.masked_fill_(padding, 0)


def _prefill_rows(
    common: CommonAttentionMetadata, num_decodes: int, num_decode_tokens: int
) -> GpuPrefillRows:
    starts = common.query_start_loc[num_decodes : common.num_reqs + 1]
    return GpuPrefillRows(
        query_start_loc=starts - num_decode_tokens if num_decode_tokens else starts,
        seq_lens=common.seq_lens[num_decodes : common.num_reqs],
        block_table=common.block_table_tensor[num_decodes : common.num_reqs],
        max_query_len=common.max_query_len,
        max_seq_len=common.max_seq_len,
    )


def _prefill_seals(
    common: CommonAttentionMetadata, num_decodes: int
) -> SealJobs | None:
    return seal_jobs(
        common.block_table_tensor,
        common.query_start_loc_cpu.tolist(),
        _host_lens(common),
        first=num_decodes,
    )


def _host_lens(common: CommonAttentionMetadata) -> list[int]:
    """Context lengths, exact for prefill rows."""
    lens = common.seq_lens_cpu_upper_bound
    if lens is None:
        lens = common.seq_lens.cpu()
    return lens[: common.num_reqs].tolist()

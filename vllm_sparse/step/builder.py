# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Once per step and group of layers: which rows decode, with which budgets.

The same on every device, and nothing waits for one: the host does not know how many
drafts were accepted (asynchronous scheduling), and a FULL CUDA graph replays with the
shapes of its capture. So budgets come from a table over context lengths, and what a
graph reads stays at one address.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import (
    get_num_attention_heads_from_layers,
    split_decodes_and_prefills,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from .. import ops
from ..cache.layout import BLOCK_SIZE
from ..config import SparseConfig
from ..layer.plan import flash_schedule, one_call, plan_dense
from ..methods import METHODS, DecodeRows, LayerShape, Phase
from ..plugin.versions import init_logger
from ..stats.counters import KeptHistograms, StepCounter
from ..stats.recorder import recorder
from .buffers import Buffers
from .compact import compacted
from .layers import layer_kinds, resolved
from .metadata import SparseMetadata
from .options import check_options
from .prompts import prefilling, rows_of_prompts

logger = init_logger(__name__)


class SparseMetadataBuilder(AttentionMetadataBuilder[SparseMetadata]):
    """Builds :class:`SparseMetadata`."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    # The backend's name, and its options that differ from SparseConfig's defaults.
    backend: ClassVar[str] = "sparq"
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Draft tokens under verification decode too: one row per position.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.phase = Phase.VERIFY if self.reorder_batch_threshold > 1 else Phase.DECODE
        # Whether its layers are a draft model's, in steps of the drafter.
        self.drafter = False
        self.num_heads = get_num_attention_heads_from_layers(
            vllm_config, layer_names
        ) or vllm_config.model_config.get_num_attention_heads(
            vllm_config.parallel_config
        )
        self.num_kv_heads = kv_cache_spec.num_kv_heads
        self._report_padding()
        self.kept = KeptHistograms(layer_names, self.num_kv_heads, device)
        recorder.histograms.add(self.kept)
        self.buffers: Buffers | None = None
        self.counter: StepCounter | None = None
        # By phase; graphs of drafts read them.
        self.budget_tables: dict[Phase, torch.Tensor] = {}
        self._captured = False
        self.configure(
            SparseConfig.from_additional_config(
                vllm_config.additional_config, self.defaults
            )
        )

    def draft(self) -> None:
        """Build a drafter's steps from here on: every request has one new token, which
        a later step verifies."""
        self.reorder_batch_threshold, self.phase = 1, Phase.DRAFT
        self.supports_draft_decode_metadata_update = True
        self.configure(
            SparseConfig.from_additional_config(
                self.vllm_config.additional_config, self.defaults
            )
        )

    def serve_drafter(self, further: int) -> None:
        """Build the steps of a draft model with a cache of its own from here on.

        Its layers are all in ``layer_names`` now. Its first step of a cycle brings what
        the target has just verified and ``further`` tokens more of each request.
        """
        self.drafter = True
        self.reorder_batch_threshold += further
        self.budget_tables = {}
        self.kept = KeptHistograms(self.layer_names, self.num_kv_heads, self.device)
        recorder.histograms.add(self.kept)
        self.configure(
            SparseConfig.from_additional_config(
                self.vllm_config.additional_config, self.defaults
            )
        )

    def check(self, config: SparseConfig) -> None:
        """Raise if the running engine cannot take these options; change nothing.

        Raises:
            SparseConfigError: naming what is fixed.
        """
        check_options(self, config)

    def configure(self, config: SparseConfig) -> None:
        """Take other options: at construction, or between requests in evaluation."""
        self.config = config = resolved(config, self)
        scheduler, model = (
            self.vllm_config.scheduler_config,
            self.vllm_config.model_config,
        )
        self.shape = LayerShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.kv_cache_spec.head_size,
            dtype=model.dtype,
            fmt=config.format(
                self.kv_cache_spec.head_size, self.num_heads // self.num_kv_heads
            ),
        )
        self.ops = ops.bound(config.kernels, self.device)
        self.method = METHODS[config.selector](config, self.shape, self.ops)
        # One long request always fits; several take turns.
        self.scratch_blocks = (
            model.max_model_len + scheduler.max_num_batched_tokens
        ) // BLOCK_SIZE
        self.max_rows = max(
            scheduler.max_num_seqs * self.reorder_batch_threshold,
            self.vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        budgets = self.budgets(config)
        self.max_kept = most_kept(budgets)
        with torch.inference_mode():  # as the engine's steps
            for phase, table in budgets.items():
                fixed = torch.empty_like(table, device=self.device)
                self.budget_tables.setdefault(phase, fixed).copy_(table)
        adapts = config.top_p is not None
        held = self.buffers
        if held and (self.max_kept > held.max_kept or adapts != held.adapts):
            self.buffers = None  # no graph holds them: see check
        layers = layer_kinds(self)
        self.verifies_together = (
            self.reorder_batch_threshold > 1
            and one_call(self.device, self.shape.fmt)
            and (layers.dense > 0 or self.phase in self.method.dense_phases)
        )
        self.schedule = None
        if self.verifies_together:
            self.schedule = flash_schedule(self.shape, self.vllm_config, self.device)
        counter = StepCounter(
            device=self.device,
            layers=layers,
            num_kv_heads=self.num_kv_heads,
            layout=self.shape.layout,
            score_bytes=self.method.score_bytes,
            dense_below=config.dense_below,
            # Rows of one request follow each other in a CPU's caches.
            together=self.verifies_together or self.device.type == "cpu",
            kept=self.kept,
            drafts=self.phase is Phase.DRAFT,
        )
        recorder.replace_counter(self.counter, counter)
        self.counter = counter

    def budgets(self, config: SparseConfig) -> dict[Phase, torch.Tensor]:
        """Tokens to keep by context length, for rows that decode: int32 on the host.

        Args:
            config: resolved.
        """
        # Drafts may stand past the last position.
        longest = self.vllm_config.model_config.max_model_len
        longest += self.reorder_batch_threshold
        method = METHODS[config.selector](config, self.shape, self.ops)
        # Lossless engines have other builders for their drafts.
        phases = {self.phase} if config.lossless else {self.phase, Phase.DRAFT}
        return {p: method.budgets(p, longest) for p in phases}

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SparseMetadata:
        return self._build(common_attn_metadata, self.phase)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> SparseMetadata:
        return self._build(common_attn_metadata, Phase.DRAFT)

    def update_draft_decode_metadata(self, metadata: SparseMetadata) -> None:
        """The next draft step, which a CUDA graph records: lengths and slots are in
        their places already."""
        first, table = 0, self.budget_tables[Phase.DRAFT]
        for rows in metadata.decode:
            torch.index_select(table, 0, rows.seq_lens, out=rows.budgets)
            slots = metadata.slot_mapping[first : first + rows.num_rows]
            self.counter.add(rows.seq_lens, rows.budgets, slots)
            first += rows.num_rows

    def require_causal(self, common: CommonAttentionMetadata) -> None:
        if common.causal is not True:
            raise NotImplementedError(
                f"--attention-backend {self.backend} serves causal attention only, and "
                "this model asks for both directions: leave --attention-backend out"
            )

    def _build(self, common: CommonAttentionMetadata, phase: Phase) -> SparseMetadata:
        self.require_causal(common)
        num_decodes, num_prefills, num_rows, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold
        )
        if (
            self.method.prompts_as_rows
            and Phase.PREFILL not in self.method.dense_phases
        ):
            num_decodes, num_prefills = common.num_reqs, 0
            num_rows = common.num_actual_tokens
        together, prefill = None, []
        if num_rows and self.verifies_together:
            requests = slice(0, num_decodes)
            (together,) = self._dense(common, requests)
            if self.schedule is not None:
                self.schedule.plan(together)
        if num_prefills:
            prefill = self._dense(common, slice(num_decodes, common.num_reqs))
            new = prefill[-1].tokens.stop - num_rows
            recorder.add_rows(self.counter.layers, prefill=new)
        return SparseMetadata(
            phase=phase,
            num_actual_tokens=common.num_actual_tokens,
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
            block_table=common.block_table_tensor[: common.num_reqs],
            seq_lens=common.seq_lens[: common.num_reqs],
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            decode=self._decode(common, phase, num_decodes, num_rows),
            together=together,
            prefill=prefill,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> SparseMetadata:
        metadata = self.build(0, common_attn_metadata)
        # Nothing was served yet, but vLLM's warm-up has decoded made-up requests: it
        # comes first, as graphs hold the workspaces that it makes grow. Later calls are
        # idle steps of data parallelism. Without FULL graphs there is no call, and the
        # warm-up stays counted (enforce_eager skips it).
        if not self._captured:
            self._captured = True
            recorder.reset()
        return metadata

    def _dense(self, common: CommonAttentionMetadata, requests: slice):
        shape, ops, blocks = self.shape, self.ops, self.scratch_blocks
        if Phase.PREFILL not in self.method.dense_phases:
            common, requests = compacted(common, requests, self.method.kept)
        return plan_dense(common, requests, shape, ops, blocks)

    def _decode(
        self,
        common: CommonAttentionMetadata,
        phase: Phase,
        num_decodes: int,
        num_rows: int,
    ) -> list[DecodeRows]:
        if num_rows == 0:
            return []
        table = common.block_table_tensor
        held = self.buffers
        if held is None or not held.fits(num_rows, table.shape[1]):
            if self._captured and held and held.max_blocks < table.shape[1]:
                raise RuntimeError("CUDA graphs hold buffers that a step has outgrown")
            held = Buffers(
                self.shape,
                self.ops,
                self.device,
                num_rows=max(self.max_rows, num_rows),
                max_kept=self.max_kept,
                max_blocks=table.shape[1],
                adapts=self.config.top_p is not None,
            )
            # More rows than a graph has are no graph's: they get buffers of their own.
            if self.buffers is None or not self._captured:
                self.buffers = held
        buffers = held
        dense = last = prompts = None
        dense_prompts = Phase.PREFILL in self.method.dense_phases
        if self.phase is not Phase.DRAFT and (
            dense_prompts or self.method.prompts_as_rows
        ):
            flags = prefilling(common, self)
            dense = rows_of_prompts(flags, num_decodes, self.device)
        seq_lens = common.seq_lens[:num_rows]
        # Fixed for an engine: graphs of one batch size must not differ in it.
        if self.reorder_batch_threshold > 1 or num_rows != num_decodes:
            request, seq_lens, last = _rows_of_requests(common, num_decodes, num_rows)
            if dense is not None:
                dense = dense[request]
            # Copied, as graphs read the same addresses at every step.
            buffers.seq_lens[:num_rows] = seq_lens
            seq_lens = buffers.seq_lens[:num_rows]
            rows = buffers.block_table[:num_rows, : table.shape[1]]
            table = torch.index_select(table, 0, request, out=rows)
        slots = common.slot_mapping[:num_rows]
        if dense is not None and not dense_prompts:
            # They are no decode rows in the figures, however they are served.
            prompts, dense = dense, None
            new = common.query_start_loc_cpu.diff()[: len(flags)][flags].sum()
            recorder.add_rows(self.counter.layers, prefill=int(new))
            slots = slots.masked_fill(prompts, -1)
        budgets = buffers.budgets[:num_rows]
        torch.index_select(self.budget_tables[phase], 0, seq_lens, out=budgets)
        if dense is not None:
            # A prompt's last token is prefill even when it comes alone, or a
            # prefix-cache hit would change the first answer token.
            budgets.masked_fill_(dense, -1)
        self.counter.add(seq_lens, budgets, slots, dense, last)
        kept = self.kept.by_layer
        rows = list(buffers.rows(table[:num_rows], seq_lens, budgets, kept))
        first = 0
        for part in rows:
            part.states = recorder.states
            if prompts is not None:
                part.prompts = prompts[first : first + part.num_rows]
            first += part.num_rows
        return rows

    def _report_padding(self) -> None:
        spec = self.kv_cache_spec
        if spec.page_size_bytes > spec.unpadded_page_size_bytes:
            logger.warning_once(
                "Blocks of %d bytes are padded to %d, as other layers of this model "
                "have larger ones: the KV cache holds no more tokens for being small.",
                spec.unpadded_page_size_bytes,
                spec.page_size_bytes,
            )


def most_kept(budgets: Mapping[Phase, torch.Tensor]) -> int:
    """Tokens of the longest list."""
    return max(1, *(int(table.max()) for table in budgets.values()))


def _rows_of_requests(
    common: CommonAttentionMetadata, num_decodes: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every decode token its request and context length, [num_rows] int32, and
    whether it is the request's last, [num_rows] bool.

    A token sees the context up to itself; padding tokens see none.
    """
    ends = common.query_start_loc[1 : num_decodes + 1]
    row = torch.arange(num_rows, dtype=torch.int32, device=ends.device)
    request = torch.searchsorted(ends, row, right=True, out_int32=True)
    padding = request >= num_decodes
    request = request.clamp_(max=num_decodes - 1)
    after = ends[request] - 1 - row
    seq_lens = (common.seq_lens[request] - after).masked_fill_(padding, 0)
    return request, seq_lens, (after == 0) & ~padding

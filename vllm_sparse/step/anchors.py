# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Once per step, for layers whose old lines leave anchors: which of the new tokens are
anchors, where these are stored, and what every position attends to.

Lines and anchors have blocks of their own, and vLLM prepares one kind after the other,
in any order: what needs both is done when the second comes.
"""

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..cache.layout import BLOCK_SIZE
from ..methods import DecodeRows, Phase
from ..methods.base import Lines
from ..plugin.token_ids import token_ids
from ..stats.recorder import recorder
from .builder import SparseMetadataBuilder
from .lines import NewTokens, lists, mark, slots
from .metadata import SparseMetadata


class AnchorStep:
    """A step's two halves, of which either may come first."""

    def __init__(self) -> None:
        self.table = self.lines = None

    def give_anchors(self, table: torch.Tensor) -> None:
        """
        Args:
            table: [num_reqs, max_blocks] int32 blocks of anchors.
        """
        if self.table is not None:
            raise RuntimeError("vLLM prepares anchors of two steps at a time")
        self.table = table
        self._complete()

    def give_lines(self, complete) -> None:
        """
        Args:
            complete: called with the blocks of anchors.
        """
        if self.lines is not None:
            raise RuntimeError("vLLM prepares lines of two steps at a time")
        self.lines = complete
        self._complete()

    def _complete(self) -> None:
        if self.table is not None and self.lines is not None:
            table, complete, self.table, self.lines = self.table, self.lines, None, None
            complete(table)


class AnchorMetadataBuilder(SparseMetadataBuilder):
    """Builds the metadata of lines' layers."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # What CUDA graphs read, at fixed addresses; made by the first step.
        self.fixed: dict[str, torch.Tensor] = {}
        layers = vllm_config.compilation_config.static_forward_context
        self.layer = layers[layer_names[0]]
        self.arena = layers[layer_names[0] + ".anchors"]
        self.ends: torch.Tensor | None = None

    def _build(self, common: CommonAttentionMetadata, phase: Phase) -> SparseMetadata:
        self.require_causal(common)
        n = common.num_actual_tokens
        metadata = SparseMetadata(
            phase=phase,
            num_actual_tokens=n,
            slot_mapping=common.slot_mapping[:n],
            block_table=common.block_table_tensor[: common.num_reqs],
            seq_lens=common.seq_lens[: common.num_reqs],
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            decode=[],
            together=None,
            prefill=[],
        )
        ids = token_ids()[:n]
        self.arena.step.give_lines(
            lambda table: self._complete(metadata, common, ids, table)
        )
        return metadata

    def _complete(self, metadata, common, ids, table: torch.Tensor) -> None:
        n = metadata.num_actual_tokens
        new = NewTokens.of(metadata.query_start_loc, metadata.seq_lens, n)
        marks = self._marks()
        stored = (metadata.slot_mapping >= 0) & (new.place >= 0)
        found = mark(self._ends(ids), new, stored, marks, table)
        block, place = slots(table, new.request, new.place)
        slot = block * BLOCK_SIZE + place
        metadata.anchor_slots = torch.where(found & stored, slot, -1)
        in_graphs = self.device.type == "cuda" and n <= self.max_rows
        longest = common.max_seq_len
        if in_graphs:
            longest = self.vllm_config.model_config.max_model_len
        look_back = self.arena.rules.anchors_look_back
        lines = lists(new, found, table, metadata.block_table, longest, look_back)
        counts = self._count(common, new, lines.counts, metadata.slot_mapping)
        if in_graphs:
            fixed = self._fixed(vars(lines) | {"slots": metadata.anchor_slots})
            metadata.anchor_slots = fixed.pop("slots")
            lines, counts = Lines(**fixed), self._fixed({"kept": counts})["kept"]
        metadata.decode.append(
            DecodeRows(
                block_table=lines.block_table,
                seq_lens=lines.seq_lens,
                budgets=counts[:, 0],
                indices=lines.indices,
                counts=counts,
                kept_mass=lines.seq_lens.new_empty(0),
                lines=lines,
                kept_histograms=self.kept.by_layer,
            )
        )

    def _fixed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of a step's tensors where graphs read them."""
        copies = {}
        for name, tensor in tensors.items():
            if name not in self.fixed:
                size = (self.max_rows, *tensor.shape[1:])
                self.fixed[name] = tensor.new_zeros(size)
            copies[name] = self.fixed[name][: len(tensor)].copy_(tensor)
        return copies

    def _count(self, common, new: NewTokens, counts, slot_mapping) -> torch.Tensor:
        """Count the step's rows; lengths of those lists that count, else -1."""
        flags = common.is_prefilling
        slot = slot_mapping
        if flags is not None and flags.any():
            sizes = common.query_start_loc_cpu.diff()[: len(flags)]
            tokens = int((sizes * flags).sum())
            recorder.add_rows(self.counter.layers, prefill=tokens)
            prompts = flags.to(slot.device)[new.request.clamp(max=len(flags) - 1)]
            prompts &= new.place >= 0
            slot = slot.masked_fill(prompts, -1)
            counts = counts.masked_fill(prompts, -1)
        lens = (new.place + 1).int()
        last = new.place + 1 == common.seq_lens[new.request]
        self.counter.add(lens, counts.clamp(min=0), slot, last=last)
        return counts[:, None].expand(-1, self.num_kv_heads).contiguous()

    def _marks(self) -> torch.Tensor:
        """[num_blocks, BLOCK_SIZE] uint8, behind the rows of the first layer's first KV
        head: one for all, as all layers leave the same tokens."""
        cache, arena = self.layer.kv_cache, self.arena.kv_cache
        if cache.data_ptr() != arena.data_ptr() or cache.shape != arena.shape:
            raise RuntimeError(
                "vLLM lays out the blocks of lines and of anchors apart; leave "
                "--attention-backend out"
            )
        first = 2 * BLOCK_SIZE * self.shape.head_size
        chunk = cache[:, 0].flatten(1)
        size = BLOCK_SIZE // cache.element_size()
        return chunk[:, first : first + size].view(torch.uint8)

    def _ends(self, ids: torch.Tensor) -> torch.Tensor:
        if self.ends is None:
            size = self.vllm_config.model_config.get_vocab_size()
            ends = torch.zeros(size + 1, dtype=torch.bool)
            ends[list(self.arena.rules.line_ends)] = True
            self.ends = ends.to(self.device)
        # Placeholders lie outside the vocabulary: they end no line.
        size = len(self.ends) - 1
        ids = ids.long()
        return self.ends[torch.where((ids >= 0) & (ids < size), ids, size)]

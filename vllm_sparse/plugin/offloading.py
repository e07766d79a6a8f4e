# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""vLLM's ``OffloadingConnector`` for our blocks, and its copies on a CPU.

vLLM offloads whole pages of full blocks: rows or codes, and the sidecar. connectors.py
names these classes where vLLM's configuration has a place for that.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
    OffloadingConnector as VllmOffloadingConnector,
)
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from ..config import SparseConfigError
from .connectors import BLOCKS_KEY
from .mode import BlockMode


class OffloadingConnector(VllmOffloadingConnector):
    """Loads blocks of which every token is computed already."""

    def __init__(self, vllm_config, role, kv_cache_config) -> None:
        groups = kv_cache_config.kv_cache_groups
        specs = [group.kv_cache_spec for group in groups]
        modes = [getattr(spec, "kv_quant_mode", None) for spec in specs]
        if modes != [BlockMode.SPARSE]:
            kinds = ", ".join(type(spec).__name__ for spec in specs)
            raise SparseConfigError(
                "offloading serves models all of whose layers keep their cache in "
                f"blocks of ours, this one has {kinds}: leave --kv-offloading-size or "
                "--kv-transfer-config out"
            )
        self._block_size = specs[0].block_size
        super().__init__(vllm_config, role, kv_cache_config)

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int):
        """vLLM's answer, without the block that holds the request's last token.

        vLLM would load that one, too, and compute its last token once more. Storing
        seals a full block, from rows that a loaded one of a quantised format no longer
        has. The prefix cache of vLLM leaves that block out likewise.
        """
        found, later = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if not found:
            return found, later
        size = self._block_size
        most = (request.num_tokens - 1) // size * size - num_computed_tokens
        found = max(0, min(found, most))
        return found, later and found > 0


class HostOffloadingSpec(CPUOffloadingSpec):
    """vLLM's, whose worker refuses CPUs, with copies within host memory."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            per_chunk = self.blocks_per_chunk
            sizes = [per_chunk * part.page_size_bytes for part in kv_caches.tensors]
            # Takes no memory before it is written.
            host = [
                torch.empty((self.num_chunks, size), dtype=torch.int8) for size in sizes
            ]
            self._worker = HostOffloadingWorker(kv_caches, host, per_chunk)
        return self._worker


class HostTieringSpec(TieringOffloadingSpec):
    """vLLM's host memory before files, with copies within host memory."""

    def __init__(self, config: OffloadingConfig) -> None:
        # Files are found by the fields of ``config``, which say nothing of our blocks.
        dtype = f"{config.model.dtype} {config.extra_config[BLOCKS_KEY]}"
        model = replace(config.model, dtype=dtype)
        super().__init__(replace(config, model=model))

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            host = [
                region.create_next_worker_view(
                    self.blocks_per_chunk * part.page_size_bytes
                )
                for part in kv_caches.tensors
            ]
            self._worker = HostOffloadingWorker(
                kv_caches, host, self.blocks_per_chunk, region
            )
        return self._worker


class HostOffloadingWorker(OffloadingWorker):
    """Copies pages at once: when a step begins, the step before has been computed.

    Args:
        kv_caches: per layer [num_blocks, page_size_bytes] int8.
        host: per layer [num_chunks, blocks_per_chunk * page_size_bytes] int8.
        blocks_per_chunk: blocks that are offloaded together.
        region: what ``host`` lies in, if others have it, too.
    """

    def __init__(
        self,
        kv_caches: CanonicalKVCaches,
        host: list[torch.Tensor],
        blocks_per_chunk: int,
        region: SharedOffloadRegion | None = None,
    ) -> None:
        self._blocks_per_chunk = blocks_per_chunk
        self._groups = kv_caches.group_data_refs
        self._cache = [part.tensor for part in kv_caches.tensors]
        self._host = [part.unflatten(1, (blocks_per_chunk, -1)) for part in host]
        self._region = region
        self._finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: BlockIDsLoadStoreSpec
    ) -> bool:
        start, size = time.monotonic(), 0
        for ref, blocks, places in self._pages(src_spec, dst_spec):
            self._host[ref][places] = self._cache[ref][blocks]
            size += len(blocks) * self._cache[ref].shape[1]
        return self._done(job_id, size, start)

    def submit_load(
        self,
        job_id: int,
        src_spec: BlockIDsLoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,  # vLLM 0.33: there is no queue to pass
    ) -> bool:
        start, size = time.monotonic(), 0
        for ref, blocks, places in self._pages(dst_spec, src_spec):
            self._cache[ref][blocks] = self._host[ref][places]
            size += len(blocks) * self._cache[ref].shape[1]
        return self._done(job_id, size, start)

    def _pages(
        self, cached: GPULoadStoreSpec, offloaded: BlockIDsLoadStoreSpec
    ) -> Iterator[tuple[int, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
        """Index of a layer, blocks of its cache, and their chunks and places in these.

        A request's first and last chunks may be transferred in part: what counts is
        where a group's first block lies within the request.
        """
        per_chunk = self._blocks_per_chunk
        block, chunk = 0, 0
        groups = zip(
            self._groups, cached.group_sizes, cached.block_indices, strict=True
        )
        for refs, size, first in groups:
            if size == 0:
                continue
            skip = first % per_chunk
            count = cdiv(skip + size, per_chunk)
            wanted = torch.arange(skip, skip + size)
            chunks = torch.from_numpy(offloaded.block_ids[chunk : chunk + count]).long()
            places = chunks[wanted // per_chunk], wanted % per_chunk
            blocks = torch.from_numpy(cached.block_ids[block : block + size]).long()
            for ref in refs:
                yield ref.tensor_idx, blocks, places
            block, chunk = block + size, chunk + count

    def _done(self, job_id: int, size: int, start: float) -> bool:
        seconds = time.monotonic() - start
        self._finished.append(TransferResult(job_id, True, size, seconds))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""

    def shutdown(self) -> None:
        self._host = []
        if self._region is not None:
            self._region.cleanup()
            self._region = None

"""vLLM's OffloadingConnector on a CPU, with its host tier alone or with tiers behind it.

Replaces the worker that copies between the device and host memory on CUDA streams by one thread and
:func:`~peers.adapters.batch_copy.batch_copy`. Where copies go, when they are begun
and when they count as done is the connector's own work. It favours the connector: loads and saves
have a thread each, so that a load never waits for a save.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.gpu_worker import compute_sub_block_ptrs
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from peers.adapters.batch_copy import Addresses, batch_copy

_JOIN_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class _Copies:
    sources: Addresses
    targets: Addresses
    sizes: Addresses


@dataclass(frozen=True, slots=True)
class _Direction:
    """What is copied from where, one way.

    Attributes:
        sources: a tensor of chunks or blocks for each of the engine's.
        targets: as ``sources``.
        source_blocks: blocks in one chunk of a source.
        target_blocks: and of a target.
        groups: for each KV cache group, the tensors that it is in.
        load: whether it leads into the engine.
    """

    sources: list[torch.Tensor]
    targets: list[torch.Tensor]
    source_blocks: int
    target_blocks: int
    groups: Sequence[Sequence[CanonicalKVCacheRef]]
    load: bool

    def copies(self, source: LoadStoreSpec, target: LoadStoreSpec) -> _Copies:
        """The addresses of a transfer."""
        device = target if self.load else source
        if not isinstance(device, GPULoadStoreSpec):
            raise TypeError(f"{device!r} names no blocks of the engine")
        parts: list[tuple[Addresses, Addresses, Addresses]] = []
        source_at = target_at = 0
        counts = zip(device.group_sizes, device.block_indices, self.groups, strict=True)
        for count, first, tensors in counts:
            if not count:
                continue
            source_skip, target_skip = first % self.source_blocks, first % self.target_blocks
            source_end = source_at + cdiv(count + source_skip, self.source_blocks)
            target_end = target_at + cdiv(count + target_skip, self.target_blocks)
            for each in tensors:
                reads, writes = np.empty(count, np.uint64), np.empty(count, np.uint64)
                compute_sub_block_ptrs(
                    source.block_ids[source_at:source_end],
                    self.source_blocks,
                    reads,
                    self.sources[each.tensor_idx],
                    skip_count=source_skip,
                )
                compute_sub_block_ptrs(
                    target.block_ids[target_at:target_end],
                    self.target_blocks,
                    writes,
                    self.targets[each.tensor_idx],
                    skip_count=target_skip,
                )
                sizes = np.full(count, each.page_size_bytes, np.uint64)
                parts.append((reads, writes, sizes))
            source_at, target_at = source_end, target_end
        return _Copies(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class _Copier:
    """One thread that copies one transfer after the other."""

    def __init__(self, direction: _Direction) -> None:
        self._direction = direction
        self._jobs: queue.SimpleQueue[tuple[int, _Copies] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        self._ended: dict[int, threading.Event] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, job: int, source: LoadStoreSpec, target: LoadStoreSpec) -> bool:
        self._ended[job] = threading.Event()
        self._jobs.put((job, self._direction.copies(source, target)))
        return True

    def finished(self) -> list[TransferResult]:
        results = []
        while not self._results.empty():
            result = self._results.get()
            del self._ended[result.job_id]
            results.append(result)
        return results

    def wait(self, jobs: Collection[int]) -> None:
        for job in jobs:
            if (ended := self._ended.get(job)) is not None:
                ended.wait()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(_JOIN_TIMEOUT)
        self._direction.sources.clear()
        self._direction.targets.clear()

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, copies = item
            began = time.perf_counter()
            size = batch_copy(
                copies.sources, copies.targets, copies.sizes, load=self._direction.load
            )
            seconds = time.perf_counter() - began
            ended = self._ended[job]
            self._results.put(
                TransferResult(job_id=job, success=True, transfer_size=size, transfer_time=seconds)
            )
            ended.set()


class MemoryWorker(OffloadingWorker):
    """Copies between the engine's cache and host memory.

    Args:
        caches: the engine's.
        blocks_per_chunk: blocks in one chunk of host memory.
        chunks: how many chunks there are.
        region: memory that tiers behind can read; None to have its own.
    """

    def __init__(
        self,
        caches: CanonicalKVCaches,
        blocks_per_chunk: int,
        chunks: int,
        region: SharedOffloadRegion | None,
    ) -> None:
        engine: list[torch.Tensor] = []
        host: list[torch.Tensor] = []
        for each in caches.tensors:
            page = each.page_size_bytes
            engine.append(each.tensor.view(torch.int8).view(-1, page))
            size = page * blocks_per_chunk
            host.append(
                torch.zeros((chunks, size), dtype=torch.int8)
                if region is None
                else region.create_next_worker_view(size)
            )
        groups = caches.group_data_refs
        self._region = region
        self._stores = _Copier(
            _Direction([*engine], [*host], 1, blocks_per_chunk, groups, load=False)
        )
        self._loads = _Copier(_Direction(host, engine, blocks_per_chunk, 1, groups, load=True))

    def submit_store(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Begin to save."""
        return self._stores.submit(job_id, src_spec, dst_spec)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Begin to load."""
        return self._loads.submit(job_id, src_spec, dst_spec)

    def get_finished(self) -> list[TransferResult]:
        """What has ended since the last call."""
        return self._stores.finished() + self._loads.finished()

    def wait(self, job_ids: Collection[int]) -> None:
        """Return when these have ended."""
        self._stores.wait(job_ids)
        self._loads.wait(job_ids)

    def shutdown(self) -> None:
        """End both threads, and give the memory back."""
        self._stores.close()
        self._loads.close()
        if self._region is not None:
            self._region.cleanup()
            self._region = None


class HostSpec(CPUOffloadingSpec):
    """The host tier."""

    _worker: OffloadingWorker | None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """See the class it derives from."""
        if not self._worker:
            self._worker = MemoryWorker(kv_caches, self.blocks_per_chunk, self.num_chunks, None)
        return self._worker


class HostTieringSpec(TieringOffloadingSpec):
    """The host tier, and tiers behind it."""

    _worker: OffloadingWorker | None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """See the class it derives from."""
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=0 if self.replicated_layout else self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = MemoryWorker(kv_caches, self.blocks_per_chunk, self.num_chunks, region)
        return self._worker

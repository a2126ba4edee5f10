"""The fetch pipeline: chunks from disk to the host tier, one after another, behind every load.

One thread fetches, and waits before each chunk until nothing is loaded from the disk, for a while:
a load has one chunk beside it at most, and a disk that is never idle keeps nobody waiting for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch

from lamina.data.movers.base import Mover
from lamina.data.threads import Threads
from lamina.data.tiers.disk_shard import ShardReader
from lamina.data.tiers.host import HostTier
from lamina.data.worker_pool import WorkerPool
from lamina.geometry import CacheGeometry, align_up
from lamina.observe.timeline import Lane, Timeline
from lamina.plan import FetchOrder, Outcome, TransferReceipt

GIVE_WAY = 1.0
"""Seconds for which loads from the disk go before each chunk."""


class DiskFetcher:
    """See the module.

    Args:
        disk: where chunks come from.
        host: where they go; control has reserved their slots.
        mover: gives memory to read into.
        geometry: the engine's cache.
        loads: the threads that load from the disk, which go first.
        report: called with the receipt of each fetch, from a thread.
        threads: how its thread begins.
        timeline: where spans go.
    """

    def __init__(
        self,
        disk: ShardReader,
        host: HostTier,
        mover: Mover,
        geometry: CacheGeometry,
        loads: WorkerPool,
        report: Callable[[Iterable[TransferReceipt]], None],
        threads: Threads | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._disk = disk
        self._host = host
        self._mover = mover
        self._extent_bytes = geometry.extent_bytes
        self._chunk_bytes = geometry.chunk_bytes
        self._loads = loads
        self._pool = WorkerPool("fetch", 1, threads)
        self._report = report
        self._timeline = timeline
        self._closing = False
        self._staging: torch.Tensor | None = None

    def fetch(self, orders: Iterable[FetchOrder], step: int) -> None:
        """Queue chunks, behind those that are queued."""
        for order in orders:
            self._pool.submit(
                (0, 0), partial(self._carry_out, order, step), partial(self._lost, order)
            )

    def close(self, timeout: float) -> bool:
        """Fetch no further chunk; False if the one under way took longer than ``timeout``
        seconds."""
        self._closing = True
        return self._pool.close(timeout)

    def _carry_out(self, order: FetchOrder, step: int) -> None:
        if self._closing:
            return  # with the engine, and with whoever waits for a receipt
        self._loads.await_idle(GIVE_WAY)
        began = time.perf_counter()
        reason, damaged = self._copy(order)
        receipt = TransferReceipt(
            order.transfer,
            Outcome.FAILED if reason else Outcome.DONE,
            moved_bytes=0 if reason else self._chunk_bytes,
            seconds=time.perf_counter() - began,
            bad_chunks=(order.key,) if damaged else (),
            reason=reason,
        )
        if self._timeline is not None:
            self._timeline.add(Lane.FETCH, step, -1, began, self._chunk_bytes)
        self._report([receipt])

    def _lost(self, order: FetchOrder, error: BaseException) -> None:
        reason = type(error).__name__
        self._report([TransferReceipt(order.transfer, Outcome.FAILED, reason=reason)])

    def _copy(self, order: FetchOrder) -> tuple[str, bool]:
        """Why a chunk was not copied, empty if it was, and whether it never can be."""
        if self._staging is None:
            self._staging = self._mover.allocate_host(align_up(max(self._extent_bytes)))
        self._mover.await_host()
        for row, extent in enumerate(self._extent_bytes):
            into = self._staging[:extent].numpy().reshape(1, extent)
            read = self._disk.read_row(row, [order.disk_slot], [order.key], into)
            if read.failure is not None:
                return f"disk_{read.failure}", bool(read.damaged.any())
            self._host.extent(row, order.host_slot)[:] = into[0]
        self._disk.note_used([order.disk_slot])
        return "", False

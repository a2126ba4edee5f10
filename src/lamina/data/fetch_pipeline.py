"""The fetch pipeline: chunks from disk to the host tier, one after another, behind every load.

Of the disk's threads at most one fetches, and before each chunk whatever loads wait for goes first,
so that a load is held up by one chunk at most.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

import torch

from lamina.data.movers.base import Mover
from lamina.data.tiers.disk_shard import ShardReader
from lamina.data.tiers.host import HostTier
from lamina.data.worker_pool import WorkerPool
from lamina.geometry import CacheGeometry, align_up
from lamina.observe.timeline import Lane, Timeline
from lamina.plan import FetchOrder, Outcome, TransferReceipt

FETCH_URGENCY = 2.0
"""Behind loads in the step and loads between steps."""


class DiskFetcher:
    """See the module.

    Args:
        disk: where chunks come from.
        host: where they go; control has reserved their slots.
        mover: gives memory to read into.
        geometry: the engine's cache.
        pool: the threads that load from the disk.
        report: called with the receipt of each fetch, from one of them.
        timeline: where spans go.
    """

    def __init__(
        self,
        disk: ShardReader,
        host: HostTier,
        mover: Mover,
        geometry: CacheGeometry,
        pool: WorkerPool,
        report: Callable[[Iterable[TransferReceipt]], None],
        timeline: Timeline | None = None,
    ) -> None:
        self._disk = disk
        self._host = host
        self._mover = mover
        self._extent_bytes = geometry.extent_bytes
        self._chunk_bytes = geometry.chunk_bytes
        self._pool = pool
        self._report = report
        self._timeline = timeline
        self._queue: deque[tuple[FetchOrder, int]] = deque()
        self._queued = threading.Lock()
        self._busy = False
        self._staging: torch.Tensor | None = None

    def fetch(self, orders: Iterable[FetchOrder], step: int) -> None:
        """Queue chunks, behind those that are queued."""
        with self._queued:
            self._queue.extend((order, step) for order in orders)
            idle = not self._busy and bool(self._queue)
            self._busy |= idle
        if idle:
            self._submit()

    def _submit(self) -> None:
        self._pool.submit((FETCH_URGENCY, 0), self._next)

    def _next(self) -> None:
        order, step = self._queue.popleft()
        try:
            self._carry_out(order, step)
        finally:
            with self._queued:
                self._busy = bool(self._queue)
            if self._busy:
                self._submit()

    def _carry_out(self, order: FetchOrder, step: int) -> None:
        began = time.perf_counter()
        reason, damaged = "", False
        try:
            reason, damaged = self._copy(order)
        except Exception as error:
            reason = type(error).__name__
            raise
        finally:
            receipt = TransferReceipt(
                order.transfer,
                Outcome.FAILED if reason else Outcome.DONE,
                moved_bytes=0 if reason else self._chunk_bytes,
                seconds=time.perf_counter() - began,
                bad_chunks=(order.key,) if damaged else (),
                reason=reason,
            )
            self._report([receipt])
            if self._timeline is not None:
                self._timeline.add(Lane.FETCH, step, -1, began, self._chunk_bytes)

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

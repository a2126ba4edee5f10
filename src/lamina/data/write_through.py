"""Write-through: chunks go from their host slots to disk in the background."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from lamina.data.threads import Threads
from lamina.data.tiers.disk import DiskTier
from lamina.data.tiers.disk_lock import StoreLost
from lamina.data.tiers.host import HostTier
from lamina.data.worker_pool import WorkerPool
from lamina.observe.timeline import Lane, Timeline
from lamina.plan import Outcome, TransferReceipt, WriteThrough

log = logging.getLogger("lamina.data")


GIVE_WAY = 0.02
"""Seconds for which loads from the disk go before each row that is written to it."""


class DiskWriter:
    """The one thread that changes a disk tier, so that forgetting, writing and committing a slot
    always happen in the order in which control planned them.

    Args:
        disk: the tier.
        host: where the bytes come from; control holds the slots leased until the receipt.
        report: called with the receipts of a batch.
        loads: the threads that load from the disk, which go first.
        threads: how its thread begins.
        timeline: where spans go.
    """

    def __init__(
        self,
        disk: DiskTier,
        host: HostTier,
        report: Callable[[Iterable[TransferReceipt]], None],
        *,
        loads: WorkerPool,
        rows: int,
        chunk_bytes: int,
        threads: Threads | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._disk = disk
        self._host = host
        self._report = report
        self._loads = loads
        self._rows = rows
        self._chunk_bytes = chunk_bytes
        self._timeline = timeline
        self._pool = WorkerPool("write", 1, threads)
        self._complained: set[str] = set()

    def drop(self, slots: Sequence[int]) -> None:
        """Forget slots, after what was queued before."""
        # A thread that cannot write any more must forget all the same: what is in these slots may
        # be damaged, and would be found after a restart.
        self._pool.submit((0, 0), lambda: self._drop(slots), lambda error: self._drop(slots))

    def write(self, orders: Sequence[WriteThrough], step: int) -> None:
        """Write a batch, after what was queued before."""
        began = time.perf_counter()
        self._pool.submit(
            (0, 0),
            lambda: self._write(orders, step),
            lambda error: self._answer(orders, began, type(error).__name__),
        )

    def close(self, timeout: float) -> bool:
        """Write what is queued, then stop; False if that took longer than ``timeout`` seconds."""
        return self._pool.close(timeout)

    def _drop(self, slots: Sequence[int]) -> None:
        try:
            self._disk.drop(slots)
        except Exception as error:
            reason = str((isinstance(error, OSError) and error.strerror) or error)
            if reason not in self._complained:
                self._complained.add(reason)
                log.warning("disk tier: %s", reason)

    def _write(self, orders: Sequence[WriteThrough], step: int) -> None:
        began = time.perf_counter()
        reason = ""
        try:
            slots = [order.disk_slot for order in orders]
            self._disk.begin(slots)
            for row in range(self._rows):
                self._loads.await_idle(GIVE_WAY)
                extents = [self._host.extent(row, order.host_slot) for order in orders]
                self._disk.write_row(row, slots, extents)
            self._disk.commit([(order.disk_slot, order.key) for order in orders])
        except Exception as error:
            reason = type(error).__name__
            # That the store is lost was said by the tier.
            if reason not in self._complained and not isinstance(error, StoreLost):
                self._complained.add(reason)
                log.warning("cannot write to the disk tier, loads go on without it: %s", error)
        if self._timeline is not None:
            size = len(orders) * self._chunk_bytes
            self._timeline.add(Lane.WRITE, step, -1, began, size)
        self._answer(orders, began, reason)

    def _answer(self, orders: Sequence[WriteThrough], began: float, reason: str) -> None:
        seconds = time.perf_counter() - began
        self._report(
            TransferReceipt(
                order.transfer,
                Outcome.FAILED if reason else Outcome.DONE,
                moved_bytes=0 if reason else self._chunk_bytes,
                seconds=seconds,
                reason=reason,
            )
            for order in orders
        )

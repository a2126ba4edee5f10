"""The save pipeline: a row is copied out once its last layer has written it.

Nothing in the forward path waits: the hook records a fence and queues a job. A row whose hook
did not fire is swept at the end of the step. What the forward overwrites is read before it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from lamina.data.movers.base import Fence, Indices, Mover, pages_of
from lamina.data.tiers.host import HostTier
from lamina.data.worker_pool import Job, WorkerPool
from lamina.geometry import CacheGeometry, Row
from lamina.observe.timeline import Lane, Timeline
from lamina.plan import Outcome, SaveOrder, TransferReceipt

log = logging.getLogger("lamina.data")


class SaveRun:
    """The saves of one step.

    Args:
        orders: what to save.
        geometry: the engine's cache.
        host: where to.
        mover: copies pages out of the engine.
        pool: the thread that copies.
        report: called with the receipts, once every row has been copied and :meth:`sweep` has
            said that the step is over: before that a load of the step could still fail.
        follows: whether another rank copies the same bytes, so that this one only answers.
        step: for the timeline.
        timeline: where spans go.
    """

    def __init__(
        self,
        orders: Sequence[SaveOrder],
        geometry: CacheGeometry,
        host: HostTier,
        mover: Mover,
        pool: WorkerPool,
        report: Callable[[Iterable[TransferReceipt]], None],
        *,
        follows: bool = False,
        step: int = 0,
        timeline: Timeline | None = None,
    ) -> None:
        self._orders = tuple(orders)
        self._host = host
        self._mover = mover
        self._pool = pool
        self._report = report
        self._step = step
        self._timeline = timeline
        self._follows = follows
        self._rows = geometry.rows
        alike = {(row.groups, row.places): row for row in geometry.rows}
        self._copies = {key: _copies(orders, row, geometry) for key, row in alike.items()}
        self._began = time.perf_counter()
        self._unsubmitted = set() if follows else set(range(len(geometry.rows)))
        self._left = len(self._unsubmitted) + 1  # the rows, and the end of the step
        self._failure = ""
        self._lock = threading.Lock()

    def row_written(self, row: int) -> None:
        """The engine has submitted everything that writes ``row`` in this step."""
        if row in self._unsubmitted:
            self._unsubmitted.remove(row)
            fence = self._mover.fence_compute()
            self._submit(partial(self._copy, row, fence))

    def sweep(self) -> None:
        """The step is over: save the rows whose hook did not fire."""
        for row in sorted(self._unsubmitted):
            self.row_written(row)
        self._one_over()

    def read_before_forward(self) -> None:
        """What there is to save is complete and the step overwrites it: have the forward run after
        it is read. A device that orders its work by itself does not stall the caller."""
        after = self._mover.fence_compute()
        while self._unsubmitted:
            row = min(self._unsubmitted)
            self._unsubmitted.remove(row)
            began = time.perf_counter()
            read = self._read(row, after)
            if read is not None:
                self._mover.hold_compute(read)
            self._submit(partial(self._finish, row, read, began))
        self._one_over()

    def poison(self, reason: str) -> None:
        """What the step computed is not to be trusted: report every save as failed."""
        with self._lock:
            self._failure = self._failure or reason

    def _submit(self, job: Job) -> None:
        self._pool.submit((0, self._step), job, self._lost)

    def _lost(self, error: BaseException) -> None:
        """A row is not saved."""
        self.poison(type(error).__name__)
        self._one_over()

    def _copy(self, row: int, after: Fence) -> None:
        began = time.perf_counter()
        self._finish(row, self._read(row, after), began)

    def _read(self, row: int, after: Fence) -> Fence | None:
        """Copy a row; None if there is nothing to wait for."""
        blocks, pages = self._copies_of(row)
        if not len(blocks) or self._failure:
            return None
        try:
            return self._mover.save(row, blocks, self._host.pages(row), pages, after)
        except Exception as error:
            log.exception("row %d could not be saved", row)
            self.poison(type(error).__name__)
            return None

    def _copies_of(self, row: int) -> tuple[Indices, Indices]:
        shape = self._rows[row]
        return self._copies[shape.groups, shape.places]

    def _finish(self, row: int, read: Fence | None, began: float) -> None:
        if read is not None:
            read.wait()
        if self._timeline is not None:
            size = len(self._copies_of(row)[0]) * self._rows[row].page_bytes
            self._timeline.add(Lane.SAVE, self._step, row, began, size)
        self._one_over()

    def _one_over(self) -> None:
        with self._lock:
            self._left -= 1
            over = self._left == 0
        if over:
            self._report(self._receipts())

    def _receipts(self) -> list[TransferReceipt]:
        outcome = Outcome.FAILED if self._failure else Outcome.DONE
        seconds = time.perf_counter() - self._began
        return [
            TransferReceipt(
                order.transfer,
                outcome,
                moved_bytes=self._moved_bytes(order),
                seconds=seconds,
                reason=self._failure,
            )
            for order in self._orders
        ]

    def _moved_bytes(self, order: SaveOrder) -> int:
        if self._failure or self._follows:
            return 0
        pages = sum(row.page_bytes for row in self._rows if order.group in row.groups)
        return len(order.blocks) * pages


def _copies(
    orders: Sequence[SaveOrder], row: Row, geometry: CacheGeometry
) -> tuple[Indices, Indices]:
    """The engine's pages in ``row`` and the host's, of the orders that have something there."""
    blocks: list[Indices] = []
    pages: list[int] = []
    for group in row.groups:
        theirs: list[int] = []
        for order in orders:
            if order.group == group:
                first = order.slot * geometry.blocks_per_chunk
                theirs += order.blocks
                pages += range(first, first + len(order.blocks))
        blocks.append(pages_of(row, group, np.array(theirs, np.int64)))
    return np.concatenate(blocks), np.array(pages, np.int64)

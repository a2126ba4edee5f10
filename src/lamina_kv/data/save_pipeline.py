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

from lamina_kv.data.copier import Copier
from lamina_kv.data.movers.base import Fence, Pairs, pages_of
from lamina_kv.data.near import Indices
from lamina_kv.data.worker_pool import Job
from lamina_kv.geometry import Place, Row
from lamina_kv.observe.timeline import Lane
from lamina_kv.plan import Outcome, SaveOrder, TransferReceipt

log = logging.getLogger("lamina_kv.data")

Cut = tuple[tuple[int, ...], tuple[Place, ...]]
"""Groups and places of rows, which are the same for many."""


class SaveRun:
    """The saves of one step.

    Args:
        orders: what to save.
        copier: makes the copies.
        report: called with the receipts, once every row has been copied and :meth:`sweep` has
            said that the step is over: before that a load of the step could still fail.
        follows: whether another rank copies the same bytes, so that this one only answers.
        step: for the timeline.
    """

    def __init__(
        self,
        orders: Sequence[SaveOrder],
        copier: Copier,
        report: Callable[[Iterable[TransferReceipt]], None],
        *,
        follows: bool = False,
        step: int = 0,
    ) -> None:
        self._orders = tuple(orders)
        self._copier = copier
        self._report = report
        self._step = step
        self._follows = follows
        self._rows = copier.geometry.rows
        self._pairs: dict[Cut, Pairs] = {}
        self._began = time.perf_counter()
        self._unsubmitted = set() if follows else set(range(len(self._rows)))
        self._left = len(self._unsubmitted) + 1  # the rows, and the end of the step
        self._failure = ""
        self._lock = threading.Lock()

    def row_written(self, row: int) -> None:
        """The engine has submitted everything that writes ``row`` in this step."""
        if row in self._unsubmitted:
            self._unsubmitted.remove(row)
            fence = self._copier.mover.fence_compute()
            self._submit(partial(self._copy, row, fence))

    def sweep(self) -> None:
        """The step is over: save the rows whose hook did not fire."""
        for row in sorted(self._unsubmitted):
            self.row_written(row)
        self._one_over()

    def read_before_forward(self) -> None:
        """What there is to save is complete and the step overwrites it: have the forward run after
        it is read. A device that orders its work by itself does not stall the caller."""
        after = self._copier.mover.fence_compute()
        while self._unsubmitted:
            row = min(self._unsubmitted)
            self._unsubmitted.remove(row)
            began = time.perf_counter()
            read = self._read(row, after)
            if read is not None:
                self._copier.mover.hold_compute(read)
            self._submit(partial(self._finish, row, read, began))
        self._one_over()

    def poison(self, reason: str) -> None:
        """What the step computed is not to be trusted: report every save as failed."""
        with self._lock:
            self._failure = self._failure or reason

    def _submit(self, job: Job) -> None:
        self._copier.pool.submit((0, self._step), job, self._lost)

    def _lost(self, error: BaseException) -> None:
        """A row is not saved."""
        self.poison(type(error).__name__)
        self._one_over()

    def _copy(self, row: int, after: Fence) -> None:
        began = time.perf_counter()
        self._finish(row, self._read(row, after), began)

    def _read(self, row: int, after: Fence) -> Fence | None:
        """Copy a row; None if there is nothing to wait for."""
        if self._failure:
            return None
        try:
            pairs = self._pairs_of(row)
            return self._copier.mover.save([row], pairs, after) if len(pairs.pages) else None
        except Exception as error:
            log.exception("row %d could not be saved", row)
            self.poison(type(error).__name__)
            return None

    def _pairs_of(self, row: int) -> Pairs:
        """The pages in a row, checked and uploaded once for all rows that are cut alike."""
        shape = self._rows[row]
        cut = (shape.groups, shape.places)
        if (pairs := self._pairs.get(cut)) is None:
            pages, near = _copies(self._orders, shape, self._copier.geometry.blocks_per_chunk)
            pairs = self._copier.mover.pairs(self._copier.near, near, pages)
            self._pairs[cut] = pairs
        return pairs

    def _finish(self, row: int, read: Fence | None, began: float) -> None:
        if read is not None:
            read.wait()
        if (timeline := self._copier.timeline) is not None:
            pairs = self._pairs.get((self._rows[row].groups, self._rows[row].places))
            size = len(pairs.pages) * self._rows[row].page_bytes if pairs is not None else 0
            timeline.add(Lane.SAVE, self._step, row, began, size)
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


def _copies(orders: Sequence[SaveOrder], row: Row, per_slot: int) -> tuple[Indices, Indices]:
    """The engine's pages in ``row`` and the near ones, of the orders that have something there."""
    pages: list[Indices] = []
    near: list[Indices] = []
    for group in row.groups:
        theirs = [order for order in orders if order.group == group]
        if theirs:
            blocks = np.concatenate([np.array(order.blocks, np.int64) for order in theirs])
            pages.append(pages_of(row, group, blocks))
            near += [order.slot * per_slot + np.arange(len(order.blocks)) for order in theirs]
    if not pages:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(pages), np.concatenate(near)

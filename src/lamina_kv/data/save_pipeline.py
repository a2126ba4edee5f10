"""The save pipeline: a step's chunks are copied out once the step has written them.

Nothing in the forward path waits. The saves of a decode step are a few pages of every row: they are
copied together when the step is over, by one job. The saves of a prefill are many bytes: a row is
copied once its last layer has written it, beside the layers that follow (see :data:`ROW_BYTES`),
and what no hook announced at the end of the step. What the forward overwrites is read before it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from lamina_kv.data.copier import Copier
from lamina_kv.data.movers.base import Pairs, pages_of
from lamina_kv.data.movers.fences import CopyFailed, Fence
from lamina_kv.data.near import Indices
from lamina_kv.data.worker_pool import Job, Lost
from lamina_kv.geometry import Row
from lamina_kv.observe.timeline import Lane
from lamina_kv.plan import Outcome, SaveOrder, TransferReceipt

log = logging.getLogger("lamina_kv.data")

ROW_BYTES = 4 << 20
"""Bytes of a row, on average, from which rows are saved one by one. A job of its own takes the
interpreter lock for some 80 µs on the host of a GPU (an estimate), in which a link of 50 GB/s
carries as much as this. Of smaller rows the launches would take longer than the copies."""

_NOTHING: Indices = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that was begun.

    Attributes:
        fence: passes when it has ended.
        rows: of what rows.
        pages: how many in each.
        began: when it was begun.
    """

    fence: Fence
    rows: tuple[int, ...]
    pages: int
    began: float


class SaveRun:
    """The saves of one step.

    Args:
        orders: what to save.
        copier: makes the copies. Its pool has one thread, so that jobs run in order.
        report: called with the receipts, once everything has been copied and :meth:`sweep` has
            said that the step is over: before that a load of the step could still fail.
        follows: whether another rank copies the same bytes, so that this one only answers.
        step: for the timeline.

    Attributes:
        by_rows: whether rows are saved one by one, as :meth:`row_written` announces them.
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
        self._geometry = copier.geometry
        self._began = time.perf_counter()
        count = len(self._geometry.rows)
        self.by_rows = not follows and sum(map(self._size, orders)) >= ROW_BYTES * count
        self._left = frozenset(() if follows else range(count))
        self._pairs: dict[int, Pairs] = {}
        self._copies: list[Copy] = []
        self._failure = ""
        self._lock = threading.Lock()

    def row_written(self, row: int) -> None:
        """The engine has submitted everything that writes ``row`` in this step."""
        if self.by_rows and row in self._left:
            rows = self._take(frozenset((row,)))
            self._submit(partial(self._copy, rows, self._copier.mover.fence_compute()), self._lost)

    def sweep(self) -> None:
        """The step is over: save the rows that nobody announced."""
        if self._follows:
            self._report(self._receipts())
            return
        rows = self._take(self._left)
        written = self._copier.mover.fence_compute() if rows else None
        self._submit(partial(self._finish, rows, written), self._give_up)

    def read_before_forward(self) -> None:
        """What there is to save is complete and the step overwrites it: have the forward run after
        it is read. A device that orders its work by itself does not stall the caller."""
        if rows := self._take(self._left):
            self._copy(rows, self._copier.mover.fence_compute(), urgent=True)
            if self._copies:
                self._copier.mover.hold_compute(self._copies[-1].fence)
        self.sweep()

    def poison(self, reason: str) -> None:
        """What the step computed is not to be trusted: report every save as failed."""
        with self._lock:
            self._failure = self._failure or reason

    def _take(self, rows: frozenset[int]) -> frozenset[int]:
        """Rows that are being saved from now on."""
        self._left -= rows
        return rows

    def _submit(self, job: Job, lost: Lost) -> None:
        self._copier.pool.submit((0, self._step), job, lost)

    def _lost(self, error: BaseException) -> None:
        """A row is not saved."""
        self.poison(type(error).__name__)

    def _give_up(self, error: BaseException) -> None:
        """Nothing more is saved. What was begun still reads the engine's blocks."""
        self._lost(error)
        with suppress(Exception):
            self._await_copies()
        self._report(self._receipts())

    def _finish(self, rows: Set[int], written: Fence | None) -> None:
        """Copy the rows that are left, and wait for all copies."""
        if written is not None:
            self._copy(rows, written)
        self._await_copies()
        self._report(self._receipts())

    def _await_copies(self) -> None:
        """Saves end in the order in which they were begun: the last one is waited for alone, unless
        somebody wants to know when each has ended."""
        wanted = self._copies[-1:] if self._copier.timeline is None else self._copies
        for copy in wanted:
            copy.fence.wait()
            self._note(copy)

    def _copy(self, rows: Set[int], written: Fence, *, urgent: bool = False) -> None:
        """Begin to copy rows, as few times as their blocks are cut differently."""
        try:
            for index, alike in enumerate(self._geometry.rows_alike):
                chosen = tuple(filter(rows.__contains__, alike))
                if not chosen or self._failure:
                    continue
                pairs = self._pairs_of(index)
                if len(pairs.pages):
                    self._begin(chosen, pairs, written, urgent=urgent)
        except Exception as error:
            log.exception("rows %s could not be saved", sorted(rows))
            cause = error.__cause__ if isinstance(error, CopyFailed) else error
            self.poison(type(cause).__name__)

    def _begin(self, rows: tuple[int, ...], pairs: Pairs, written: Fence, *, urgent: bool) -> None:
        began = time.perf_counter()
        try:
            fence = self._copier.mover.save(rows, pairs, written, urgent=urgent)
        except CopyFailed as error:  # what was launched is waited for, as if it were all
            self._copies.append(Copy(error.launched, rows, len(pairs.pages), began))
            raise
        self._copies.append(Copy(fence, rows, len(pairs.pages), began))
        if fence.passed():
            self._note(self._copies.pop())

    def _pairs_of(self, index: int) -> Pairs:
        """The pages in rows that are alike, checked and uploaded once."""
        if (pairs := self._pairs.get(index)) is None:
            row = self._geometry.rows[self._geometry.rows_alike[index][0]]
            pages, near = _pages(self._orders, row, self._geometry.blocks_per_chunk)
            pairs = self._copier.mover.pairs(self._copier.near, near, pages)
            self._pairs[index] = pairs
        return pairs

    def _note(self, copy: Copy) -> None:
        """A copy has ended."""
        if self._copier.timeline is not None:
            row = copy.rows[0] if len(copy.rows) == 1 else -1
            size = copy.pages * sum(self._geometry.rows[each].page_bytes for each in copy.rows)
            self._copier.timeline.add(Lane.SAVE, self._step, row, copy.began, size)

    def _receipts(self) -> list[TransferReceipt]:
        outcome = Outcome.FAILED if self._failure else Outcome.DONE
        seconds = time.perf_counter() - self._began
        nothing = bool(self._failure) or self._follows
        return [
            TransferReceipt(
                order.transfer,
                outcome,
                moved_bytes=0 if nothing else self._size(order),
                seconds=seconds,
                reason=self._failure,
            )
            for order in self._orders
        ]

    def _size(self, order: SaveOrder) -> int:
        return len(order.blocks) * self._geometry.block_bytes[order.group]


def _pages(orders: Sequence[SaveOrder], row: Row, per_slot: int) -> tuple[Indices, Indices]:
    """The engine's pages in ``row`` and the near ones, of the orders that have something there."""
    pages, near = [_NOTHING], [_NOTHING]
    for group in row.groups:
        if theirs := [order for order in orders if order.group == group]:
            counts = [len(order.blocks) for order in theirs]
            blocks = np.fromiter(chain.from_iterable(order.blocks for order in theirs), np.int64)
            pages.append(pages_of(row, group, blocks))
            firsts = np.array([order.slot * per_slot for order in theirs], np.int64)
            firsts -= np.cumsum([0, *counts[:-1]])  # blocks of the orders before
            near.append(np.repeat(firsts, counts) + np.arange(len(blocks)))
    return np.concatenate(pages), np.concatenate(near)

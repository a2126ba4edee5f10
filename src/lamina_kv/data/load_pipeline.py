"""The load pipeline: rows in order, a window of them in flight ahead of the one waited for.

::

    rows      0    1    2    3    4    5
    start   [====][====]                        load_ahead = 2: rows 0 and 1 are submitted
    wait 0        [====][====]                  row 0 has arrived; row 2 is submitted
    wait 1              [====][====]            row 1 has arrived; row 3 is submitted

A row of a load between steps has arrived when its fence has passed, so the window bounds what is
queued on a device. Such a load has a timeout, past which it is given up as a whole: rows that were
not launched are refused, and it is over when those that were have passed. Nobody waits for that.

An error of the device is the end of the load, with the error's name as its reason. What was
launched before it is waited for all the same, where the device still answers.

A load in the step is launched ahead of its layers, whose device waits for its fences. It cannot be
taken back: a copy that does not end stops the engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial

from lamina_kv.data.copier import Copier
from lamina_kv.data.load_times import LoadTimes
from lamina_kv.data.loads import Load, Piece
from lamina_kv.data.movers.base import Pairs, pages_of, place_of
from lamina_kv.data.movers.fences import CopyFailed, Fence
from lamina_kv.data.row_fences import RowFences
from lamina_kv.data.worker_pool import WorkerPool
from lamina_kv.geometry import Place, Row
from lamina_kv.observe.timeline import Lane, Timeline
from lamina_kv.plan import TransferReceipt

log = logging.getLogger("lamina_kv.data")

_IN_STEP, _BETWEEN_STEPS = 0.0, 1.0
"""Priorities of loads. The model waits for those in its step."""


class LoadStuck(RuntimeError):
    """A copy into the engine does not end, and nothing can be done without it: the engine has to
    stop."""


class LoadRun:
    """Some loads that run together, row by row.

    Args:
        loads: what to load.
        copier: makes the copies.
        window: rows in flight ahead of the one waited for.
        parked: whether the loads run between steps. Nobody waits for their rows then: a row that
            has arrived stands for one that was waited for.
        patience: seconds that one copy may take, once it has begun or while the model waits.
        waiter: its thread waits for a device.
        step: for the timeline.
        done: called once, from any thread, when every row has arrived or was given up; of a load
            in the step, when every row is launched.

    Attributes:
        loads: what to load.
        times: how long rows were on their way, and the model waited for them.
    """

    def __init__(
        self,
        loads: Sequence[Load],
        copier: Copier,
        *,
        window: int,
        parked: bool,
        patience: float,
        waiter: WorkerPool,
        step: int = 0,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self.loads = tuple(loads)
        self.times = LoadTimes()
        self._copier = copier
        self._shapes = copier.geometry.rows
        self._window = window
        self._parked = parked
        self._patience = patience
        self._waiter = waiter
        self._step = step
        self._done = done
        self._due = min(load.began + load.order.timeout for load in loads)
        self._after: Fence | None = None
        self._pairs: dict[tuple[Piece, Place | None], Pairs] = {}
        self._changed = threading.Condition()  # guards all that follows
        self._submitted = 0
        self._waited_rows: set[int] = set()
        self._left = [sum(load.pieces_of(row) for load in loads) for row in self._shapes]
        self._writing = 0
        self._given_up = ""
        self._refuses_since = 0.0
        self._is_over = False
        self._note_passed = partial(_note_passed, self.times, copier.timeline, step)
        self._fences = RowFences(self._note_passed, partial(_fail, self.loads))
        self._arrived = [threading.Event() for _ in self._shapes]
        self._missing = len(self._shapes)

    def start(self, after: Fence) -> None:
        """Submit the first rows of the window.

        Args:
            after: behind everything that may still use the engine blocks for something else.
        """
        self._after = after
        for _ in range(self._window):
            self._submit_next()

    @property
    def is_started(self) -> bool:
        """Whether :meth:`start` was called."""
        return self._after is not None

    def await_near(self) -> None:
        """Return when all near pages are fit for copies, however long that takes."""
        for load in self.loads:
            for piece in load.pieces:
                self._copier.mover.await_near(self._copier.near, piece.near)

    def wait(self, row: int) -> Fence | None:
        """Block until ``row`` has arrived or is launched, and submit one more row the first time.

        Returns:
            The fence that the engine's next work must come after; None when the row was waited for
            before, or nothing is loaded into it.

        Raises:
            LoadStuck: if it does not arrive.
        """
        if row in self._waited_rows:
            return None
        began, arrived = time.perf_counter(), self._arrived[row]
        while row >= self._submitted:
            self._submit_next()
        there = arrived.is_set() and self._fences.has_passed(row)
        reached = None if there else self._copier.mover.fence_compute(timed=True)
        if not arrived.wait(self._patience):
            raise LoadStuck(self._describe_stuck(row))
        self._waited_rows.add(row)
        self._submit_next()
        self.times.waited_for(row, time.perf_counter() - began, reached)
        if self._copier.timeline is not None and self._fences.has_passed(row):
            self._copier.timeline.add(Lane.WAIT, self._step, row, began)
        return self._fences.of(row)

    def give_up(self, reason: str) -> None:
        """Fail what has not arrived, and launch nothing more. Copies that were launched go on: the
        run is over when it has :attr:`landed`.

        Args:
            reason: a word for logs and metrics.
        """
        with self._changed:
            if self._given_up or self._is_over:
                return
            now = self._refuses_since = time.perf_counter()
            self._given_up = reason
            self.times.given_up(now)
            for load in self.loads:
                if load.outstanding:
                    load.fail(reason)
                    load.ended = now
        for row in range(len(self._shapes)):
            self._note_arrival(row)

    def land(self, patience: float | None = None) -> None:
        """Wait until the run has :attr:`landed`. Once it has, no thread and no device writes engine
        memory for these loads, now or later.

        Args:
            patience: seconds that copies which have begun have to end; those of the run if None.

        Raises:
            LoadStuck: if one has not ended. It may write whenever it goes on.
        """
        patience = self._patience if patience is None else patience
        due = time.perf_counter() + patience
        with self._changed:
            if not self._changed.wait_for(lambda: not self._writing, patience):
                raise self._stuck(patience)
        if not self._fences.pass_within(max(0.0, due - time.perf_counter())):
            raise self._stuck(patience)

    def check(self) -> None:
        """See that what was given up comes to its end.

        Raises:
            LoadStuck: if a copy has not ended for too long. It may write whenever it goes on.
        """
        late = time.perf_counter() - self._refuses_since > self._patience
        if self._given_up and late and not self.landed:
            raise self._stuck(self._patience)

    def _stuck(self, patience: float) -> LoadStuck:
        names = ", ".join(sorted(load.order.request_id for load in self.loads))
        return LoadStuck(
            f"a copy into blocks of {names} has not ended within {patience:.0f} s, and these "
            "blocks must not be used while it may go on"
        )

    @property
    def failed(self) -> bool:
        """Whether one of the loads has failed."""
        return any(load.reason for load in self.loads)

    @property
    def expired(self) -> bool:
        """Whether the timeout of one of the loads has passed."""
        return time.perf_counter() > self._due

    @property
    def landed(self) -> bool:
        """Whether every row has arrived or was given up, and the device has carried out every
        copy."""
        return not (self._writing or self._missing) and self._fences.all_passed

    def receipts(self) -> list[TransferReceipt]:
        """What to report of the loads now that the run has landed."""
        times, timeline = self.times, self._copier.timeline
        if timeline is not None:
            for row, (began, ended) in times.waits().items():
                timeline.add(Lane.WAIT, self._step, row, began, end=ended)
        for load in self.loads:
            if not load.reason:
                load.ended = max(load.ended, times.ended)
        return [load.receipt(times.active, times.waited) for load in self.loads]

    def _describe_stuck(self, row: int) -> str:
        stuck = [load.order.request_id for load in self.loads if load.outstanding]
        return (
            f"row {row} of the loads for {', '.join(sorted(stuck))} did not arrive within "
            f"{self._patience:.0f} s, and the model waits for it. A copy from host memory that "
            "takes so long means that the machine is not well: look whether it swaps, and at the "
            "device. What runs cannot be taken back, so the engine stops"
        )

    def _submit_next(self) -> None:
        with self._changed:
            row = self._submitted
            if row == len(self._shapes) or self._given_up:
                return
            self._submitted += 1
            groups = self._shapes[row].groups
            wanted = [
                (load, piece)
                for load in self.loads
                for piece in load.pieces
                if piece.group in groups
            ]
            self.times.submitted(len(wanted), time.perf_counter())
        urgency = _BETWEEN_STEPS if self._parked else _IN_STEP
        for load, piece in wanted:
            self._copier.pool.submit(
                (urgency, row),
                partial(self._move, row, load, piece),
                partial(self._lost, row, load),
            )
        if not wanted:
            self._note_arrival(row)

    def _move(self, row: int, load: Load, piece: Piece) -> None:
        began, copier, shape = time.perf_counter(), self._copier, self._shapes[row]
        if load.reason:
            self._piece_over(row, load)
            return
        pairs = self._pairs_of(shape, piece)
        copier.mover.await_near(copier.near, piece.near)
        if not self._admit():
            load.fail(self._given_up)
            self._piece_over(row, load)
            return
        assert self._after is not None, "a row was submitted before the run was started"
        size = len(piece.blocks) * shape.page_bytes
        try:
            fence = copier.mover.load([row], pairs, self._after, urgent=not self._parked)
        except CopyFailed as error:
            log.warning("a copy for %s has failed", load.order.request_id, exc_info=error)
            load.fail(type(error.__cause__).__name__)
            fence, size = error.launched, 0
        except BaseException:
            self._leave()
            raise
        if not self._parked or _passed(fence):
            self._copied(row, load, fence, size, began)
        else:
            job = partial(self._await, row, load, fence, size, began)
            self._waiter.submit((0, 0), job, partial(self._unwatched, row, load, fence))

    def _await(self, row: int, load: Load, fence: Fence, size: int, began: float) -> None:
        """Wait for the device, which has a row of a load between steps to copy."""
        fence.wait()
        self._copied(row, load, fence, size, began)

    def _unwatched(self, row: int, load: Load, fence: Fence, error: BaseException) -> None:
        """Nobody can wait for the device as he should."""
        load.fail(type(error).__name__)
        with suppress(Exception):  # a device that has failed copies no more
            fence.wait()
        self._piece_over(row, load, wrote=True)

    def _copied(self, row: int, load: Load, fence: Fence, size: int, began: float) -> None:
        """A piece is copied; of a load in the step, copied or launched."""
        try:
            self._note_copied(row, load, fence, size, began)
        except Exception as error:
            _fail((load,), error)
        self._piece_over(row, load, wrote=True)

    def _note_copied(self, row: int, load: Load, fence: Fence, size: int, began: float) -> None:
        with self._changed:
            load.moved_bytes += size
            if self._parked:
                self._note_passed(row, fence, size)
            else:
                self._fences.add(row, fence, size)
        if self._copier.timeline is not None and fence.passed() and fence.span() is None:
            self._copier.timeline.add(Lane.LOAD, self._step, row, began, size)

    def _pairs_of(self, shape: Row, piece: Piece) -> Pairs:
        """The pages of a piece in a row, checked and uploaded once for all rows that are cut alike.
        Two threads may both make them: either's will do."""
        key = (piece, place_of(shape, piece.group))
        if (pairs := self._pairs.get(key)) is None:
            pages = pages_of(shape, piece.group, piece.blocks)
            pairs = self._copier.mover.pairs(self._copier.near, piece.near, pages)
            self._pairs[key] = pairs
        return pairs

    def _lost(self, row: int, load: Load, error: BaseException) -> None:
        """A piece will not come."""
        load.fail(type(error).__name__)
        self._piece_over(row, load)

    def _admit(self) -> bool:
        """Ask to write engine memory; pairs with :meth:`_leave` if granted."""
        with self._changed:
            if not self._given_up:
                self._writing += 1
            return not self._given_up

    def _leave(self) -> None:
        """A copy that was admitted has not begun, or has ended."""
        with self._changed:
            self._writing -= 1
            self._changed.notify_all()

    def _piece_over(self, row: int, load: Load, *, wrote: bool = False) -> None:
        """A piece is over.

        Args:
            row: its row.
            load: whose it is.
            wrote: whether it was admitted to engine memory. Who is told that its row has arrived
                finds that nobody writes for it any more.
        """
        with self._changed:
            load.outstanding -= 1
            load.ended = time.perf_counter()
            self.times.over(load.ended)
            self._left[row] -= 1
            if wrote:
                self._leave()
        self._note_arrival(row)

    def _note_arrival(self, row: int) -> None:
        """Set the row's event once all of its pieces are over, or given up."""
        with self._changed:
            arrives = not self._arrived[row].is_set() and (
                not self._left[row] or bool(self._given_up)
            )
            if arrives:
                self._arrived[row].set()
                self._missing -= 1
            over = self._note_over()
        if arrives and self._parked:
            self._submit_next()
        if over:
            self._done()

    def _note_over(self) -> bool:
        """Whether the run has come to its end just now."""
        if self._is_over or self._missing or (self._parked and self._writing):
            return False
        self._is_over = True
        return True


def _note_passed(
    times: LoadTimes, timeline: Timeline | None, step: int, row: int, fence: Fence, size: int
) -> None:
    """The fence of a row has passed."""
    times.copied(row, fence)
    if timeline is not None and (span := fence.span()) is not None:
        timeline.add(Lane.LOAD, step, row, span[0], size, end=span[1])


def _fail(loads: Iterable[Load], error: BaseException) -> None:
    """The device has failed under loads."""
    failing = [load for load in loads if not load.reason]
    if failing:
        names = ", ".join(sorted(load.order.request_id for load in failing))
        log.error("the device failed in a load for %s", names, exc_info=error)
    for load in failing:
        load.fail(type(error).__name__)


def _passed(fence: Fence) -> bool:
    """Whether a fence is known to have passed. Who waits for it meets the error if there is one."""
    try:
        return fence.passed()
    except Exception:
        return False


def window_rows(load_ahead: int | str, staging: int, row_bytes: int, rows: int) -> int:
    """How many rows to keep in flight.

    Args:
        load_ahead: an integer is obeyed exactly, up to all rows; ``"auto"`` fills the staging
            budget.
        staging: the budget in bytes.
        row_bytes: bytes of one row over all loads of the run.
        rows: rows of the model.
    """
    if isinstance(load_ahead, int):
        return min(rows, load_ahead)
    return max(1, min(rows, staging // max(1, row_bytes)))

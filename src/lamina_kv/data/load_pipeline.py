"""The load pipeline: rows in order, a window of them in flight ahead of the one waited for.

::

    rows      0    1    2    3    4    5
    start   [====][====]                        load_ahead = 2: rows 0 and 1 are submitted
    wait 0        [====][====]                  row 0 has arrived; row 2 is submitted
    wait 1              [====][====]            row 1 has arrived; row 3 is submitted

A load between steps has a timeout, past which it is given up as a whole. A load in the step cannot
be taken back: a copy that does not end stops the engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from lamina_kv.data.copier import Copier
from lamina_kv.data.loads import Load, Piece
from lamina_kv.data.movers.base import Fence, Pairs, pages_of, place_of
from lamina_kv.geometry import Place, Row
from lamina_kv.observe.timeline import Lane

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
        step: for the timeline.
        done: called once, from any thread, when every row has arrived.

    Attributes:
        loads: what to load.
        active: seconds in which rows were on their way.
        waited: seconds spent in :meth:`wait`.
    """

    def __init__(
        self,
        loads: Sequence[Load],
        copier: Copier,
        *,
        window: int,
        parked: bool,
        patience: float,
        step: int = 0,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self.loads = tuple(loads)
        self.active = 0.0
        self.waited = 0.0
        self._copier = copier
        self._shapes = copier.geometry.rows
        self._window = window
        self._parked = parked
        self._patience = patience
        self._step = step
        self._done = done
        self._due = min(load.began + load.order.timeout for load in loads)
        self._after: Fence | None = None
        self._pairs: dict[tuple[Piece, Place | None], Pairs] = {}
        self._changed = threading.Condition()  # guards all that follows
        self._submitted = 0
        self._waited_rows: set[int] = set()
        self._left = [sum(load.pieces_of(row) for load in loads) for row in self._shapes]
        self._in_flight = 0
        self._active_since = 0.0
        self._writing = 0
        self._given_up = ""
        self._fences: list[list[Fence]] = [[] for _ in self._shapes]
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

    def await_near(self) -> None:
        """Return when all near pages are fit for copies, however long that takes."""
        for load in self.loads:
            for piece in load.pieces:
                self._copier.mover.await_near(self._copier.near, piece.near)

    def wait(self, row: int) -> list[Fence]:
        """Block until ``row`` has arrived, and submit one more row the first time.

        Returns:
            The fences that the engine's next work must come after; empty when the row was
            waited for before.

        Raises:
            LoadStuck: if it does not arrive.
        """
        if row in self._waited_rows:
            return []
        began = time.perf_counter()
        while row >= self._submitted:
            self._submit_next()
        if not self._arrived[row].wait(self._patience):
            raise LoadStuck(self._describe_stuck(row))
        self._waited_rows.add(row)
        self._submit_next()
        self.waited += time.perf_counter() - began
        if self._copier.timeline is not None:
            self._copier.timeline.add(Lane.WAIT, self._step, row, began)
        return self._fences[row]

    def land(self) -> None:
        """Wait for the device to carry out every copy of a run that is over."""
        for fences in self._fences:
            for fence in fences:
                fence.wait()

    def give_up(self, reason: str, patience: float | None = None) -> None:
        """Fail what has not arrived. When this returns no thread writes engine memory for these
        loads, now or later.

        Args:
            reason: a word for logs and metrics.
            patience: seconds that copies which have begun have to end; those of the run if None.

        Raises:
            LoadStuck: if one has not ended. It may write whenever it goes on.
        """
        patience = self._patience if patience is None else patience
        with self._changed:
            self._given_up = self._given_up or reason
            if not self._changed.wait_for(lambda: not self._writing, patience):
                names = ", ".join(sorted(load.order.request_id for load in self.loads))
                raise LoadStuck(
                    f"a copy into blocks of {names} has not ended within {patience:.0f} s, and "
                    "these blocks must not be used while it may go on"
                )
        self.land()
        with self._changed:
            now = time.perf_counter()
            if self._in_flight:
                self.active += now - self._active_since
                self._active_since = now
            for load in self.loads:
                if load.outstanding:
                    load.fail(reason)
                    load.ended = now
        for row in range(len(self._shapes)):
            self._note_arrival(row)

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
        return not self._missing and all(
            fence.passed() for fences in self._fences for fence in fences
        )

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
            if wanted and not self._in_flight:
                self._active_since = time.perf_counter()
            self._in_flight += len(wanted)
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
        try:
            fence = copier.mover.load([row], pairs, self._after)
            size = len(piece.blocks) * shape.page_bytes
            if copier.timeline is not None:
                copier.timeline.add(Lane.LOAD, self._step, row, began, size)
            self._piece_over(row, load, fence, size)
        finally:
            self._leave()

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
        with self._changed:
            self._writing -= 1
            self._changed.notify_all()

    def _piece_over(self, row: int, load: Load, fence: Fence | None = None, size: int = 0) -> None:
        with self._changed:
            load.outstanding -= 1
            load.ended = time.perf_counter()
            load.moved_bytes += size
            self._in_flight -= 1
            if not self._in_flight:
                self.active += load.ended - self._active_since
            if fence is not None:
                self._fences[row].append(fence)
            self._left[row] -= 1
        self._note_arrival(row)

    def _note_arrival(self, row: int) -> None:
        """Set the row's event once all of its pieces are over, or given up."""
        with self._changed:
            if self._arrived[row].is_set() or (self._left[row] and not self._given_up):
                return
            self._arrived[row].set()
            self._missing -= 1
            over = not self._missing
        if self._parked:
            self._submit_next()
        if over:
            self._done()


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

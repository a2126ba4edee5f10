"""The load pipeline: rows in order, a window of them in flight ahead of the one waited for.

::

    rows      0    1    2    3    4    5
    start   [====][====]                        load_ahead = 2: rows 0 and 1 are submitted
    wait 0        [====][====]                  row 0 has arrived; row 2 is submitted
    wait 1              [====][====]            row 1 has arrived; row 3 is submitted

For each row every request of the run is served. A request that fails is left out of later rows
from its first bad chunk on; the others go on. A row that is waited for again returns at once.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from lamina.data.early_release import Arrival
from lamina.data.movers.base import Fence, Indices
from lamina.data.worker_pool import WorkerPool
from lamina.geometry import CacheGeometry
from lamina.observe.timeline import Lane, Timeline
from lamina.plan import ChunkKey, ChunkLoad, LoadOrder, Outcome, TierName, TransferReceipt

PIECE_BYTES = 8 << 20
"""Bytes of one row that one thread moves at a time: enough to stream, little enough to share."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring chunks of one load that come from the same tier.

    Attributes:
        tier: where they are.
        group: the cache group that they are of; rows without a layer of it have nothing of them.
        first: index, in the load, of the first chunk.
        keys: their keys.
        slots: their slots.
        pages: for each block wanted, its page among the pages of all chunks of the piece
            (``chunk * blocks_per_chunk + block``).
        blocks: for each block wanted, the engine block it goes to.
    """

    tier: TierName
    group: int
    first: int
    keys: tuple[ChunkKey, ...]
    slots: Indices
    pages: Indices
    blocks: Indices


class BadChunks(Exception):
    """Some chunks of a piece could not be read or did not verify.

    Attributes:
        indices: which, within the piece.
        damaged: those of them that can never be delivered.
        reason: a word for logs and metrics.
    """

    def __init__(self, indices: Sequence[int], damaged: Sequence[int], reason: str) -> None:
        super().__init__(f"{len(indices)} chunks: {reason}")
        self.indices = tuple(indices)
        self.damaged = tuple(damaged)
        self.reason = reason


class LoadStuck(RuntimeError):
    """A copy into the engine does not end, and nothing can be done without it: the engine has to
    stop."""


class RowSource(Protocol):
    """A tier, as the load pipeline sees it."""

    def load_row(
        self, row: int, piece: Piece, after: Fence, admit: Callable[[], bool]
    ) -> Fence | None:
        """Bring one row of a piece into the engine.

        Args:
            row: the row.
            piece: what to bring.
            after: behind everything that may still use the engine blocks for something else.
            admit: to be called right before engine memory is written; False means that the
                load was given up and nothing may be written any more. Each call that returned
                True keeps the load from being declared over until this method returns.

        Returns:
            A fence behind the copy, or None if it was given up.

        Raises:
            BadChunks: if chunks are missing or do not verify; the others were loaded.
        """


class Load:
    """One order on its way into the engine.

    Args:
        order: what to load.
        geometry: the engine's cache.
    """

    def __init__(self, order: LoadOrder, geometry: CacheGeometry) -> None:
        self.order = order
        self.pieces = _cut(order.chunks, geometry)
        self.began = self.ended = time.perf_counter()
        self.moved_bytes = 0
        self.released = False
        self.busy = 0.0
        self.bad: set[int] = set()
        self.damaged: set[int] = set()
        self.reason = ""
        self.outstanding = 0
        self._given_up = False
        self._refused = False
        self._writing = 0
        self._changed = threading.Condition()

    @property
    def failed(self) -> bool:
        """Whether some chunk could not be delivered."""
        return bool(self.bad)

    @property
    def first_bad(self) -> int:
        """Index of the first chunk that could not be delivered; past the end if all could."""
        return min(self.bad, default=len(self.order.chunks))

    def fail(self, chunks: Sequence[int], reason: str) -> None:
        """Note that chunks could not be delivered."""
        self.bad.update(chunks)
        self.reason = self.reason or reason

    def admit(self) -> bool:
        """Ask to write engine memory; pairs with :meth:`leave` if granted."""
        with self._changed:
            if self._given_up:
                self._refused = True
                return False
            self._writing += 1
            return True

    def leave(self, grants: int) -> None:
        """Give back what :meth:`admit` granted."""
        with self._changed:
            self._writing -= grants
            self._changed.notify_all()

    def give_up(self, reason: str, patience: float) -> None:
        """Fail what has not arrived. When this returns no thread writes engine memory for this
        load, now or later.

        Args:
            reason: a word for logs and metrics.
            patience: seconds that a copy which has begun has to end.

        Raises:
            LoadStuck: if one has not ended. It may write whenever it goes on.
        """
        with self._changed:
            self._given_up = True
            if not self._changed.wait_for(lambda: not self._writing, patience):
                raise LoadStuck(
                    f"a copy into blocks of {self.order.request_id} has not ended within "
                    f"{patience:.0f} s, and these blocks must not be used while it may go on"
                )
        # A piece that was refused while this waited for another one is over and not outstanding.
        if self.outstanding or self._refused:
            self.fail(range(len(self.order.chunks)), reason)

    def lost_blocks(self) -> set[int]:
        """Engine blocks that do not hold what they should."""
        return {
            block for chunk in self.order.chunks[self.first_bad :] for block in chunk.blocks
        }  # fmt: skip

    def receipt(self, active: float, waited: float) -> TransferReceipt:
        """What to report of this load now that it is over."""
        return TransferReceipt(
            transfer=self.order.transfer,
            outcome=Outcome.FAILED if self.failed else Outcome.DONE,
            moved_bytes=self.moved_bytes,
            seconds=self.ended - self.began,
            active=active,
            waited=waited,
            released=self.released,
            busy=self.busy,
            bad_chunks=tuple(self.order.chunks[i].key for i in sorted(self.damaged)),
            reason=self.reason,
        )


class LoadRun:
    """Some loads that run together, row by row.

    Args:
        loads: what to load.
        geometry: the engine's cache.
        sources: the tiers.
        pools: for each tier, the threads that move its pieces.
        window: rows in flight ahead of the one waited for.
        cores: cores that the rank has.
        urgency: the pools' first priority; the row is the second.
        self_driven: whether a row that has arrived stands for one that was waited for, because
            no model waits (a parked load).
        patience: seconds that one copy may take. A wait for a load that the engine cannot take
            back ends after them, by :class:`LoadStuck`.
        done: called once, from a pool thread or from a waiter, when every row has arrived.
        step: for the timeline.
        timeline: where spans go.
    """

    def __init__(
        self,
        loads: Sequence[Load],
        geometry: CacheGeometry,
        sources: Mapping[TierName, RowSource],
        pools: Mapping[TierName, WorkerPool],
        *,
        window: int,
        cores: int,
        urgency: float,
        self_driven: bool,
        patience: float,
        step: int = 0,
        timeline: Timeline | None = None,
        done: Callable[[LoadRun], None] | None = None,
    ) -> None:
        self.loads = tuple(loads)
        self.active = 0.0
        self.waited = 0.0
        self.deadline = min(load.began + load.order.deadline for load in loads)
        self._rows = len(geometry.rows)
        self._page_bytes = [row.page_bytes for row in geometry.rows]
        self._groups = [row.groups for row in geometry.rows]
        self._sources = sources
        self._pools = pools
        self._after: Fence | None = None
        self._window = window
        self._cores = cores
        self._urgency = urgency
        self._self_driven = self_driven
        self._patience = patience
        self._step = step
        self._timeline = timeline
        self._done = done
        self._in_flight = 0
        self._active_since = 0.0
        self._submitted = 0
        self._extended = False
        self._arrived_rows = 0
        self._waited_rows: set[int] = set()
        self._lock = threading.Lock()
        self._arrived = [threading.Event() for _ in range(self._rows)]
        self._fences: list[list[Fence]] = [[] for _ in range(self._rows)]
        self._left = [
            [sum(piece.group in groups for piece in load.pieces) for load in self.loads]
            for groups in self._groups
        ]
        self._alive = set(range(len(self.loads)))
        for i, load in enumerate(self.loads):
            load.outstanding = sum(left[i] for left in self._left)

    def start(self, after: Fence) -> None:
        """Submit the first rows of the window.

        Args:
            after: behind everything that may still use the engine blocks for something else.
        """
        self._after = after
        for _ in range(self._window):
            self._submit_next()

    def wait(self, row: int) -> list[Fence]:
        """Block until ``row`` has arrived, and submit one more row the first time.

        Returns:
            The fences that the engine's next work must come after; empty when the row was
            waited for before.

        Raises:
            LoadStuck: if it does not arrive, and cannot be given up.
        """
        if row in self._waited_rows:
            return []
        began = time.perf_counter()
        while row >= self._submitted:
            self._submit_next()
        since = began
        while True:
            may_be_given_up = self.deadline < math.inf
            due = self.deadline if may_be_given_up else since + self._patience
            if self._arrived[row].wait(max(0.0, due - time.perf_counter())):
                break
            if time.perf_counter() >= due:
                if not may_be_given_up:
                    raise LoadStuck(self._describe_stuck(row))
                self._give_up_stuck(row)
                since = time.perf_counter()
        self._waited_rows.add(row)
        self._submit_next()
        self.waited += time.perf_counter() - began
        if self._timeline is not None:
            self._timeline.add(Lane.WAIT, self._step, row, began)
        return self._fences[row]

    def _describe_stuck(self, row: int) -> str:
        stuck = [self.loads[i].order.request_id for i in self._alive if self._left[row][i]]
        return (
            f"row {row} of the loads for {', '.join(sorted(stuck))} did not arrive within "
            f"{self._patience:.0f} s, and the model waits for it. A copy from host memory that "
            "takes so long means that the machine is not well: look whether it swaps, and at the "
            "device. What runs cannot be taken back, so the engine stops"
        )

    def finish(self) -> list[Fence]:
        """Wait for every row that was not waited for."""
        return [fence for row in range(self._rows) for fence in self.wait(row)]

    def land(self) -> None:
        """Wait for every row, and for the device to carry out every copy.

        Raises:
            LoadStuck: as :meth:`wait` does.
        """
        self.finish()
        for fences in self._fences:
            for fence in fences:
                fence.wait()

    def give_up(self, reason: str, patience: float | None = None) -> None:
        """Fail what has not arrived; afterwards nothing of this run writes engine memory.

        Args:
            reason: a word for logs and metrics.
            patience: seconds that copies which have begun have to end; those of the run if None.

        Raises:
            LoadStuck: if one has not ended.
        """
        if patience is not None:
            self._patience = patience
        self._give_up(set(self._alive), reason)

    def _give_up_stuck(self, row: int) -> None:
        """Give up the loads that keep ``row`` from arriving. The others, which could not go on
        behind it, get their time anew, but once only: a forward waits twice the deadline at most.
        """
        with self._lock:
            stuck = {i for i in self._alive if self._left[row][i]}
        if self._extended:
            stuck = set(self._alive)
        self._extended = True
        self._give_up(stuck, "deadline")
        patience = min((self.loads[i].order.deadline for i in self._alive), default=0.0)
        self.deadline = time.perf_counter() + patience

    def _give_up(self, which: set[int], reason: str) -> None:
        for i in which:
            self.loads[i].give_up(reason, self._patience)
        for fences in self._fences:
            for fence in fences:
                fence.wait()
        with self._lock:
            if self._in_flight:
                now = time.perf_counter()
                self.active += now - self._active_since
                self._active_since = now
            self._alive -= which
            rows = range(self._submitted if self._alive else self._rows)
        for row in rows:
            self._note_arrival(row)

    @property
    def arrival(self) -> Arrival:
        """How far it is."""
        arrived = next((i for i, e in enumerate(self._arrived) if not e.is_set()), self._rows)
        began = min(load.began for load in self.loads)
        busy = sum(load.busy for load in self.loads)
        return Arrival(self._rows, arrived, time.perf_counter() - began, busy)

    @property
    def grace(self) -> float | None:
        """Seconds for which what is missing would be waited for if its requests were resumed now;
        None if they must not be."""
        graces = [load.order.grace for load in self.loads]
        return None if None in graces else min(grace for grace in graces if grace is not None)

    def resume(self, grace: float) -> None:
        """Its requests go on; what is missing has so many seconds."""
        self.deadline = time.perf_counter() + grace
        for load in self.loads:
            load.released = True

    @property
    def expired(self) -> bool:
        """Whether the deadline of one of its loads has passed."""
        return time.perf_counter() > self.deadline

    @property
    def over(self) -> bool:
        """Whether every row has arrived or was given up."""
        return self._arrived[-1].is_set() and all(event.is_set() for event in self._arrived)

    @property
    def landed(self) -> bool:
        """Whether the run is over and the device has carried out every copy."""
        return self.over and all(fence.passed() for fences in self._fences for fence in fences)

    def _submit_next(self) -> None:
        with self._lock:
            row = self._submitted
            if row == self._rows:
                return
            self._submitted += 1
            wanted = [
                (i, piece)
                for i in sorted(self._alive)
                for piece in self.loads[i].pieces
                if piece.group in self._groups[row]
            ]
            if wanted and not self._in_flight:
                self._active_since = time.perf_counter()
            self._in_flight += len(wanted)
        for i, piece in wanted:
            self._pools[piece.tier].submit(
                (self._urgency, row),
                partial(self._move, row, i, piece),
                partial(self._lost, row, i, piece),
            )
        if not wanted:
            self._note_arrival(row)

    def _move(self, row: int, index: int, piece: Piece) -> None:
        began, working = time.perf_counter(), time.thread_time()
        load = self.loads[index]
        assert self._after is not None, "a row was submitted before the run was started"
        grants = 0
        fence: Fence | None = None

        def admit() -> bool:
            nonlocal grants
            granted = load.admit()
            grants += granted
            return granted

        try:
            if piece.first < load.first_bad:
                fence = self._sources[piece.tier].load_row(row, piece, self._after, admit)
        except BadChunks as error:
            load.fail([piece.first + i for i in error.indices], error.reason)
            load.damaged.update(piece.first + i for i in error.damaged)
        except BaseException:
            load.leave(grants)
            raise
        size = len(piece.blocks) * self._page_bytes[row]
        if self._timeline is not None:
            self._timeline.add(Lane.LOAD, self._step, row, began, size)
        self._piece_over(row, index, fence, size, time.thread_time() - working)
        load.leave(grants)

    def _lost(self, row: int, index: int, piece: Piece, error: BaseException) -> None:
        """A piece will not come."""
        chunks = range(piece.first, piece.first + len(piece.keys))
        self.loads[index].fail(chunks, type(error).__name__)
        self._piece_over(row, index, None, 0, 0.0)

    def _piece_over(
        self, row: int, index: int, fence: Fence | None, size: int, worked: float
    ) -> None:
        load = self.loads[index]
        with self._lock:
            load.busy += worked / self._cores
            load.outstanding -= 1
            load.ended = time.perf_counter()
            self._in_flight -= 1
            if not self._in_flight:
                self.active += load.ended - self._active_since
            if fence is not None:
                load.moved_bytes += size
                self._fences[row].append(fence)
            self._left[row][index] -= 1
        self._note_arrival(row)

    def _note_arrival(self, row: int) -> None:
        """Set the row's event once every load that is not given up has its pieces there."""
        with self._lock:
            if self._arrived[row].is_set() or any(self._left[row][i] for i in self._alive):
                return
            self._arrived[row].set()
            self._arrived_rows += 1
            last = self._arrived_rows == self._rows
        if self._self_driven:
            self._submit_next()
        if last and self._done is not None:
            self._done(self)


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


def _cut(chunks: Sequence[ChunkLoad], geometry: CacheGeometry) -> tuple[Piece, ...]:
    """Cut a load into pieces, in prefix order."""
    per_piece = max(1, PIECE_BYTES // max(geometry.extent_bytes))
    pieces: list[Piece] = []
    start = 0
    while start < len(chunks):
        kind = chunks[start].tier, chunks[start].group
        end = start + 1
        while end < min(len(chunks), start + per_piece) and kind == (
            chunks[end].tier,
            chunks[end].group,
        ):
            end += 1
        part = chunks[start:end]
        pages = [
            np.arange(len(chunk.blocks)) + i * geometry.blocks_per_chunk + chunk.first_block
            for i, chunk in enumerate(part)
        ]
        pieces.append(
            Piece(
                tier=kind[0],
                group=kind[1],
                first=start,
                keys=tuple(chunk.key for chunk in part),
                slots=np.fromiter((chunk.slot for chunk in part), np.int64, len(part)),
                pages=np.concatenate(pages).astype(np.int64),
                blocks=np.fromiter((b for chunk in part for b in chunk.blocks), np.int64),
            )
        )
        start = end
    return tuple(pieces)

"""Moves between near and a far tier, questions to it, and probes of it, all in the background.

::

    plan ─▶ probe, asks, inward ─▶ reader threads ─▶ probe, find, read ─▶ receipts
         ─▶ drops, touches, outward ─▶ one writer thread ─▶ drop, touch, write ─▶ receipts

Requests wait for what comes inward. So a batch is written when nothing is being read, or after
:data:`GIVE_WAY` seconds. Every order gets its receipt: a thread that dies fails what waits for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from lamina_kv.data.far import FarTier
from lamina_kv.data.near import NearSlab
from lamina_kv.data.threads import Threads
from lamina_kv.data.worker_pool import WorkerPool
from lamina_kv.observe.timeline import Lane, Timeline
from lamina_kv.plan import (
    Ask,
    ChunkKey,
    Move,
    Outcome,
    TierOrders,
    TransferId,
    TransferReceipt,
)
from lamina_kv.tiers.contract import Fate, Piece

Report = Callable[[Iterable[TransferReceipt]], None]
"""Takes receipts, from any thread."""

GIVE_WAY = 0.25
"""Seconds for which reads go before a batch of writes. A tier that is read without a pause is
written to four times a second all the same."""

_ASK, _READ, _WRITE = (0.0, 0), (1.0, 0), (0.0, 0)
"""Priorities of jobs. A question is short, and its answer makes up for much reading. A probe goes
where reads go: it ends when a thread that hangs in the store has come back."""


class _Order(NamedTuple):
    """A move, and when its plan came."""

    move: Move
    came: float


class MovePipeline:
    """All that a rank does with one far tier.

    Args:
        tier: the tier; closed with this.
        near: the near tier. Control keeps the slots of a move reserved until its receipt.
        report: called with receipts.
        threads: how its threads begin.
        timeline: where spans go.
    """

    def __init__(
        self,
        tier: FarTier,
        near: NearSlab,
        report: Report,
        *,
        threads: Threads | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._tier = tier
        self._near = near
        self._length = near.geometry.chunk_bytes
        self._report = report
        self._timeline = timeline
        self._step = 0
        self._batch, self._readers = tier.traits.batch, tier.traits.readers
        self._reading = WorkerPool(f"read-{tier.name}", self._readers, threads)
        self._writing = WorkerPool(f"write-{tier.name}", 1, threads)
        self._lock = threading.Lock()
        self._inward: deque[_Order] = deque()
        self._outward: deque[_Order] = deque()
        self._drops: list[int] = []
        self._touched: list[tuple[ChunkKey, int]] = []

    def carry_out(self, orders: TierOrders, step: int) -> None:
        """Queue what a plan orders, behind what is queued."""
        self._step = step
        came = time.perf_counter()
        with self._lock:
            self._inward.extend(_Order(move, came) for move in orders.inward)
            self._outward.extend(_Order(move, came) for move in orders.outward)
            # Before writes that are queued already, too: control drops no slot that it fills.
            self._drops.extend(orders.drops)
            self._touched.extend(orders.touches)
        for ask in orders.asks:
            lost = partial(self._unanswered, ask.transfer)
            self._reading.submit(_ASK, partial(self._answer, ask), lost)
        if (probe := orders.probe) is not None:
            lost = partial(self._unanswered, probe)
            self._reading.submit(_ASK, partial(self._probe, probe), lost)
        for _ in orders.inward[: self._readers]:
            self._submit_read()
        if orders.drops or orders.outward or orders.touches:
            self._submit_write()

    @property
    def depth(self) -> int:
        """Moves that no thread has taken up yet."""
        return len(self._inward) + len(self._outward)

    def close(self, timeout: float) -> bool:
        """Write what is queued, read nothing more, and close the tier.

        Args:
            timeout: seconds that this may take.

        Returns:
            Whether all threads have ended. If not, the tier stays open: a thread still uses it.
        """
        due = time.monotonic() + timeout
        with self._lock:
            self._inward.clear()  # nobody waits for it any more, nor for a receipt
        pools = (self._reading, self._writing)
        ended = [pool.close(max(0.0, due - time.monotonic())) for pool in pools]
        if all(ended):
            self._tier.close()
        return all(ended)

    # -- inward ------------------------------------------------------------------------------------

    def _submit_read(self) -> None:
        self._reading.submit(_READ, self._read_some, self._unread)

    def _read_some(self) -> None:
        with self._lock:
            # An even share each: of eight chunks four readers take two each.
            count = min(self._batch, -(-len(self._inward) // self._readers))
            batch = [self._inward.popleft() for _ in range(count)]
        if batch:
            began = time.perf_counter()
            words = self._tier.read(self._pieces(batch))
            self._span(Lane.FETCH, began, len(batch))
            self._settle(batch, words, began, inward=True)
        if self._inward:
            self._submit_read()

    def _unread(self, error: BaseException) -> None:
        with self._lock:
            batch, self._inward = self._inward, deque()
        self._settle(batch, [type(error).__name__] * len(batch), inward=True)

    def _answer(self, ask: Ask) -> None:
        began = time.perf_counter()
        present, reason = self._tier.find(ask.keys)
        receipt = TransferReceipt(
            ask.transfer,
            Outcome.FAILED if reason else Outcome.DONE,
            seconds=time.perf_counter() - began,
            present=present,
            reason=reason,
        )
        self._report([receipt])

    def _probe(self, transfer: TransferId) -> None:
        began = time.perf_counter()
        reason = self._tier.probe()
        outcome, seconds = Outcome.FAILED if reason else Outcome.DONE, time.perf_counter() - began
        self._report([TransferReceipt(transfer, outcome, seconds=seconds, reason=reason)])

    def _unanswered(self, transfer: TransferId, error: BaseException) -> None:
        reason = type(error).__name__
        self._report([TransferReceipt(transfer, Outcome.FAILED, reason=reason)])

    # -- outward -----------------------------------------------------------------------------------

    def _submit_write(self) -> None:
        self._writing.submit(_WRITE, self._write_some, self._unwritten)

    def _write_some(self) -> None:
        if self._outward:
            self._reading.await_idle(GIVE_WAY)
        batch = self._drop_and_touch(self._batch)
        if batch:
            began = time.perf_counter()
            words = self._tier.write(self._pieces(batch))
            self._span(Lane.WRITE, began, len(batch))
            self._settle(batch, words, began, inward=False)
        if self._outward:
            self._submit_write()

    def _unwritten(self, error: BaseException) -> None:
        # What is to be dropped may be damaged, and would be found after a restart.
        batch = self._drop_and_touch(len(self._outward))
        self._settle(batch, [type(error).__name__] * len(batch), inward=False)

    def _drop_and_touch(self, count: int) -> list[_Order]:
        """Drop and touch what there is, and take up to ``count`` moves to be written next.

        All in one moment: a slot may be dropped by one plan and filled by the next, and a drop that
        was left behind would forget what is written then.
        """
        with self._lock:
            batch = [self._outward.popleft() for _ in range(min(count, len(self._outward)))]
            drops, self._drops = self._drops, []
            touched, self._touched = self._touched, []
        if drops:
            self._tier.drop(drops)
        if touched:
            self._tier.touch(touched)
        return batch

    # -- both --------------------------------------------------------------------------------------

    def _pieces(self, batch: Sequence[_Order]) -> list[Piece]:
        return [Piece(move.key, move.far, self._near.object(move.near)) for move, _ in batch]

    def _settle(
        self,
        batch: Collection[_Order],
        words: Iterable[str],
        began: float | None = None,
        *,
        inward: bool,
    ) -> None:
        """Report a batch.

        Args:
            batch: orders.
            words: what became of each.
            began: when the tier was called with them; None if it was not.
            inward: whether they are reads.
        """
        now = time.perf_counter()
        share = 0.0 if began is None else (now - began) / len(batch)
        self._report(
            TransferReceipt(
                move.transfer,
                Outcome.DONE if word == Fate.DONE else Outcome.FAILED,
                moved_bytes=self._length if word == Fate.DONE else 0,
                lost=inward and word in (Fate.GONE, Fate.CORRUPT),
                reason="" if word == Fate.DONE else word,
                seconds=now - came,
                active=share,
            )
            for (move, came), word in zip(batch, words, strict=True)
        )

    def _span(self, lane: Lane, began: float, count: int) -> None:
        if self._timeline is not None:
            self._timeline.add(lane, self._step, -1, began, count * self._length)


def answers(orders: TierOrders) -> Iterator[TransferReceipt]:
    """What a rank says at once to orders that its leader carries out for it."""
    for move in (*orders.outward, *orders.inward):
        yield TransferReceipt(move.transfer, Outcome.DONE)
    for ask in orders.asks:
        yield TransferReceipt(ask.transfer, Outcome.DONE, present=b"\1" * len(ask.keys))
    if orders.probe is not None:
        yield TransferReceipt(orders.probe, Outcome.DONE)

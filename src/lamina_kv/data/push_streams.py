"""Outbound pushes of one rank: what is ready is written, what has drained is reported.

Everything here runs on the thread of :class:`~lamina_kv.data.push_wire.PushWire`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lamina_kv.data.movers.fences import Fence
from lamina_kv.data.push_pages import PageSpans
from lamina_kv.data.push_turns import Destination, cut
from lamina_kv.observe.timeline import Lane, Timeline
from lamina_kv.plan import TORN, Outcome, PushOrder, TransferReceipt
from lamina_kv.push.cards import RankCard, Route
from lamina_kv.push.messages import TOO_LATE, Delivered, encode
from lamina_kv.push.transports.base import (
    Peer,
    Spans,
    Transport,
    TransportError,
    Write,
    WriteState,
)

log = logging.getLogger("lamina_kv.data")

AHEAD = 4
"""Writes that a push works out before their turn comes."""


@dataclass(frozen=True, slots=True)
class PushRoute:
    """A decode rank that this rank sends to.

    Attributes:
        route: which part of a page.
        card: the decode rank.
        peer: its end of the wire; empty if it could not be connected.
    """

    route: Route
    card: RankCard
    peer: Peer


@dataclass(slots=True, eq=False)
class Sending:
    """One order that is being carried out.

    Attributes:
        order: the order.
        step: the step that it came in, for the timeline.
        spans: its pages, for each route.
        began: when it was ordered.
        fenced: rows whose fence is to pass, in order.
        gathered: per route, what is ready and not yet enough for a write.
        gathered_bytes: bytes of that.
        over: whether no more rows will come.
        writes: writes that have not ended, and those that are not begun.
        moved: bytes that have arrived.
    """

    order: PushOrder
    step: int
    spans: tuple[PageSpans, ...]
    began: float
    fenced: deque[tuple[int, Fence]] = field(default_factory=deque)
    gathered: list[list[tuple[Spans, Spans]]] = field(default_factory=list)
    gathered_bytes: int = 0
    first_row: int = -1
    over: bool = False
    writes: int = 0
    moved: int = 0


@dataclass(slots=True, eq=False)
class Batch:
    """Rows of one order for one decode rank, written at once.

    Attributes:
        sending: the order.
        route: index of the route.
        local: stretches here.
        remote: stretches there.
        size: bytes.
        row: the first row.
        write: the write, once it is begun.
        began: when.
    """

    sending: Sending
    route: int
    local: Spans
    remote: Spans
    size: int
    row: int
    write: Write | None = None
    began: float = 0.0


class PushStream:
    """One push: its orders one after another, and the word that it is all there.

    Args:
        incarnation: the decode engine.
        epoch: its name for the push.
        card: this rank's cache.
        routes: where to.
        transport: the wire.
        destination: where its writes take their turns.
        failure: why nothing can be sent, if so.
        batch: bytes that are written at once.
        until: monotonic seconds after which nothing is sent any more.
        report: called with receipts.
        timeline: where spans go.

    Attributes:
        failure: why nothing is sent any more; empty while there is no reason.
        awaits: the fence that holds up its next row, as of :meth:`advance`; None if none does.
    """

    def __init__(
        self,
        incarnation: str,
        epoch: int,
        card: RankCard,
        routes: tuple[PushRoute, ...],
        transport: Transport,
        destination: Destination,
        *,
        failure: str,
        batch: int,
        until: float,
        report: Callable[[TransferReceipt], None],
        timeline: Timeline | None,
    ) -> None:
        self.failure = failure
        self.awaits: Fence | None = None
        self._incarnation = incarnation
        self._epoch = epoch
        self._card = card
        self._routes = routes
        self._transport = transport
        self._destination = destination
        self._batch = batch
        self._until = until
        self._report = report
        self._timeline = timeline
        self._sendings: list[Sending] = []
        self._queue: deque[Batch] = deque()
        self._moving: list[Batch] = []
        self._delivered = False
        self._torn = False
        if any(not route.peer for route in routes):
            self.failure = self.failure or "unreachable"

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not (self._sendings or self._moving)

    @property
    def moves(self) -> bool:
        """Whether some of it is on the wire."""
        return bool(self._moving)

    @property
    def finished(self) -> bool:
        """Whether nothing will follow."""
        return self.idle and (self._delivered or bool(self.failure))

    def begin(self, order: PushOrder, step: int) -> Sending:
        """A new order of the push, in a plan for ``step``. If the push has failed, nobody looks at
        its pages."""
        routes = () if self.failure else self._routes
        spans = tuple(
            PageSpans(order.pages, route.route, self._card, route.card) for route in routes
        )
        gathered: list[list[tuple[Spans, Spans]]] = [[] for _ in self._routes]
        sending = Sending(order, step, spans, time.perf_counter(), gathered=gathered)
        self._sendings.append(sending)
        return sending

    def fail(self, reason: str) -> None:
        """Send nothing more. What is on its way cannot be called back; it will have drained."""
        self.failure = self.failure or reason
        while self._queue:
            self._queue.popleft().sending.writes -= 1

    def advance(self) -> None:
        """Take in which writes have ended, and queue what is ready to be written."""
        if not self.failure and time.monotonic() >= self._until:
            self.fail(TOO_LATE)
        self._collect()
        self.awaits = None
        for sending in self._sendings:
            if self.failure:  # nothing reads these rows, whenever they are written
                sending.fenced.clear()
            while sending.fenced and len(self._queue) < AHEAD:
                row, fence = sending.fenced[0]
                if not fence.passed():
                    self.awaits = self.awaits or fence
                    break
                sending.fenced.popleft()
                self._gather(sending, row)
            if sending.over and not sending.fenced:
                self._flush(sending)
        if self._queue:
            self._destination.queue(self)

    def _gather(self, sending: Sending, row: int) -> None:
        if self.failure:
            return
        for gathered, spans in zip(sending.gathered, sending.spans, strict=True):
            local, remote = spans.row(row)
            if len(local):
                gathered.append((local, remote))
                sending.gathered_bytes += int(local[:, 1].sum())
                if sending.first_row < 0:
                    sending.first_row = row
        if sending.gathered_bytes >= self._batch:
            self._flush(sending)

    def _flush(self, sending: Sending) -> None:
        if not sending.gathered_bytes:
            return
        for index, gathered in enumerate(sending.gathered):
            if not gathered:
                continue
            local = np.concatenate([pair[0] for pair in gathered])
            remote = np.concatenate([pair[1] for pair in gathered])
            gathered.clear()
            if self.failure:
                continue
            for here, there in cut(local, remote, self._destination.write_bytes):
                size = int(here[:, 1].sum())
                sending.writes += 1
                self._queue.append(Batch(sending, index, here, there, size, sending.first_row))
        sending.gathered_bytes, sending.first_row = 0, -1

    def post(self) -> int:
        """See :meth:`Sender.post <lamina_kv.data.push_turns.Sender.post>`."""
        if not self._queue:
            return 0
        batch = self._queue.popleft()
        batch.began = time.perf_counter()
        batch.sending.writes -= 1  # unless it is begun
        try:
            batch.write = self._transport.write(
                self._routes[batch.route].peer, batch.local, batch.remote
            )
        except TransportError as error:
            log.warning("push to %s: %s", self._incarnation, error)
            self.fail("unreachable")
            return 0
        except Exception as error:
            log.exception("push %d to %s", self._epoch, self._incarnation)
            self.fail(type(error).__name__)
            return 0
        batch.sending.writes += 1
        self._moving.append(batch)
        return batch.size

    def _collect(self) -> None:
        for batch in list(self._moving):
            assert batch.write is not None
            state = batch.write.state()
            if state is WriteState.MOVING:
                continue
            self._moving.remove(batch)
            self._destination.in_flight -= batch.size
            batch.sending.writes -= 1
            if state is WriteState.FAILED:
                self._torn = True
                self.fail(TORN)
                continue
            batch.sending.moved += batch.size
            if self._timeline is not None:
                step = batch.sending.step
                self._timeline.add(Lane.PUSH, step, batch.row, batch.began, batch.size)

    def settle(self) -> None:
        """Report orders that have drained, and say so to the other side if all of the push has."""
        for sending in list(self._sendings):
            if not sending.over or sending.fenced or sending.writes:
                continue
            # In order: the last one must not say that all is there before it is.
            if sending is not self._sendings[0]:
                continue
            if sending.order.last and not self.failure:
                self._deliver()
            self._sendings.remove(sending)
            self._report(
                TransferReceipt(
                    sending.order.transfer,
                    Outcome.FAILED if self.failure else Outcome.DONE,
                    moved_bytes=sending.moved,
                    seconds=time.perf_counter() - sending.began,
                    reason=TORN if self._torn else self.failure,
                )
            )

    def _deliver(self) -> None:
        notice = encode(Delivered(self._incarnation, self._epoch))
        try:
            for route in self._routes:
                self._transport.notify(route.peer, notice)
        except TransportError as error:
            log.warning("push to %s: %s", self._incarnation, error)
            self.fail("unreachable")
        self._delivered = True

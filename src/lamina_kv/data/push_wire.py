"""One thread that owns a rank's transport: what leaves it, and what arrives.

The engine's thread only queues; it never waits for the wire.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from lamina_kv.data.fence_watch import FenceWatch
from lamina_kv.data.movers.fences import Fence
from lamina_kv.data.push_gathers import Bound, Gathers
from lamina_kv.data.push_receives import Receives
from lamina_kv.data.push_streams import PushRoute, PushStream, Sending
from lamina_kv.data.push_turns import Destination
from lamina_kv.data.threads import Threads
from lamina_kv.observe.timeline import Lane, Timeline
from lamina_kv.plan import (
    Binding,
    Outcome,
    PeerOrder,
    PushOrder,
    PushPlan,
    PushStop,
    ReceiveOrder,
    TransferId,
    TransferReceipt,
)
from lamina_kv.push.cards import EngineCard, RankCard, decode_card, routes
from lamina_kv.push.complaints import Complaints, printable
from lamina_kv.push.transports.base import Peer, Transport, TransportError

log = logging.getLogger("lamina_kv.data")

SENDING_POLL = 0.0002
"""Seconds between two looks at writes under way, which move in our calls only. While the model
computes the next row there are none: a look takes the interpreter lock from it."""

RECEIVING_POLL = 0.001
"""Seconds between two looks for notices while some are expected."""

IDLE_POLL = 0.02
"""Seconds between two looks while nothing is expected: of a push that was given up something may
still arrive, and it must do so before its blocks are used again."""

REMEMBERED = 4096
"""Failed pushes that are still known."""

Command = Callable[[], None]


@dataclass(frozen=True, slots=True)
class PushIdentity:
    """Who this rank is on the wire.

    Attributes:
        incarnation: the run of its engine.
        card: itself.
        ranks: how many the engine has.
        replicated: whether every rank holds the same bytes.
        batch: bytes that are worth a write.
        max_inflight: bytes that may be on their way to each decode engine.
    """

    incarnation: str
    card: RankCard
    ranks: int
    replicated: bool
    batch: int
    max_inflight: int


class PushWire:
    """See the module.

    Args:
        identity: who this rank is.
        transport: its end of the wire; closed with this.
        report: called with receipts, from the wire's thread.
        wake: called when a receive has ended, from the wire's thread.
        threads: how its thread begins.
        timeline: where spans go.
    """

    def __init__(
        self,
        identity: PushIdentity,
        transport: Transport,
        *,
        report: Callable[[Iterable[TransferReceipt]], None],
        wake: Callable[[], None],
        threads: Threads | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._identity = identity
        self._transport = transport
        self._report = report
        self._wake = wake
        self._timeline = timeline
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._cards: dict[str, EngineCard] = {}
        self._streams: dict[tuple[str, int], PushStream] = {}
        # As long as a push goes there.
        self._destinations: WeakValueDictionary[str, Destination] = WeakValueDictionary()
        self._gathers: Gathers[tuple[int, OutgoingOrder]] = Gathers()
        self._failed: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._receives = Receives(identity.incarnation)
        self._ordered_in: dict[TransferId, int] = {}
        self._ended: deque[tuple[str, TransferReceipt]] = deque()
        self._complaints = Complaints(log)
        self._deaf = ""
        self._closed = False
        self._dead = ""
        threads = threads or Threads()
        self._fences = FenceWatch(lambda: self._do(_look), threads)
        self._thread = threads.start("push", self._run, self._died)

    # -- the engine's thread -----------------------------------------------------------------

    def carry_out(self, plan: PushPlan, step: int = 0) -> None:
        """Begin what does not depend on the step; its orders come through :meth:`begin`.

        Args:
            plan: what to do.
            step: the step whose plan it is part of, for the timeline.
        """
        # First: a peer that has come back between two steps is in both.
        for incarnation in plan.gone:
            self._do(lambda name=incarnation: self._forget(name))  # type: ignore[misc]
        for peer in plan.peers:
            self._do(lambda peer=peer: self._connect(peer))  # type: ignore[misc]
        for stop in plan.stops:
            self._do(lambda stop=stop: self._stop(stop))  # type: ignore[misc]
        for receive in plan.receives:
            self._do(lambda order=receive: self._expect(order, step))  # type: ignore[misc]
        for bound in plan.bindings:
            self.bind(bound)
        for dropped in plan.drops:
            self._do(lambda t=dropped: self._drop(t))  # type: ignore[misc]
        for owed in plan.senders:
            ends = owed.ends[self._identity.card.rank]
            self._do(lambda t=owed.transfer, e=ends: self._receives.owed_by(t, e))  # type: ignore[misc]
        for transfer in plan.give_ups:
            self._do(lambda t=transfer: self._receives.give_up(t, "given_up"))  # type: ignore[misc]

    def begin(self, order: PushOrder, step: int) -> OutgoingOrder:
        """An order in the plan for ``step``, whose rows will follow."""
        outgoing = OutgoingOrder(self._do)
        until = time.monotonic() + order.patience
        self._do(lambda: self._begin(order, step, outgoing, until))
        return outgoing

    def gather(self, transfer: TransferId, step: int) -> OutgoingOrder:
        """A prompt that is completed in ``step`` and has no destination yet. Its rows will follow,
        and are kept until there is one."""
        gathered = OutgoingOrder(self._do, lambda failure: self._fail_gather(transfer, failure))
        self._do(lambda: self._gather(transfer, step, gathered))
        return gathered

    def bind(self, binding: Binding) -> None:
        """Where a prompt goes that is gathered, was, or will be. Any thread may say so, and it may
        be said twice."""
        bound = Bound(binding, time.monotonic() + binding.order.patience)
        self._do(lambda: self._bind(bound))

    def ended(self) -> list[tuple[str, TransferReceipt]]:
        """Requests whose push into this rank is over, since the last call."""
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        return ended

    def close(self, timeout: float) -> bool:
        """Call back what is on its way, and stop; False if that took longer than ``timeout``
        seconds."""
        self._commands.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _do(self, command: Command) -> None:
        self._commands.put(command)

    # -- the wire's thread -------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            try:
                self._take_commands()
                self._pump()
            # Not Exception: whoever counts on a push waits for this thread.
            except BaseException:
                log.exception("the wire of rank %d raised", self._identity.card.rank)
        for stream in self._streams.values():
            stream.fail("closed")
            stream.advance()
            stream.settle()
        self._fences.close()
        self._transport.close()

    def _died(self, error: BaseException) -> None:
        """The thread cannot work. It stays to say so of every push."""
        log.error(
            "nothing more is pushed from or to rank %d until the engine is restarted: %r",
            self._identity.card.rank,
            error,
        )
        self._dead = type(error).__name__
        for stream in self._streams.values():
            stream.fail(self._dead)
        self._run()

    def _take_commands(self) -> None:
        timeout = IDLE_POLL
        if any(stream.moves for stream in self._streams.values()):
            timeout = SENDING_POLL
        else:
            for stream in self._streams.values():
                if stream.awaits is not None:
                    self._fences.watch(stream.awaits)
            if len(self._receives):
                timeout = RECEIVING_POLL
        try:
            command = self._commands.get(timeout=timeout)
            while True:
                if command is None:
                    self._closed = True
                    return
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _pump(self) -> None:
        for name, stream in self._streams.items():
            _take(name, stream, stream.advance)
        for destination in list(self._destinations.values()):
            destination.post()
        for name, stream in list(self._streams.items()):
            _take(name, stream, stream.settle)
            if stream.finished:
                del self._streams[name]
                if stream.failure:
                    self._remember(name, stream.failure)
        try:
            if not self._dead:
                self._take_notices()
            if reason := self._dead or self._deaf:
                self._receives.give_up_all(reason)
        finally:
            if ended := self._receives.ended():
                self._note(ended)
                self._ended.extend(ended)
                self._wake()

    def _remember(self, name: tuple[str, int], failure: str) -> None:
        """A push has failed: orders on their way do not begin it anew."""
        self._failed[name] = failure
        while len(self._failed) > REMEMBERED:
            self._failed.popitem(last=False)

    def _expect(self, order: ReceiveOrder, step: int) -> None:
        self._ordered_in[order.transfer] = step
        self._receives.expect(order)

    def _note(self, ended: Iterable[tuple[str, TransferReceipt]]) -> None:
        """Put receives that are over on the timeline."""
        for _, receipt in ended:
            step = self._ordered_in.pop(receipt.transfer)
            if self._timeline is not None:
                began = Timeline.now() - receipt.seconds
                self._timeline.add(Lane.RECEIVE, step, -1, began)

    def _take_notices(self) -> None:
        # Also if nothing is heard any more: what peers still write may only arrive meanwhile.
        try:
            notices = self._transport.notices()
        except Exception as error:
            if not self._deaf:
                self._deaf = type(error).__name__
                log.exception(
                    "nothing more is received from other engines until this one is restarted"
                )
            return
        for notice in notices:
            try:
                self._receives.notice(notice)
            except Exception as error:  # says nothing about others
                name = printable(notice.peer)
                self._complaints.warn(f"a notice from {name} is dropped: {error!r}")

    def _connect(self, peer: PeerOrder) -> None:
        if peer.incarnation not in self._cards:
            self._cards[peer.incarnation] = decode_card(peer.card)

    def _routes(self, card: EngineCard) -> tuple[PushRoute, ...]:
        """Whom this rank sends to; for each push anew, because a connection may have failed."""
        mine = self._identity
        found = routes(
            mine.card.rank,
            mine.ranks,
            len(card.ranks),
            replicated=mine.replicated or card.replicated,
        )
        return tuple(
            PushRoute(route, card.ranks[route.rank], self._reach(card, route.rank))
            for route in found
        )

    def _reach(self, card: EngineCard, rank: int) -> Peer:
        try:
            return self._transport.connect(card.ranks[rank].wire)
        except (TransportError, ValueError, OverflowError) as error:
            log.warning("rank %d of decode engine %s: %s", rank, card.incarnation, error)
            return Peer("")

    def _begin(self, order: PushOrder, step: int, outgoing: OutgoingOrder, until: float) -> None:
        name = (order.peer, order.epoch)
        stream = self._streams.get(name)
        try:
            if stream is None:
                stream = self._streams[name] = self._open(order, until)
            sending = stream.begin(order, step)
        except Exception as error:
            # A push that cannot be sent still has to answer every one of its orders.
            log.exception("push %d to %s", order.epoch, order.peer)
            reason = type(error).__name__
            if stream is None:
                stream = self._streams[name] = self._open(order, until, reason)
            stream.fail(reason)
            sending = stream.begin(order, step)
        outgoing.bind(stream, sending)

    def _gather(self, transfer: TransferId, step: int, gathered: OutgoingOrder) -> None:
        if (bound := self._gathers.begin(transfer, (step, gathered))) is not None:
            self._send_gathered(bound, step, gathered)

    def _bind(self, bound: Bound) -> None:
        if (found := self._gathers.bind(bound)) is not None:
            self._send_gathered(bound, *found)

    def _send_gathered(self, bound: Bound, step: int, gathered: OutgoingOrder) -> None:
        # The plan that names the peer may be on its way.
        self._connect(bound.binding.peer)
        self._begin(bound.binding.order, step, gathered, bound.until)

    def _drop(self, transfer: TransferId) -> None:
        self._gathers.end(transfer)

    def _fail_gather(self, transfer: TransferId, failure: str) -> None:
        if self._gathers.end(transfer):
            self._report([TransferReceipt(transfer, Outcome.FAILED, reason=failure)])

    def _open(self, order: PushOrder, until: float, failure: str = "") -> PushStream:
        """A new push; with a ``failure`` it sends nothing."""
        card = self._cards.get(order.peer)
        failure = failure or self._dead or self._failed.get((order.peer, order.epoch), "")
        if card is None:
            failure = failure or "unreachable"
        return PushStream(
            order.peer,
            order.epoch,
            self._identity.card,
            () if card is None or failure else self._routes(card),
            self._transport,
            self._destinations.setdefault(
                order.peer, Destination(self._identity.max_inflight, self._identity.batch)
            ),
            failure=failure,
            batch=self._identity.batch,
            until=until,
            report=lambda receipt: self._report([receipt]),
            timeline=self._timeline,
        )

    def _stop(self, stop: PushStop) -> None:
        name = (stop.peer, stop.epoch)
        if (stream := self._streams.get(name)) is not None:
            stream.fail("stopped")
        elif name not in self._failed:  # its first order may be in the same plan
            self._remember(name, "stopped")

    def _forget(self, incarnation: str) -> None:
        self._cards.pop(incarnation, None)


def _look() -> None:
    """A command that has the wire's thread look at everything."""


def _take(name: tuple[str, int], stream: PushStream, step: Callable[[], None]) -> None:
    """Let a push take a step; if it cannot, it has failed, and no other one has."""
    try:
        step()
    except Exception as error:
        log.exception("push %d to %s", name[1], name[0])
        stream.fail(type(error).__name__)


class OutgoingOrder:
    """One order, as the engine's thread sees it.

    Args:
        do: queues something for the wire's thread.
        fails: called on that thread if the order fails before it is bound.
    """

    def __init__(
        self, do: Callable[[Command], None], fails: Callable[[str], None] = lambda failure: None
    ) -> None:
        self._do = do
        self._fails = fails
        self._stream: PushStream | None = None
        self._sending: Sending | None = None
        self._kept: list[tuple[int, Fence]] = []
        self._over = False

    def bind(self, stream: PushStream, sending: Sending) -> None:
        """Used by :class:`PushWire` alone, on its thread."""
        self._stream, self._sending = stream, sending
        sending.fenced.extend(self._kept)
        sending.over = self._over
        self._kept.clear()

    def row_ready(self, row: int, fence: Fence) -> None:
        """A row is written once ``fence`` has passed."""
        self._do(lambda: self._add(row, fence))

    def over(self, failure: str) -> None:
        """No more rows will come; ``failure`` says why none of it may be believed, if so."""
        self._do(lambda: self._end(failure))

    def _add(self, row: int, fence: Fence) -> None:
        kept = self._kept if self._sending is None else self._sending.fenced
        kept.append((row, fence))

    def _end(self, failure: str) -> None:
        self._over = True
        if self._sending is not None:
            self._sending.over = True
        if failure and self._stream is not None:
            self._stream.fail(failure)
        elif failure:
            self._fails(failure)

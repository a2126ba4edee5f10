"""Inbound pushes of one rank: which are expected, which are there, which come too late."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from lamina_kv.plan import Outcome, ReceiveOrder, TransferId, TransferReceipt
from lamina_kv.push.messages import Delivered, decode
from lamina_kv.push.transports.base import Notice

EARLY = 4096
"""Pushes of which notices are kept although nobody expects them yet."""

MAX_ENDS = 1024
"""Ends whose notices of one push are kept; more than ranks that could owe it something."""


@dataclass(slots=True)
class Receive:
    """A push that is expected.

    Attributes:
        order: the order.
        began: when it came, on the clock of ``time.monotonic``.
        senders: ends that owe this rank something; empty while they are not known.
        delivered: ends that have said that they have delivered.
    """

    order: ReceiveOrder
    began: float
    senders: frozenset[str] = frozenset()
    delivered: set[str] = field(default_factory=set)


class Receives:
    """Every push that this rank expects. Not thread safe.

    A push is there when all who owe something have said so. Who they are is what control says, and
    never what a notice says; who has sent a notice is what the transport says.

    Args:
        incarnation: this engine.
    """

    def __init__(self, incarnation: str) -> None:
        self._incarnation = incarnation
        self._expected: dict[int, Receive] = {}
        self._early: OrderedDict[int, set[str]] = OrderedDict()
        self._newest = 0
        self._ended: list[tuple[str, TransferReceipt]] = []

    def __len__(self) -> int:
        return len(self._expected)

    def expect(self, order: ReceiveOrder) -> None:
        """A push will come; perhaps it has."""
        self._newest = max(self._newest, order.transfer)
        delivered = self._early.pop(order.transfer, set())
        self._expected[order.transfer] = Receive(order, time.monotonic(), delivered=delivered)

    def owed_by(self, transfer: TransferId, ends: Iterable[str]) -> None:
        """Who owes this rank something of a push."""
        receive = self._expected.get(transfer)
        if receive is not None:
            receive.senders = frozenset(ends)
            self._end_if_delivered(receive)

    def give_up(self, transfer: TransferId, reason: str) -> None:
        """Nobody waits for it any more; nothing happens if it is over."""
        receive = self._expected.pop(transfer, None)
        if receive is not None:
            self._end(receive, Outcome.FAILED, reason)

    def give_up_all(self, reason: str) -> None:
        """Nothing more can be heard of any."""
        for transfer in list(self._expected):
            self.give_up(TransferId(transfer), reason)

    def notice(self, notice: Notice) -> None:
        """Something has come from a peer; what is not for this run of the engine is dropped.

        Raises:
            MalformedMessageError: if nobody understands it.
        """
        message = decode(notice.body)
        if isinstance(message, Delivered) and message.incarnation == self._incarnation:
            self._deliver(notice.peer, message.epoch)

    def ended(self) -> list[tuple[str, TransferReceipt]]:
        """Requests whose push is over, well or not, since the last call."""
        now = time.monotonic()
        for receive in list(self._expected.values()):
            if now - receive.began >= receive.order.deadline:
                self.give_up(receive.order.transfer, "deadline")
        ended, self._ended = self._ended, []
        return ended

    def _deliver(self, end: str, epoch: int) -> None:
        receive = self._expected.get(epoch)
        if receive is not None:
            _keep(receive.delivered, end)
            self._end_if_delivered(receive)
        elif epoch > self._newest:  # the order is on its way
            _keep(self._early.setdefault(epoch, set()), end)
            if len(self._early) > EARLY:
                self._early.popitem(last=False)

    def _end_if_delivered(self, receive: Receive) -> None:
        if receive.senders and receive.delivered >= receive.senders:
            del self._expected[receive.order.transfer]
            self._end(receive, Outcome.DONE, "")

    def _end(self, receive: Receive, outcome: Outcome, reason: str) -> None:
        seconds = time.monotonic() - receive.began
        receipt = TransferReceipt(receive.order.transfer, outcome, seconds=seconds, reason=reason)
        self._ended.append((receive.order.request_id, receipt))


def _keep(ends: set[str], end: str) -> None:
    if len(ends) < MAX_ENDS:
        ends.add(end)

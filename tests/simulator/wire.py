"""A transport between ends of one process, in which a test decides what moves and what goes wrong.

Nothing moves by itself: :meth:`Network.step` lets one thing happen, chosen by the test's own
generator, so that a history is repeated by its seed. What moves is modelled as NIXL over TCP was
seen to do it: a stretch is read from the source at one time and lands at another; what has been
read still lands when its sender is closed or dead, even after a partition has healed; and nothing
lands at an end that was closed.
"""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, field

import numpy as np

from lamina_kv.push.transports.base import (
    Notice,
    Peer,
    Region,
    Spans,
    Transport,
    TransportError,
    Write,
    WriteState,
)


@dataclass(eq=False)
class _Flight:
    """One stretch of a write, or a notice (``write`` is None), on its way."""

    sender: SimTransport
    receiver: SimTransport
    write: SimWrite | None
    source: tuple[int, int]
    target: int
    payload: bytes | None


class SimWrite(Write):
    """One write; it is done when each of its stretches has landed."""

    def __init__(self, pending: int) -> None:
        self.pending = pending
        self.now = WriteState.MOVING

    def state(self) -> WriteState:
        return self.now


@dataclass
class Network:
    """All ends, and what is between them.

    Attributes:
        flights: what is on its way; a payload of None has not left its source yet.
        cut: pairs of ends between which nothing moves, in both orders.
        stopped: ends that neither read nor take anything.
    """

    flights: list[_Flight] = field(default_factory=list)
    ends: dict[Peer, SimTransport] = field(default_factory=dict)
    cut: set[tuple[Peer, Peer]] = field(default_factory=set)
    stopped: set[Peer] = field(default_factory=set)
    _made: int = 0

    def end(self, regions: list[Region]) -> SimTransport:
        """A new end, under a name that was never used."""
        self._made += 1
        end = SimTransport(self, Peer(f"end-{self._made}"), regions)
        self.ends[end.name] = end
        return end

    def step(self, rng: random.Random) -> bool:
        """Let one thing leave or land. False if nothing can."""
        able = [flight for flight in self.flights if self._can_move(flight)]
        if not able:
            return False
        flight = rng.choice(able)
        if flight.payload is None:
            flight.payload = ctypes.string_at(*flight.source)
            return True
        self.flights.remove(flight)
        if flight.write is None:
            flight.receiver.inbox.append(Notice(flight.sender.name, flight.payload))
            return True
        ctypes.memmove(flight.target, flight.payload, len(flight.payload))
        flight.write.pending -= 1
        if not flight.write.pending and flight.write.now is WriteState.MOVING:
            flight.write.now = WriteState.DONE
        return True

    def partition(self, one: Peer, other: Peer) -> None:
        """Between the two nothing moves until :meth:`heal`."""
        self.cut |= {(one, other), (other, one)}

    def heal(self, one: Peer, other: Peer) -> None:
        self.cut -= {(one, other), (other, one)}

    def kill(self, name: Peer) -> None:
        """The process of an end dies: as if it had closed it, without a word."""
        self.ends[name].close()

    def fail(self, write: Write) -> None:
        """A write fails; what has been read of it still lands."""
        self._give_up([flight for flight in self.flights if flight.write is write])

    def drop_end(self, end: SimTransport) -> None:
        """What an end that is closed does to what is on its way."""
        self._give_up(
            [flight for flight in self.flights if end in (flight.sender, flight.receiver)]
        )
        self.flights = [flight for flight in self.flights if flight.receiver is not end]

    def _give_up(self, flights: list[_Flight]) -> None:
        for flight in flights:
            if flight.write is not None and flight.write.now is WriteState.MOVING:
                flight.write.now = WriteState.FAILED
        self.flights = [
            flight for flight in self.flights if flight.payload is not None or flight not in flights
        ]

    def _can_move(self, flight: _Flight) -> bool:
        if flight.payload is None:
            return flight.sender.name not in self.stopped
        pair = (flight.sender.name, flight.receiver.name)
        return pair not in self.cut and flight.receiver.name not in self.stopped


class SimTransport(Transport):
    """One end; see the module."""

    def __init__(self, network: Network, name: Peer, regions: list[Region]) -> None:
        self._name = name
        self.inbox: list[Notice] = []
        self._network = network
        self._regions = regions
        self._connected: dict[Peer, SimTransport] = {}
        self._open = True

    @property
    def name(self) -> Peer:
        return self._name

    def describe(self) -> bytes:
        return b"sim:" + self.name.encode()

    def connect(self, description: bytes) -> Peer:
        self._check_open()
        kind, _, name = description.partition(b":")
        if kind != b"sim" or Peer(name.decode()) not in self._network.ends:
            raise TransportError(f"not a simulated end: {description!r}")
        peer = Peer(name.decode())
        self._connected[peer] = self._network.ends[peer]
        return peer

    def write(self, peer: Peer, local: Spans, remote: Spans) -> Write:
        receiver = self._peer(peer)
        if not len(local) or not np.array_equal(local[:, 1], remote[:, 1]):
            raise ValueError("a write needs stretches, of equal lengths at both ends")
        sources = [(int(address), int(length)) for address, length in local]
        targets = [(int(address), int(length)) for address, length in remote]
        for end, stretches in ((self, sources), (receiver, targets)):
            for address, length in stretches:
                end.check_inside(address, length)
        write = SimWrite(len(sources))
        if not receiver.is_open:
            write.now = WriteState.FAILED
            return write
        self._network.flights += [
            _Flight(self, receiver, write, source, target, None)
            for source, (target, _) in zip(sources, targets, strict=True)
        ]
        return write

    def notify(self, peer: Peer, body: bytes) -> None:
        receiver = self._peer(peer)
        if not receiver.is_open:
            raise TransportError(f"peer {peer} is gone")
        self._network.flights.append(_Flight(self, receiver, None, (0, 0), 0, bytes(body)))

    def notices(self) -> list[Notice]:
        self._check_open()
        inbox, self.inbox = self.inbox, []
        return inbox

    def close(self) -> None:
        if self._open:
            self._open = False
            self._network.drop_end(self)

    @property
    def is_open(self) -> bool:
        return self._open

    def check_inside(self, address: int, length: int) -> None:
        if not any(
            region.address <= address and address + length <= region.address + region.size
            for region in self._regions
        ):
            raise ValueError(f"{length} bytes at {address:#x} are not in one registered region")

    def _peer(self, peer: Peer) -> SimTransport:
        self._check_open()
        try:
            return self._connected[peer]
        except KeyError:
            raise TransportError(f"peer {peer} is not connected") from None

    def _check_open(self) -> None:
        if not self._open:
            raise TransportError("this end is closed")

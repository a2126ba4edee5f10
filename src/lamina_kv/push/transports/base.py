"""What a transport is: one rank's end of the wire on which cache pages leave and arrive.

Writes are one-sided: the sender names addresses of its own memory and of the receiver's, and the
receiver's engine does not take part. A transport knows bytes and peers and nothing of requests.

A write that was begun cannot be called back: whoever wants its source back waits until it has
ended, or closes the end, and with it every write to and from every peer. A rank has one end for all
of its peers, because each end registers the whole cache with the network, and it keeps that end for
as long as it serves. So an engine cannot fence one peer by itself: blocks that a peer may still
write to stay leased until the peer says that nothing is on its way, or until its process has ended,
which closes its end, and ``push.quarantine`` has passed. ``push.max_parked`` bounds how many those
are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

import numpy as np
import numpy.typing as npt

Spans = npt.NDArray[np.uint64]
"""Stretches of memory: shape ``(n, 2)``, each an address and a length in bytes."""

Peer = NewType("Peer", str)
"""The name of another rank's end; never used again once that end is gone."""


class TransportError(Exception):
    """A peer cannot be reached any more, or never could. Says which and why."""


class WriteState(StrEnum):
    """How far a write is. Past ``MOVING`` it stays as it is, and its source may be reused."""

    MOVING = "moving"
    DONE = "done"
    """All of it is in the peer's memory, where the peer can see it."""
    FAILED = "failed"
    """Any part of it may be in the peer's memory, or may still arrive there, until the peer closes
    the end that it was sent to."""


@dataclass(frozen=True, slots=True)
class Region:
    """Memory that a transport may read for its own writes and that peers may write.

    Attributes:
        address: its first byte.
        size: bytes.
        device: index of the accelerator that it is on; -1 for host memory.
    """

    address: int
    size: int
    device: int = -1


@dataclass(frozen=True, slots=True)
class Notice:
    """A few bytes that a peer sent.

    Attributes:
        peer: who.
        body: what; opaque to the transport.
    """

    peer: Peer
    body: bytes


class Write(ABC):
    """One write that was begun."""

    @abstractmethod
    def state(self) -> WriteState:
        """How far it is. Does not wait, and moves the transport along: a write whose state nobody
        asks for may never end."""


class Transport(ABC):
    """See the module. Every method but :meth:`describe` is called from one thread, none waits for a
    peer, and none keeps the interpreter lock while bytes move.
    """

    @property
    @abstractmethod
    def name(self) -> Peer:
        """What peers know this end by: the sender of the notices that come from it."""

    @abstractmethod
    def describe(self) -> bytes:
        """What a peer must know to connect to this end; opaque, and new for every end."""

    @abstractmethod
    def connect(self, description: bytes) -> Peer:
        """Make a peer's end known, so that it can be written to. One that has gone meanwhile shows
        here or at the first write. One that is known is connected anew if its connection has
        failed.

        Raises:
            TransportError: if the description is not one, is of another kind of transport, or
                nobody is there.
        """

    @abstractmethod
    def write(self, peer: Peer, local: Spans, remote: Spans) -> Write:
        """Begin to copy ``local[i]`` of this end to ``remote[i]`` of the peer's.

        Where the wire is a copy between two processes' memories, it is done in this call.

        Args:
            peer: to whom.
            local: stretches inside this end's regions.
            remote: stretches of the same lengths inside the peer's regions.

        Returns:
            The write; one to a peer that has gone meanwhile has failed.

        Raises:
            TransportError: if the peer is not connected; nothing was begun.
            ValueError: if there are no stretches, lengths differ, or one is not in the regions;
                nothing was begun.
        """

    @abstractmethod
    def notify(self, peer: Peer, body: bytes) -> None:
        """Send a few bytes. They arrive once or not at all, in any order with regard to writes: who
        means "it is all there" must have seen those writes done.

        Raises:
            TransportError: if the peer is not connected or gone.
        """

    @abstractmethod
    def notices(self) -> list[Notice]:
        """What has come since the last call. Moves the transport along: what peers write to this
        end may only arrive, and notices from this end may only leave, while somebody calls this.

        Raises:
            TransportError: if this end is closed or broken.
        """

    @abstractmethod
    def close(self) -> None:
        """Give everything up at once. Idempotent.

        As a sender: every write that was moving has failed, and no source is read any more; what
        has left may still arrive.

        As a receiver: nothing that comes through a network can arrive any more, whenever it was
        sent. A peer on the same machine that copies straight into this process's memory is not
        stopped by that: it has ended when it says so, or is dead.
        """

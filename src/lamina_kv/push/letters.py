"""What the link tells control, and what control gives to the link."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lamina_kv.push.cards import EngineCard, SenderCard
from lamina_kv.push.messages import NO_EPOCH, Attempt, Goodbye, LinkMessage

PeerName = str
"""Of a prefill engine, its address as requests name it; of a decode engine, its incarnation."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A peer is connected and has said who it is.

    Attributes:
        peer: its name.
        incarnation: which run of it.
        card: what it says of itself; of a prefill engine a :class:`SenderCard`.
        machine: IP address of a prefill engine, to which its name leads now; else empty.
    """

    peer: PeerName
    incarnation: str
    card: EngineCard | SenderCard | None = None
    machine: str = ""


class Fate(Enum):
    """What is known of a peer that is not connected any more."""

    CLOSED = "closed"
    """Its process has closed the connection, or nobody listens where it did."""
    SILENT = "silent"
    """It does not answer, but its process is there: it may be stopped, and go on one day."""
    UNREACHABLE = "unreachable"
    """Its machine does not answer."""
    UNKNOWN = "unknown"
    """Something on this side is in the way, such as the resolution of names or a lack of ports."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A peer is not connected any more, or could not be.

    Attributes:
        peer: its name.
        reason: why.
        was_open: whether it had been connected, so that it may have got what was sent.
        fate: what is known of it.
        announced: epoch of the newest attempt that was announced on this connection, or waited to
            be; without an epoch if none was. Control announces what it names to a prefill engine
            in the order of epochs, and one connection follows another. So what is newer goes by a
            later one.
        unsent: attempts that waited to be announced on it and will not be.
        goodbye: a prefill engine's last word; None if it has said none.
    """

    peer: PeerName
    reason: str
    was_open: bool
    fate: Fate
    announced: int = NO_EPOCH
    unsent: tuple[Attempt, ...] = ()
    goodbye: Goodbye | None = None


@dataclass(frozen=True, slots=True)
class Letter:
    """A message from or to a peer.

    Attributes:
        peer: its name.
        message: what is said.
    """

    peer: PeerName
    message: LinkMessage


@dataclass(frozen=True, slots=True)
class Due:
    """A moment has come at which control wanted to be asked."""


News = Opened | Lost | Letter | Due
"""What the link has to say."""

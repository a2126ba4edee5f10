"""What is known of one push to this engine: what it can do for a request, how far it is, and why it
is not waited for any longer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from math import inf

from lamina.control.leases import BlockLease
from lamina.control.push_claims import Whereabouts
from lamina.control.requests import RequestRecord
from lamina.push.messages import Attempt


class Stage(Enum):
    """How far an inbound push is."""

    ANNOUNCED = "announced"
    BOUND = "bound"
    QUARANTINED = "quarantined"
    """Given up, and its blocks are leased because something may still be on its way to them."""


class GiveUp(StrEnum):
    """Why a push that was announced is not waited for any longer, as metrics have it."""

    CANCELLED = "cancelled"
    """Its request has ended."""
    ABSENT = "absent"
    """The prefill engine has no such request."""
    UNANSWERED = "unanswered"
    """The prefill engine says nothing."""
    LOST = "lost"
    """There is no connection to the prefill engine."""
    FAILED = "failed"
    """The prefill engine says that it will not be complete."""
    DEADLINE = "deadline"
    """It has taken too long."""
    WIRE = "wire"
    """A rank says that nothing more can come."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a push can do for a request that has no blocks yet.

    Attributes:
        end: tokens that the request would have with it; 0 for nothing.
        reason: why nothing; empty if no push was meant for it.
        ask_again: whether there may be room for it soon.
    """

    end: int
    reason: str = ""
    ask_again: bool = False


@dataclass(slots=True)
class Inbound:
    """A push that was announced.

    Attributes:
        attempt: its name.
        address: the prefill engine's.
        record: its request.
        lease: hold on its blocks.
        whereabouts: what the prefill engine has said of the request.
        compute: seconds that it would take to compute here what is pushed; None if nobody knows.
        stage: how far it is.
        reason: why it was given up; empty while it was not.
        cause: the same, as metrics have it.
        fenced: whether its sender has said that nothing is on its way any more.
        untold: whether nobody was ever told of its blocks.
        trying: whether it is the one try of its peer's breaker.
        blameless: whether its peer has said why not, and that is no fault of the peer's.
        until: control's clock after which a quarantine ends by itself.
        stopped: whether its sender's process was there and did not answer, for all that is known.
        incarnation: the run of the prefill engine that was connected last; empty for none yet.
        lingering: control's clock before which what a former run has sent may still arrive.
    """

    attempt: Attempt
    address: str
    record: RequestRecord
    lease: BlockLease
    whereabouts: Whereabouts
    compute: float | None
    trying: bool
    blameless: bool = False
    stage: Stage = Stage.ANNOUNCED
    reason: str = ""
    cause: GiveUp | None = None
    fenced: bool = False
    untold: bool = False
    until: float = inf
    stopped: bool = False
    incarnation: str = ""
    lingering: float = 0.0

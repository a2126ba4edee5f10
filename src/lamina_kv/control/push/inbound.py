"""What is known of one push to this engine: what it can do for a request, how far it is, and why it
is not waited for any longer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from math import inf

from lamina_kv.control.leases import BlockLease
from lamina_kv.control.push.claims import Whereabouts
from lamina_kv.control.requests import RequestRecord
from lamina_kv.push.cards import SenderCard
from lamina_kv.push.letters import Fate
from lamina_kv.push.messages import Attempt

CALLS = 2
"""Dials that must have ended since a quarantine's time is up without finding the sender's process
stopped. The first may have begun before."""

LONGEST_SUSPICION = 3600.0
"""Seconds for which blocks are held for a peer that had gone, and whose address takes connections
without a word. The peer may be stopped, after a firewall has ended its connection. Or somebody else
listens there, who needs no secret to say nothing."""


class Stage(Enum):
    """How far an inbound push is."""

    ANNOUNCED = "announced"
    BOUND = "bound"
    QUARANTINED = "quarantined"
    """Given up, and its blocks are leased because something may still be on its way to them."""


class Unpushed(StrEnum):
    """Why no push is announced for a request that was meant for one, as metrics have it. What was
    not announced is given up for some of the reasons of :class:`GiveUp`, too."""

    BELOW_MIN_TOKENS = "below_min_tokens"
    TOO_LARGE = "too_large"
    NO_ROOM = "no_room"
    PEER_OUT_OF_USE = "peer_out_of_use"
    ID_IN_USE = "id_in_use"
    NOT_NEEDED = "not_needed"
    STATES_IN_PLACE = "states_in_place"


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
class PushOffer:
    """What a push can do for a request that has no blocks yet.

    Attributes:
        end: tokens that the request would have with it; 0 for nothing.
        reason: why nothing; empty if no push was meant for it.
        ask_again: whether there may be room for it soon.
    """

    end: int
    reason: str = ""
    ask_again: bool = False


@dataclass(frozen=True, slots=True)
class Sender:
    """A prefill engine that is connected.

    Attributes:
        card: what it says of itself.
        machine: where it runs, as an IP address.
    """

    card: SenderCard
    machine: str


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
        until: control's clock after which a quarantine ends, see :meth:`is_over`.
        stopped: whether its sender's process was there and did not answer, for all that is known.
        gone: control's clock when its sender's process was first known not to be there, or its
            machine; None if it was not since it was connected.
        calls: dials that have ended since ``until`` and not found its sender's process stopped.
        incarnation: the run of the prefill engine that was connected last since it was told of it;
            empty until that connection is over.
        machine: where that runs, as an IP address.
        lingering: control's clock before which what a former run has sent may still arrive.
        left_at: the machine where a former run was stopped when another machine had its name;
            empty if none was.
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
    gone: float | None = None
    calls: int = 0
    incarnation: str = ""
    machine: str = ""
    lingering: float = 0.0
    left_at: str = ""

    @property
    def ends(self) -> float:
        """Control's clock before which its quarantine does not end."""
        return max(self.until, self.lingering)

    def is_over(self, now: float) -> bool:
        """Whether nothing of it can be on its way any more. Time alone does not say so, unless its
        sender has: that could have been stopped since it was seen to go."""
        if now < self.ends:
            return False
        suspected = self.gone is not None and now < self.gone + LONGEST_SUSPICION
        return self.fenced or self.calls >= CALLS or not (self.gone is None or suspected)

    def told(self, sender: Sender) -> None:
        """The connection is over on which a run of its prefill engine was told of it."""
        self.incarnation, self.machine = sender.card.incarnation, sender.machine

    def connected(self, sender: Sender, now: float, quarantine: float) -> None:
        """A run of its prefill engine is connected, and will be asked. It does not answer for what
        a former one has sent: workers may outlive their engine, and bytes their sender. Nor can it
        have taken the place of one that is stopped, unless it listens on the same machine. What was
        announced on no former connection goes by this one, or a later one.

        Args:
            sender: the run.
            now: control's clock.
            quarantine: ``push.quarantine``.
        """
        if not self.incarnation:
            return
        incarnation, machine = sender.card.incarnation, sender.machine
        if not self.fenced and self.incarnation != incarnation:
            stays = self.stopped and self.machine != machine
            sent = self.until if stays else min(self.until, now + quarantine)
            self.lingering = max(self.lingering, sent)
            if stays:
                self.left_at = self.machine
        if self.left_at and self.left_at == machine:
            self.lingering = min(self.lingering, now + quarantine)
            self.left_at = ""
        if not self.fenced:
            self.until, self.gone, self.calls = inf, None, 0
        self.incarnation, self.machine, self.stopped = incarnation, machine, False

    def lost(self, fate: Fate, now: float, quarantine: float) -> None:
        """Its prefill engine is not connected any more, or could not be, and has not fenced it.

        Args:
            fate: what is known of it.
            now: control's clock.
            quarantine: ``push.quarantine``.
        """
        if fate is Fate.SILENT:  # it could go on in the middle of a write
            if self.gone is None:
                self.until = inf
            else:
                self.until = max(self.until, self.gone + LONGEST_SUSPICION)
            self.stopped, self.calls = True, 0
            return
        if now >= self.until:
            self.calls = min(CALLS, self.calls + 1)
        if fate is Fate.CLOSED or (fate is Fate.UNREACHABLE and not self.stopped):
            self.gone = now if self.gone is None else self.gone
            self.until = min(self.until, now + quarantine)
            self.stopped = False

"""What a prefill engine knows of one push."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import inf

from lamina_kv.control.leases import BlockLease
from lamina_kv.control.requests import RequestRecord
from lamina_kv.plan import TransferId
from lamina_kv.push.messages import NO_EPOCH, Announce, Attempt


class Stage(Enum):
    """How far an outbound push is."""

    WAITING = "waiting"
    BOUND = "bound"
    STOPPED = "stopped"
    """Nothing more is sent; something may still be on its way."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of a prompt the blocks of its request hold.

    Attributes:
        losses: how often the engine had taken the request's blocks away. Once it has done so again,
            nothing of this is true any more.
        computed: tokens that are known to be computed before the step that is being planned.
        planned: those that are computed when that step is over.
    """

    losses: int = 0
    computed: int = 0
    planned: int = 0


@dataclass(slots=True)
class Outbound:
    """A push that a router has named, or a decode engine.

    Attributes:
        push: the router's id.
        expires: control's clock after which nobody waits for it any more.
        request: the request's id, once it is here.
        arrived: control's clock when it came.
        ended: whether it has ended.
        claimed: control's clock when its decode engine first spoke of it.
        record: the request, once the engine has given it blocks.
        peer: incarnation of the decode engine that was the first to claim or announce it, and that
            alone has a say in it; empty until then.
        announce: what it has announced.
        stage: how far it is.
        noted: what was last said of the request's progress; see :attr:`progress`.
        sent: per group, index in the prompt of the first block that was not ordered.
        states: per recurrent group, the newest boundary state: tokens that it stands behind, block,
            lease.
        tables: block ids per group, once the request has ended.
        held: hold on those blocks, until everything is ordered.
        offer: what the ranks gather for whoever announces it, while nobody is known to have.
        offered: plans that were made since the one that orders it.
        moving: transfers that are not terminal.
        ordered: whether everything is ordered.
        torn: whether a write has failed.
        let_go_at: control's clock after which, if it was stopped, its blocks are not held any
            more, although something may still read them: it will not be believed.
        weight: block ids that were announced before it was known what they are for.
    """

    push: str
    expires: float
    request: str = ""
    arrived: float = -inf
    ended: bool = False
    claimed: float = -inf
    record: RequestRecord | None = None
    peer: str = ""
    announce: Announce | None = None
    stage: Stage = Stage.WAITING
    noted: Progress = Progress()
    sent: list[int] = field(default_factory=list)
    states: dict[int, tuple[int, int, BlockLease]] = field(default_factory=dict)
    tables: tuple[tuple[int, ...], ...] | None = None
    held: BlockLease | None = None
    offer: TransferId | None = None
    offered: int = 0
    moving: set[TransferId] = field(default_factory=set)
    ordered: bool = False
    torn: bool = False
    let_go_at: float = inf
    weight: int = 0

    @property
    def waits_here(self) -> bool:
        """Whether its request is here and has no blocks."""
        return bool(self.request) and self.record is None

    @property
    def attempt(self) -> Attempt:
        """What its decode engine calls it."""
        return Attempt(self.push, NO_EPOCH) if self.announce is None else self.announce.attempt

    def is_for(self, peer: str) -> bool:
        """Whether it has no destination yet, and ``peer`` may give it one."""
        return self.announce is None and self.peer in ("", peer)

    @property
    def progress(self) -> Progress:
        """How much of the prompt its blocks hold."""
        if self.record is None:
            return Progress()
        losses = self.record.losses
        # The blocks of a request that has ended are held.
        if self.tables is None and self.noted.losses != losses:
            return Progress(losses)
        return self.noted

    def let_go(self) -> None:
        """Give up every hold that belongs to no transfer."""
        if self.held is not None:
            self.held.release()
            self.held = None
        for _, _, lease in self.states.values():
            lease.release()
        self.states.clear()

"""One record for every movement. There is no other place where its state is kept.

::

    LOAD   PLANNED → DONE (in the engine) | FAILED
    SAVE   PLANNED → DONE (its source is free, and it is loadable from the host) | FAILED
    WRITE  PLANNED → DONE (durable on disk) | FAILED
    FETCH  PLANNED → DONE (from disk in the host, loadable from there) | FAILED
    PUSH   PLANNED → DONE (drained, in the other engine) | FAILED
    RECEIVE PLANNED → DONE (delivered by every sender) | FAILED

With several ranks a state is reached when every rank has reported it, by identity and not by
count; a transfer has failed when one rank has failed and all are terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from lamina.control.catalog import Location
from lamina.control.leases import BlockLease
from lamina.plan import TORN, ChunkKey, Outcome, TierName, TransferId, TransferReceipt


class Kind(Enum):
    """What moves where."""

    LOAD = "load"
    SAVE = "save"
    WRITE = "write"
    FETCH = "fetch"
    PUSH = "push"
    RECEIVE = "receive"


class State(Enum):
    """How far a transfer is."""

    PLANNED = "planned"
    DONE = "done"
    FAILED = "failed"

    @property
    def terminal(self) -> bool:
        """Whether nothing can follow."""
        return self in (State.DONE, State.FAILED)


@dataclass(slots=True)
class Transfer:
    """One movement.

    Attributes:
        id: its identity.
        kind: what moves.
        request_id: for whom, or "" for a write.
        step: the step whose plan carried it.
        expires: control's clock after which it is overdue.
        size: bytes over all ranks.
        chunks: where the chunks of a load are; where that of a save, write or fetch goes, and
            before it where it comes from, if from a tier.
        lease: hold on engine blocks that are read, for a save or a push, or written, for a load.
        layerwise: whether it is a load that runs in the step itself, so that the model computes on
            it before anybody knows its outcome.
        early: whether it is a load whose request may be resumed before its outcome is known.
        lasting: whether what it saves may be of use to a later process.
        tries: tiers that were out of use, and are tried by it.
        moving: ranks that are not terminal.
        poisoned: built on data that turned out bad; must never become visible.
        overdue: past its deadline; it no longer keeps the engine awake.
    """

    id: TransferId
    kind: Kind
    request_id: str
    step: int
    expires: float
    size: int
    chunks: tuple[Location, ...]
    moving: set[int]
    lease: BlockLease | None = None
    layerwise: bool = False
    early: bool = False
    lasting: bool = True
    tries: frozenset[TierName] = frozenset()
    state: State = State.PLANNED
    poisoned: bool = False
    overdue: bool = False
    failed: bool = False
    reason: str = ""
    bad_chunks: set[ChunkKey] = field(default_factory=set)
    moved_bytes: int = 0
    seconds: float = 0.0
    active: float = 0.0
    waited: float = 0.0
    released: bool = False
    busy: float = 0.0

    @property
    def may_be_computed_on(self) -> bool:
        """Whether the model may compute on what it brings before anybody knows its outcome."""
        return self.layerwise or self.early

    @property
    def computed_on(self) -> bool:
        """Whether it may have, now that it is over."""
        return self.layerwise or self.released

    @property
    def tiers(self) -> frozenset[TierName]:
        """Where it loads or fetches from, or saves or writes to."""
        if self.kind is Kind.FETCH:
            return frozenset((self.chunks[0].tier,))
        places = self.chunks if self.kind is Kind.LOAD else self.chunks[-1:]
        return frozenset(place.tier for place in places)

    def apply(self, rank: int, receipt: TransferReceipt) -> bool:
        """Take in one rank's word; a repeated or late one changes nothing.

        Returns:
            Whether that was the last rank, and the transfer is terminal.
        """
        if rank not in self.moving:
            return False
        self.moving.remove(rank)
        self.moved_bytes += receipt.moved_bytes
        self.seconds = max(self.seconds, receipt.seconds)
        self.active = max(self.active, receipt.active)
        self.waited = max(self.waited, receipt.waited)
        self.busy = max(self.busy, receipt.busy)
        self.released |= receipt.released
        if receipt.outcome is Outcome.FAILED:
            self.failed = True
            # One torn write is what matters, whatever the other ranks say.
            if receipt.reason == TORN or not self.reason:
                self.reason = receipt.reason
            self.bad_chunks.update(receipt.bad_chunks)
        if self.moving:
            return False
        self.state = State.FAILED if self.failed or self.poisoned else State.DONE
        return True


class TransferTable:
    """All transfers that are not terminal.

    Args:
        ranks: how many ranks execute each plan.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._next = 0
        self._live: dict[TransferId, Transfer] = {}
        self._bytes = dict.fromkeys(Kind, 0)
        self._counts = dict.fromkeys(Kind, 0)

    def open(
        self,
        kind: Kind,
        request_id: str,
        *,
        step: int,
        expires: float,
        size: int,
        chunks: tuple[Location, ...],
        lease: BlockLease | None = None,
        layerwise: bool = False,
        early: bool = False,
        lasting: bool = True,
        tries: frozenset[TierName] = frozenset(),
    ) -> Transfer:
        """A new transfer under an identity that was never used before."""
        self._next += 1
        ranks = range(self._ranks)
        transfer = Transfer(
            id=TransferId(self._next),
            kind=kind,
            request_id=request_id,
            step=step,
            expires=expires,
            size=size,
            chunks=chunks,
            lease=lease,
            layerwise=layerwise,
            early=early,
            lasting=lasting,
            tries=tries,
            moving=set(ranks),
        )
        self._live[transfer.id] = transfer
        self._bytes[kind] += size
        self._counts[kind] += 1
        return transfer

    def get(self, transfer: TransferId) -> Transfer | None:
        """The live transfer of that identity; None for one that is terminal or unknown."""
        return self._live.get(transfer)

    def close(self, transfer: Transfer) -> None:
        """Forget a terminal transfer."""
        del self._live[transfer.id]
        self._bytes[transfer.kind] -= transfer.size
        self._counts[transfer.kind] -= 1

    def bytes_in_flight(self, kind: Kind) -> int:
        """Bytes of live transfers of one kind, all ranks."""
        return self._bytes[kind]

    def count(self, kind: Kind) -> int:
        """Live transfers of one kind."""
        return self._counts[kind]

    def live(self) -> Iterable[Transfer]:
        """All live transfers, oldest first."""
        return self._live.values()

    @property
    def pending(self) -> bool:
        """Whether the engine should keep stepping so that receipts arrive."""
        return any(not t.overdue for t in self._live.values())

    def __len__(self) -> int:
        return len(self._live)

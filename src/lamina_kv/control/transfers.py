"""One record for every movement. There is no other place where its state is kept.

::

    LOAD     PLANNED → DONE (in the engine) | FAILED
    SAVE     PLANNED → DONE (its source is free, and it is loadable from near) | FAILED
    MOVE_OUT PLANNED → DONE (durable in the far tier) | FAILED
    MOVE_IN  PLANNED → DONE (loadable from near) | FAILED
    ASK      PLANNED → DONE (answered) | FAILED
    PROBE    PLANNED → DONE (the tier works) | FAILED
    PUSH     PLANNED → DONE (drained, in the other engine) | FAILED
    RECEIVE  PLANNED → DONE (delivered by every sender) | FAILED

With several ranks a state is reached when every rank has reported it, by identity and not by
count; a transfer has failed when one rank has failed and all are terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from lamina_kv.control.leases import BlockLease
from lamina_kv.plan import NEAR, TORN, ChunkKey, Outcome, TierName, TransferId, TransferReceipt
from lamina_kv.tiers.reuse import ALONE, Standing

if TYPE_CHECKING:
    from lamina_kv.control.reporting.spans import TransferSpans


class Kind(StrEnum):
    """What moves where; the value is its word in metrics and logs."""

    LOAD = "load"
    SAVE = "save"
    MOVE_OUT = "write"
    MOVE_IN = "fetch"
    ASK = "ask"
    PROBE = "probe"
    PUSH = "push"
    RECEIVE = "receive"

    # There is one of each. That of an enumeration is ten times slower, and every transfer needs it.
    __hash__ = object.__hash__


class State(Enum):
    """How far a transfer is."""

    PLANNED = "planned"
    DONE = "done"
    FAILED = "failed"


@dataclass(slots=True)
class Transfer:
    """One movement.

    Attributes:
        id: its identity, which its table gives it.
        kind: what moves.
        request_id: for whom; of a move, for whom it was ordered, or "" for nobody.
        step: the step whose plan carried it.
        expires: control's clock after which it is overdue.
        size: bytes over all ranks.
        moving: ranks that are not terminal; from its table, too.
        tier: near for a load or save; the far tier of a move, question or probe.
        keys: the chunks that move, or that are asked for.
        near: near slots that a load or outward move leases, or a save or inward move fills; one for
            each of ``keys``.
        far: the chunk's place in the far tier, of a move.
        standing: where the chunk stands, of a save.
        lease: hold on engine blocks that are read, for a save or a push, or written, for a load.
        layerwise: whether it is a load that runs in the step itself, so that the model computes on
            it before anybody knows its outcome.
        lasting: whether what it saves may be of use to a later process.
        trying: whether its tier was out of use, and is tried by it.
        state: how far it is.
        poisoned: built on data that turned out bad; must never become visible.
        overdue: past its deadline; it no longer keeps the engine awake.
        failed: whether some rank has failed.
        reason: why.
        lost: whether some rank found the source of a move gone or damaged for good.
        present: of a question that is answered, one byte a key: 1 if every rank's part is there.
        moved_bytes: bytes moved by all ranks.
        seconds: wall time from order to outcome, of the slowest rank.
        active: of these, seconds in which rows of a load were on their way; of a move, its share of
            the time of its batch.
        waited: seconds that the forward pass itself waited for a load.
    """

    id: TransferId = field(init=False, default=TransferId(0))
    kind: Kind
    request_id: str
    step: int
    expires: float
    size: int
    moving: set[int] = field(init=False, default_factory=set)
    tier: TierName = NEAR
    keys: tuple[ChunkKey, ...] = ()
    near: tuple[int, ...] = ()
    far: int = 0
    standing: Standing = ALONE
    lease: BlockLease | None = None
    layerwise: bool = False
    lasting: bool = True
    trying: bool = False
    state: State = State.PLANNED
    poisoned: bool = False
    overdue: bool = False
    failed: bool = False
    reason: str = ""
    lost: bool = False
    present: bytes = b""
    moved_bytes: int = 0
    seconds: float = 0.0
    active: float = 0.0
    waited: float = 0.0

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
        self.lost |= receipt.lost
        if receipt.outcome is Outcome.FAILED:
            self.failed = True
            # One torn write is what matters, whatever the other ranks say.
            if receipt.reason == TORN or not self.reason:
                self.reason = receipt.reason
        elif self.kind is Kind.ASK:
            here = self.present or bytes([1]) * len(self.keys)
            self.present = bytes(a & b for a, b in zip(here, receipt.present, strict=True))
        if self.moving:
            return False
        self.state = State.FAILED if self.failed or self.poisoned else State.DONE
        return True


class TransferTable:
    """All transfers that are not terminal.

    Args:
        ranks: how many ranks execute each plan.
        spans: is told of each transfer; None where nobody wants to know.
    """

    def __init__(self, ranks: int, spans: TransferSpans | None = None) -> None:
        self._ranks = ranks
        self._spans = spans
        self._next = 0
        self._live: dict[TransferId, Transfer] = {}
        self._bytes: Counter[Kind | tuple[Kind, TierName]] = Counter()
        self._counts: Counter[Kind] = Counter()

    def open(self, transfer: Transfer) -> Transfer:
        """Give a transfer that begins an identity that was never used before; returns it."""
        self._next += 1
        transfer.id = TransferId(self._next)
        transfer.moving = set(range(self._ranks))
        self._live[transfer.id] = transfer
        self._account(transfer, 1)
        if self._spans is not None:
            self._spans.opened(transfer)
        return transfer

    def get(self, transfer: TransferId) -> Transfer | None:
        """The live transfer of that identity; None for one that is terminal or unknown."""
        return self._live.get(transfer)

    def close(self, transfer: Transfer) -> None:
        """Forget a terminal transfer."""
        del self._live[transfer.id]
        self._account(transfer, -1)
        if self._spans is not None:
            self._spans.closed(transfer)

    def bytes_in_flight(self, kind: Kind, tier: TierName | None = None) -> int:
        """Bytes of live transfers of one kind, all ranks; those of one tier, or all."""
        return self._bytes[kind if tier is None else (kind, tier)]

    def resize(self, transfer: Transfer, size: int) -> None:
        """What a transfer moves is known by now: so many bytes over all ranks."""
        self._bytes[transfer.kind] += size - transfer.size
        self._bytes[transfer.kind, transfer.tier] += size - transfer.size
        transfer.size = size

    def count(self, kind: Kind) -> int:
        """Live transfers of one kind."""
        return self._counts[kind]

    def live(self) -> Iterable[Transfer]:
        """All live transfers, oldest first."""
        return self._live.values()

    @property
    def pending(self) -> bool:
        """Whether the engine should keep stepping so that receipts arrive. For a probe it need not:
        a store may be away for days."""
        return any(not (t.overdue or t.kind is Kind.PROBE) for t in self._live.values())

    def __len__(self) -> int:
        return len(self._live)

    def _account(self, transfer: Transfer, sign: int) -> None:
        kind, size = transfer.kind, sign * transfer.size
        self._counts[kind] += sign
        self._bytes[kind] += size
        self._bytes[kind, transfer.tier] += size

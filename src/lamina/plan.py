"""What control sends down each step, and what data sends back up.

Plans go down, receipts come up, nothing else crosses. Every record here is frozen, carries
no tensor and no handle, and can be pickled or encoded, because the two sides may be different
processes and, with tensor parallelism, one plan is executed by many ranks.

Identity: a :class:`TransferId` is never used twice in the life of a scheduler. A request that
is preempted and comes back gets new transfers, so a receipt of an old epoch names a transfer
that control no longer knows, and is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

TransferId = NewType("TransferId", int)
"""Names one transfer; unique and increasing within one scheduler."""

ChunkKey = NewType("ChunkKey", bytes)
"""Content address of one chunk; :data:`lamina.keys.KEY_BYTES` long."""


class TierName(StrEnum):
    """Where chunks are kept."""

    HOST = "host"
    DISK = "disk"


class LoadMode(StrEnum):
    """How a load runs."""

    LAYERWISE = "layerwise"
    """In the step itself; the model waits row by row."""
    PARKED = "parked"
    """Between steps; the request is resumed when the load is done."""


class Outcome(StrEnum):
    """What a receipt says of its transfer."""

    DONE = "done"
    """A load, or a push from elsewhere, is in the engine; a save has read its blocks and is
    loadable; a write is durable; a fetch can be loaded from the host; a push to elsewhere has
    drained."""
    FAILED = "failed"
    """Nothing of a save, write or fetch may become visible; a load or push did not deliver
    everything."""


LOAD_FAILED = "load_failed"
"""Reason of a save whose step rests on a load that failed: no fault of the tier it goes to."""


TORN = "torn"
"""Reason of a push of which a write has failed: what of it is in the network may still arrive."""


@dataclass(frozen=True, slots=True)
class ChunkLoad:
    """One chunk, or a run of its blocks, to be brought into the engine.

    Attributes:
        key: the chunk's key; a tier refuses a slot that holds another key.
        tier: where it is.
        slot: its slot in that tier.
        first_block: index, within the chunk, of the first block wanted.
        blocks: engine block ids, one for each block wanted, in order.
        group: the cache group that they are of.
    """

    key: ChunkKey
    tier: TierName
    slot: int
    first_block: int
    blocks: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Bring the chunks of one request into the engine.

    Attributes:
        transfer: identity of this load.
        request_id: the engine's name for the request.
        mode: in the step or between steps.
        chunks: in prefix order.
        deadline: seconds from receipt of the plan after which the load has failed; infinite for one
            that the engine could not take back.
        grace: of one between steps, how many seconds what is missing has once its request was
            resumed early; None if it is resumed when all is there.
    """

    transfer: TransferId
    request_id: str
    mode: LoadMode
    chunks: tuple[ChunkLoad, ...]
    deadline: float
    grace: float | None = None


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Copy one chunk from engine blocks into a host slot, row by row as rows are written.

    Attributes:
        transfer: identity of this save.
        request_id: the request whose blocks are read (for messages only).
        key: the chunk's key.
        slot: the host slot to fill.
        blocks: engine block ids of the whole chunk, in order.
        group: the cache group that they are of.
        overwritten: whether they are complete before the step and it, or one soon after it,
            overwrites them: they are read before its forward.
    """

    transfer: TransferId
    request_id: str
    key: ChunkKey
    slot: int
    blocks: tuple[int, ...]
    group: int = 0
    overwritten: bool = False


@dataclass(frozen=True, slots=True)
class WriteThrough:
    """Write one chunk from its host slot to a disk slot.

    Attributes:
        transfer: identity of this write.
        key: the chunk's key.
        host_slot: source slot; control holds it leased until the receipt.
        disk_slot: target slot; what it held before is forgotten first.
    """

    transfer: TransferId
    key: ChunkKey
    host_slot: int
    disk_slot: int


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """Copy one chunk from its disk slot to a host slot, when nothing else is to be read.

    Attributes:
        transfer: identity of this fetch.
        key: the chunk's key; a slot that holds another one is refused.
        disk_slot: source slot; control holds it leased until the receipt.
        host_slot: target slot.
    """

    transfer: TransferId
    key: ChunkKey
    disk_slot: int
    host_slot: int


@dataclass(frozen=True, slots=True)
class PeerOrder:
    """Make a decode engine known, so that pushes may name it.

    Attributes:
        incarnation: its name.
        card: what it says of itself, as :func:`lamina.push.cards.encode_card` has it.
    """

    incarnation: str
    card: bytes


@dataclass(frozen=True, slots=True)
class PushPages:
    """Pages of one cache group that go from engine to engine.

    Attributes:
        group: the group.
        sources: block ids here.
        targets: block ids there, one for each.
    """

    group: int
    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PushOrder:
    """Write pages of a prompt into a decode engine.

    Attributes:
        transfer: identity of this part of the push.
        peer: the decode engine's incarnation.
        epoch: its name for the whole push.
        pages: what goes where.
        computed: whether all of it was written before this step; else row by row in the step.
        last: whether nothing follows, so that ``delivered`` is due when all has drained.
        patience: seconds from receipt of the plan after which nothing is sent any more.
    """

    transfer: TransferId
    peer: str
    epoch: int
    pages: tuple[PushPages, ...]
    computed: bool
    last: bool
    patience: float


@dataclass(frozen=True, slots=True)
class PushStop:
    """Send nothing more of a push, and call back what is on its way.

    Attributes:
        peer: the decode engine's incarnation.
        epoch: its name for the push.
    """

    peer: str
    epoch: int


@dataclass(frozen=True, slots=True)
class ReceiveOrder:
    """Expect a push into blocks of a parked request.

    Attributes:
        transfer: identity of the push, which its senders name as ``epoch``.
        request_id: the engine's name for the request.
        deadline: seconds from receipt of the plan after which it has failed.
    """

    transfer: TransferId
    request_id: str
    deadline: float


@dataclass(frozen=True, slots=True)
class SendersOrder:
    """Who owes this engine something of a push that is expected, or was.

    Attributes:
        transfer: identity of the push.
        ends: for each rank of this engine, how those who owe it something sign their notices.
    """

    transfer: TransferId
    ends: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What of a step has to do with other engines, in the order in which it is carried out.

    Attributes:
        gone: decode engines that are not connected any more, or were not for a while.
        peers: decode engines that are new, or new again.
        stops: pushes to end.
        orders: pages to send.
        receives: pushes to expect.
        senders: who sends those, or earlier ones.
        give_ups: receives to end, if they have not.
    """

    gone: tuple[str, ...] = ()
    peers: tuple[PeerOrder, ...] = ()
    stops: tuple[PushStop, ...] = ()
    orders: tuple[PushOrder, ...] = ()
    receives: tuple[ReceiveOrder, ...] = ()
    senders: tuple[SendersOrder, ...] = ()
    give_ups: tuple[TransferId, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it orders nothing."""
        return not (
            self.peers
            or self.gone
            or self.stops
            or self.orders
            or self.receives
            or self.senders
            or self.give_ups
        )


NO_PUSH = PushPlan()
"""The push plan of most steps."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything the data side is to begin in one engine step.

    Attributes:
        step: number of the step; increases by one with every plan.
        loads: loads to start now.
        saves: saves whose blocks are complete once this step's forward has run, or before it.
        writes: write-throughs to start now.
        fetches: fetches to queue now.
        drop_disk: disk slots to forget (failed verification, cache reset).
        push: what goes to other engines and comes from them.
        forward: whether this step runs the model at all.
        outstanding: whether transfers of this plan or an earlier one are on their way.
    """

    step: int
    loads: tuple[LoadOrder, ...] = ()
    saves: tuple[SaveOrder, ...] = ()
    writes: tuple[WriteThrough, ...] = ()
    fetches: tuple[FetchOrder, ...] = ()
    drop_disk: tuple[int, ...] = ()
    push: PushPlan = NO_PUSH
    forward: bool = True
    outstanding: bool = False

    @property
    def loads_in_step(self) -> bool:
        """Whether layers have to wait for loads that begin with this step."""
        return any(order.mode is LoadMode.LAYERWISE for order in self.loads)

    @property
    def is_empty(self) -> bool:
        """Whether the plan orders nothing."""
        return self.push.is_empty and not (
            self.loads or self.saves or self.writes or self.fetches or self.drop_disk
        )


@dataclass(frozen=True, slots=True)
class TransferReceipt:
    """What one rank says of one transfer.

    Attributes:
        transfer: which.
        outcome: see :class:`Outcome`.
        moved_bytes: bytes moved by this rank; none of a save or write that another did for it.
        seconds: wall time from order to outcome.
        active: of these, seconds in which rows of a load were on their way, and did not wait to be
            asked for.
        waited: seconds that the forward pass itself waited for this load.
        released: whether its request was resumed before all of it was there.
        busy: work of the rank's cores for this load, as seconds of all of them.
        bad_chunks: keys of a load's chunks that are damaged or gone, and not only late.
        reason: for a failure, a short word that becomes a metric label.
    """

    transfer: TransferId
    outcome: Outcome
    moved_bytes: int = 0
    seconds: float = 0.0
    active: float = 0.0
    waited: float = 0.0
    released: bool = False
    busy: float = 0.0
    bad_chunks: tuple[ChunkKey, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """One chunk that a tier already holds when it is opened.

    Attributes:
        key: its key.
        slot: its slot.
        last_used: seconds since the epoch; orders eviction after a restart.
    """

    key: ChunkKey
    slot: int
    last_used: float


@dataclass(frozen=True, slots=True)
class RankReport:
    """A rank's first word to control: what tiers it has and what is already in them.

    Attributes:
        rank: the rank, ``0 .. ranks - 1``.
        host_slots: slots of the host tier.
        disk_slots: slots of the disk tier, 0 without one.
        chunk_bytes: bytes of one chunk on this rank.
        stored: chunks found on disk.
        follows: whether its tiers are another rank's, which keeps the same bytes for both.
    """

    rank: int
    host_slots: int
    disk_slots: int
    chunk_bytes: int
    stored: tuple[StoredChunk, ...] = ()
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one rank reports after one step.

    Attributes:
        rank: the rank.
        transfers: in the order in which they happened.
        queued: pieces of work that no thread of the rank has taken up yet.
    """

    rank: int
    transfers: tuple[TransferReceipt, ...] = ()
    queued: int = 0

"""What control sends down each step, and what data sends back up.

Plans go down, receipts come up. Beside them goes a :class:`Binding`, while a step runs. Every
record here is frozen, carries no tensor and no handle, and can be pickled or encoded, because the
two sides may be different processes and, with tensor parallelism, one plan is executed by many
ranks.

Identity: a :class:`TransferId` is never used twice in the life of a scheduler. A request that
is preempted and comes back gets new transfers, so a receipt of an old epoch names a transfer
that control no longer knows, and is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

import numpy as np
import numpy.typing as npt

TransferId = NewType("TransferId", int)
"""Names one transfer; unique and increasing within one scheduler."""

ChunkKey = NewType("ChunkKey", bytes)
"""Content address of one chunk; :data:`lamina_kv.keys.KEY_BYTES` long."""


TierName = NewType("TierName", str)
"""A tier's name in the configuration; also its label in metrics and logs."""

NEAR = TierName("host")
"""The near tier: host memory, which engines copy to and from. All other tiers are far."""

PUSHED, ENGINE, OTHER, COMPUTED = map(TierName, ("push", "engine", "other", "computed"))
"""Sources of tokens that are no tiers, as metrics name them: a prefill engine's push, the engine's
own prefix cache, another connector, and the model. No tier is called so."""


class LoadMode(StrEnum):
    """How a load runs."""

    LAYERWISE = "layerwise"
    """In the step itself; the model waits row by row."""
    PARKED = "parked"
    """Between steps; the request is resumed when the load is done."""


class Outcome(StrEnum):
    """What a receipt says of its transfer."""

    DONE = "done"
    """A load, or a push from elsewhere, is in the engine. A save has read its blocks and can be
    loaded. A move is whole at its target. An ask is answered. A probed tier works. A push to
    elsewhere has drained."""
    FAILED = "failed"
    """Nothing of a save or move may become visible. A load or push did not deliver everything. An
    ask was not answered. A probed tier does not work."""


LOAD_FAILED = "load_failed"
"""Reason of a save whose step rests on a load that failed: no fault of the tier it goes to."""


TIMED_OUT = "deadline"
"""Reason of a load between steps that was given up because its timeout had passed."""


TORN = "torn"
"""Reason of a push of which a write has failed: what of it is in the network may still arrive."""


Int32s = npt.NDArray[np.int32]
"""One-dimensional int32."""


@dataclass(frozen=True, slots=True, eq=False)
class PageMap:
    """Pages of one cache group, near and in the engine.

    Attributes:
        group: the cache group.
        near: shape ``(n,)``; a near page is ``slot * blocks_per_chunk + block within its chunk``.
        blocks: shape ``(n,)``; the engine block of each.
    """

    group: int
    near: Int32s
    blocks: Int32s

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PageMap)
            and self.group == other.group
            and np.array_equal(self.near, other.near)
            and np.array_equal(self.blocks, other.blocks)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Every number: ranks that plan each for itself compare plans by this, and numpy's own
        leaves out most of a long array."""
        return f"PageMap({self.group}, near={self.near.tolist()}, blocks={self.blocks.tolist()})"


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Copy a prefix of one request from near into the engine.

    Attributes:
        transfer: identity of this load.
        request_id: the engine's name for the request.
        mode: in the step or between steps.
        pages: what goes where; one entry a cache group that takes part.
        timeout: seconds from receipt of the plan after which a load between steps has failed. A
            load in the step cannot be taken back and has none.
    """

    transfer: TransferId
    request_id: str
    mode: LoadMode
    pages: tuple[PageMap, ...]
    timeout: float


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Copy one chunk from engine blocks into a near slot, once the step has written it.

    Attributes:
        transfer: identity of this save.
        request_id: the request whose blocks are read (for messages only).
        slot: the near slot to fill.
        blocks: engine block ids of the whole chunk, in order.
        group: the cache group of the blocks.
        overwritten: whether the blocks are complete before the step, and the step or one soon after
            it overwrites them. They are read before its forward.
    """

    transfer: TransferId
    request_id: str
    slot: int
    blocks: tuple[int, ...]
    group: int = 0
    overwritten: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """Copy one chunk between its near slot and a far tier.

    Attributes:
        transfer: identity of this move.
        key: the chunk's key. A far place that holds another chunk is refused.
        near: the near slot; control holds it until the receipt.
        far: the slot in the far tier; 0 in a tier that finds chunks by key.
    """

    transfer: TransferId
    key: ChunkKey
    near: int
    far: int


@dataclass(frozen=True, slots=True)
class Ask:
    """Find out which of some chunks a far tier has.

    Attributes:
        transfer: identity of this question.
        keys: the chunks.
    """

    transfer: TransferId
    keys: tuple[ChunkKey, ...]


@dataclass(frozen=True, slots=True)
class TierOrders:
    """What one far tier is to do, in this order.

    Attributes:
        tier: the tier.
        drops: its slots to forget (failed verification). Forgotten before a write of this plan.
        outward: chunks to write, from near.
        inward: chunks to read, into near.
        asks: questions.
        touches: chunks that were of use wherever they were used from, with their places; a store
            that orders its chunks by use is to know. Best effort.
        probe: identity of a call that finds out whether the tier works; None for none.
    """

    tier: TierName
    drops: tuple[int, ...] = ()
    outward: tuple[Move, ...] = ()
    inward: tuple[Move, ...] = ()
    asks: tuple[Ask, ...] = ()
    touches: tuple[tuple[ChunkKey, int], ...] = ()
    probe: TransferId | None = None


@dataclass(frozen=True, slots=True)
class PeerOrder:
    """Make a decode engine known, so that pushes may name it.

    Attributes:
        incarnation: its name.
        card: what it says of itself, as :func:`lamina_kv.push.cards.encode_card` has it.
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
class Binding:
    """A destination for a prompt that is gathered. It may come before the plan that gathers it, and
    comes again in the plan that follows its announcement.

    Attributes:
        peer: the decode engine, whether the rank knows it or not.
        order: the whole prompt, under the identity that it is gathered as.
    """

    peer: PeerOrder
    order: PushOrder


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
        gathers: prompts that this step completes and whose destination is not known. Their rows are
            kept, each with its fence, until a :class:`Binding` or a drop.
        bindings: destinations of prompts that were gathered; known to the ranks that were reached.
        drops: prompts that were gathered and get no destination: there is no receipt for them.
        receives: pushes to expect.
        senders: who sends those, or earlier ones.
        give_ups: receives to end, if they have not.
    """

    gone: tuple[str, ...] = ()
    peers: tuple[PeerOrder, ...] = ()
    stops: tuple[PushStop, ...] = ()
    orders: tuple[PushOrder, ...] = ()
    gathers: tuple[TransferId, ...] = ()
    bindings: tuple[Binding, ...] = ()
    drops: tuple[TransferId, ...] = ()
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
            or self.gathers
            or self.bindings
            or self.drops
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
        tiers: what far tiers are to do; one entry a tier that has anything to do.
        push: what goes to other engines and comes from them.
        forward: whether this step runs the model at all.
        outstanding: whether transfers of this plan or an earlier one are on their way.
    """

    step: int
    loads: tuple[LoadOrder, ...] = ()
    saves: tuple[SaveOrder, ...] = ()
    tiers: tuple[TierOrders, ...] = ()
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
        return self.push.is_empty and not (self.loads or self.saves or self.tiers)


@dataclass(frozen=True, slots=True)
class TransferReceipt:
    """What one rank says of one transfer.

    Attributes:
        transfer: which.
        outcome: see :class:`Outcome`.
        moved_bytes: bytes moved by this rank; none of a save or move that another did for it.
        seconds: wall time from order to outcome.
        active: of these, seconds in which rows of a load were on their way, and did not wait to be
            asked for; of a move, its share of the time in which the tier was called with its batch.
        waited: seconds that the forward pass itself waited for this load.
        lost: whether the source of a move is gone or damaged, so that it can never be delivered.
        present: of an ask, one byte a key: 1 if the tier has the chunk.
        reason: for a failure, a short word that becomes a metric label.
    """

    transfer: TransferId
    outcome: Outcome
    moved_bytes: int = 0
    seconds: float = 0.0
    active: float = 0.0
    waited: float = 0.0
    lost: bool = False
    present: bytes = b""
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class StoredChunks:
    """Chunks that a tier with slots already holds when it is opened, by slot.

    A million chunks are 8 MB on each rank but the first, which alone sends whole keys: a scheduler
    needs them once, and the marks tell it where ranks agree. Two chunks have the same mark once in
    four billion times; the object's own header finds that out.

    Attributes:
        slots: shape ``(n,)``, int32, increasing.
        marks: shape ``(n,)``, uint32; see :func:`marks_of`.
        keys: shape ``(n, KEY_BYTES)``, uint8; None on ranks other than the first.
        used: shape ``(n,)``, float64, seconds since the epoch; orders eviction after a restart.
            None where ``keys`` is.
    """

    slots: Int32s
    marks: npt.NDArray[np.uint32]
    keys: npt.NDArray[np.uint8] | None = None
    used: npt.NDArray[np.float64] | None = None


def marks_of(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """The first four bytes of each key, little endian, shape ``(n,)``; of keys of shape
    ``(n, KEY_BYTES)``."""
    return np.ascontiguousarray(keys[:, :4]).view("<u4").ravel()


@dataclass(frozen=True, slots=True)
class TierReport:
    """A far tier of one rank.

    Attributes:
        name: the tier.
        slots: chunks that fit; 0 in a tier that finds chunks by key.
        stored: what it holds; None in a tier that finds chunks by key.
    """

    name: TierName
    slots: int = 0
    stored: StoredChunks | None = None


@dataclass(frozen=True, slots=True)
class NearSlots:
    """How much of a near tier a rank can copy to and from. A GPU wants it pinned, which takes a
    while, and may end before all of it is.

    Attributes:
        ready: slots, from the first one on, that may be used by now.
        most: slots that may be used in the end.
    """

    ready: int
    most: int

    @property
    def is_final(self) -> bool:
        """Whether this stays so."""
        return self.ready == self.most


@dataclass(frozen=True, slots=True)
class RankReport:
    """A rank's first word to control: what tiers it has and what is already in them.

    Attributes:
        rank: the rank, ``0 .. ranks - 1``.
        near_slots: slots of the near tier.
        chunk_bytes: bytes of one chunk on this rank.
        tiers: its far tiers, in the order of the configuration; none of a rank that follows.
        follows: whether its near tier is another rank's, which keeps the same bytes for both.
        near: how many of the near slots may be used; None for all. Receipts say what changes.
    """

    rank: int
    near_slots: int
    chunk_bytes: int
    tiers: tuple[TierReport, ...] = ()
    follows: bool = False
    near: NearSlots | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one rank reports after one step.

    Attributes:
        rank: the rank.
        transfers: in the order in which they happened.
        queued: pieces of work that no thread of the rank has taken up yet.
        near: how many near slots may be used; None if that is as it was.
    """

    rank: int
    transfers: tuple[TransferReceipt, ...] = ()
    queued: int = 0
    near: NearSlots | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing that control has to know."""
        return not self.transfers and self.near is None

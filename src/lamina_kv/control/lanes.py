"""One far tier as control sees it: what waits to be written there, and the orders of the next plan.

Chunks on their way are bounded each way. Everything here is about single chunks; who needs them is
the affair of :mod:`lamina_kv.control.moving`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from math import inf

from lamina_kv.control.answers import Answers
from lamina_kv.control.books import Books
from lamina_kv.control.catalog import Far
from lamina_kv.control.cost import Costs
from lamina_kv.control.transfers import Kind, State, Transfer
from lamina_kv.plan import NEAR, Ask, ChunkKey, Move, TierOrders, TransferId
from lamina_kv.tiers.contract import Answer, NoRoom
from lamina_kv.tiers.reuse import Standing, Use

MOST_CONSIDERED = 256
"""Chunks of the backlog that one plan looks at, about 1 ms, whether they are written or not."""

ANSWER_TIMEOUT = 1.0
"""Seconds that a write waits for the tier to say whether it has the chunk. An answer takes
milliseconds. What a tier that does not answer has already is written once more, and no harm done.
"""


class Unwritten(StrEnum):
    """Why a chunk that was to be written to a far tier is not; a word for metric labels."""

    EVICTED = "evicted"
    """Near had to give it up before."""
    NO_PREFIX = "no_prefix"
    """The chunk in front of it was not written."""
    IN_USE = "tier_in_use"
    WORTH_LESS = "worth_less"
    ALREADY_THERE = "already_there"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A chunk that waits to be written, or is being written.

    Attributes:
        standing: where it stands.
        again: whether it was tried before.
    """

    standing: Standing
    again: bool = False


class Lane:
    """See the module.

    Args:
        books: what the parts of the planner share.
        far: the tier.
        costs: learns what moves inward take.

    Attributes:
        far: as given.
        answers: how long it takes to say what it has.
        brought: control's clock when a chunk came from it last.
        brought_step: the step that was to be planned then.
        silent: control's clock when it left a question unanswered; minus infinity if it has
            answered one since, or has brought a chunk.
    """

    def __init__(self, books: Books, far: Far, costs: Costs) -> None:
        self.far = far
        self.answers = Answers()
        self.brought = self.silent = -inf
        self.brought_step = 0
        self._costs = costs
        self._charged = 0.0  # control's clock until which the tier's work is measured
        self._books = books
        self._timeout = books.config.load.deadline
        # Oldest first. All of it is near, and spared there.
        self._backlog: OrderedDict[ChunkKey, Waiting] = OrderedDict()
        self._unanswered = inf  # since when the tier has yet to say whether it has the first of it
        self._writing: dict[TransferId, Waiting] = {}
        self._failed: dict[ChunkKey, Waiting] = {}  # since the last plan; to be tried once more
        self._outward: list[Move] = []
        self._inward: list[Move] = []

    @property
    def backlog(self) -> int:
        """Chunks that wait to be written."""
        return len(self._backlog) + len(self._failed)

    @property
    def has_work(self) -> bool:
        """Whether the next plan has orders for the tier."""
        index = self.far.index
        told = index.pending and (bool(index.capacity) or self._may_ask)
        writes = bool(self.backlog) and (self._may_write or self.write_wait <= 0)
        return told or bool(self._inward) or writes

    @property
    def write_wait(self) -> float:
        """Seconds until a step may let what waits to be written go on, because the tier is out of
        use and is to be probed, or tried, or was; infinite if nothing waits for that."""
        if not self.backlog or not self._has_room(Kind.MOVE_OUT):
            return inf  # a receipt is waited for, if anything
        breaker = self._books.breakers.fills(self.far.name)
        probe = self._books.breakers.probe(self.far.name)
        if breaker.closed or probe is None:
            return inf
        return min(breaker.pause_left, probe.wait)

    # -- chunks that were saved --------------------------------------------------------------

    def saved(self, key: ChunkKey, standing: Standing) -> None:
        """A chunk has been saved: the tier is to have it, if it keeps such chunks."""
        uses = self._books.catalog.near.uses(key)
        if self.far.keep == "all" or standing.use.regard.share or uses > 1:
            self.offer(key, standing)

    def offer(self, key: ChunkKey, standing: Standing) -> None:
        """The tier is to have a chunk that is near, unless it is only read, or has it."""
        waits = key in self._backlog or key in self._failed
        if not (waits or self.far.keep == "nothing" or self.far.index.holds(key)):
            self._backlog[key] = Waiting(standing)
            self._books.catalog.near.spare(key)

    def lost(self, key: ChunkKey) -> None:
        """Near had to give up a chunk that was spared: what was worth least to it. It cannot be
        written any more."""
        waited = self._backlog.pop(key, None), self._failed.pop(key, None)
        if any(waited):
            self._skip(Unwritten.EVICTED)

    def hurry(self) -> None:
        """The engine ends: try what waits to be written now, even if the tier is out of use."""
        self._books.breakers.fills(self.far.name).cut_short()

    def order_writes(self) -> None:
        """Move outward what waits for it, as far as there is room on the way.

        A tier that others write to, too, is asked first whether it has a chunk. What is behind one
        that is asked for waits, so that beginnings are written before ends.
        """
        self._put_back()
        waits = False
        for number, key in enumerate(list(islice(self._backlog, MOST_CONSIDERED))):
            if not self._may_write:
                return
            unknown = self._may_ask and self.far.index.find(key) is Answer.UNKNOWN
            if number == 0:
                self._unanswered = min(self._unanswered, self._books.clock.now) if unknown else inf
            waits |= unknown and self._books.clock.now < self._unanswered + ANSWER_TIMEOUT
            if not waits:
                self._write(key, self._backlog.pop(key))

    def _put_back(self) -> None:
        """What has failed comes before those that are of no use without it. A chunk that fails
        twice is given up; while the tier is broken, its breaker holds all back."""
        for key, waiting in reversed(self._failed.items()):
            self._backlog[key] = replace(waiting, again=True)
            self._backlog.move_to_end(key, last=False)
        self._failed.clear()

    @property
    def _may_write(self) -> bool:
        return self._has_room(Kind.MOVE_OUT) and self._books.breakers.fills(self.far.name).allows

    def _write(self, key: ChunkKey, waiting: Waiting) -> None:
        """Order one write, if there is anything to order."""
        near = self._books.catalog.near
        slot, place = near.visible[key], self._place(key, waiting.standing)
        near.unspare(key)
        if isinstance(place, Unwritten):
            self._skip(place)
            return
        near.lease(slot)
        transfer = self._open(Kind.MOVE_OUT, "", (key,), (slot,), place)
        self._writing[transfer.id] = waiting
        self._outward.append(Move(transfer.id, key, slot, place))

    def _place(self, key: ChunkKey, standing: Standing) -> int | Unwritten:
        """A place that is reserved for a chunk, or why it is not written."""
        catalog, behind = self._books.catalog, standing.behind
        if self.far.index.holds(key):
            return Unwritten.ALREADY_THERE
        if behind is not None and behind not in self._backlog and not catalog.lasts(behind):
            return Unwritten.NO_PREFIX
        place = catalog.room(key, self.far.name, standing)
        if isinstance(place, NoRoom):
            return Unwritten.IN_USE if place is NoRoom.IN_USE else Unwritten.WORTH_LESS
        return place

    def _skip(self, reason: Unwritten) -> None:
        self._books.meter.count("writes_skipped", 1, tier=self.far.name, reason=reason)

    # -- chunks that are needed --------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether as much is on its way from the tier as may be."""
        return not self._has_room(Kind.MOVE_IN)

    @property
    def is_reading(self) -> bool:
        """Whether anything is on its way from the tier."""
        return self._books.transfers.bytes_in_flight(Kind.MOVE_IN, self.far.name) > 0

    @property
    def may_read(self) -> bool:
        """Whether one more chunk may be ordered from the tier."""
        return not self.is_busy and self._books.breakers.readable(self.far.name)

    def fetch(self, request_id: str, key: ChunkKey, use: Use) -> Transfer | None:
        """Order a move of a chunk that the tier has and near has not, nor will have; None if near
        has no room for it. What stands in front of it is known when it is used."""
        catalog = self._books.catalog
        slot = catalog.room(key, NEAR, Standing(use=use))
        if isinstance(slot, NoRoom):
            return None
        place = self.far.index.hold(key)
        transfer = self._open(Kind.MOVE_IN, request_id, (key,), (slot,), place)
        self._inward.append(Move(transfer.id, key, slot, place))
        return transfer

    # -- orders ------------------------------------------------------------------------------

    def drain(self) -> TierOrders | None:
        """The orders of the next plan; None if there are none."""
        far, asks = self.far, self._ask()
        orders = TierOrders(
            far.name,
            far.index.drops(),
            tuple(self._outward),
            tuple(self._inward),
            asks,
            far.index.touches(),
            self._probe(),
        )
        self._outward.clear()
        self._inward.clear()
        work = orders.drops or orders.outward or orders.inward or orders.asks or orders.touches
        return orders if work or orders.probe is not None else None

    def _ask(self) -> tuple[Ask, ...]:
        keys = self.far.index.asks() if self._may_ask else ()
        if not keys:
            return ()
        return (Ask(self._open(Kind.ASK, "", keys).id, keys),)

    def _probe(self) -> TransferId | None:
        """Find out whether the tier works, if it is out of use and it is time for that."""
        probe = self._books.breakers.probe(self.far.name)
        if probe is None or not probe.take():
            return None
        return self._open(Kind.PROBE, "", ()).id

    @property
    def _may_ask(self) -> bool:
        return self._books.breakers.reads(self.far.name).allows

    def _has_room(self, kind: Kind) -> bool:
        """Whether one more chunk may be on its way to or from the tier; one always may."""
        in_flight = self._books.transfers.bytes_in_flight(kind, self.far.name)
        return not in_flight or in_flight + self._books.kept_bytes <= self.far.bound

    def _open(
        self,
        kind: Kind,
        request_id: str,
        keys: tuple[ChunkKey, ...],
        near: tuple[int, ...] = (),
        place: int = 0,
    ) -> Transfer:
        """A transfer between near and the tier; of a question or probe nothing moves. A probe is
        never overdue: it ends when the store comes back."""
        books = self._books
        timeout = inf if kind is Kind.PROBE else self._timeout
        return books.transfers.open(
            Transfer(
                kind,
                request_id,
                step=books.clock.step,
                expires=books.clock.now + timeout,
                size=len(near) * books.kept_bytes,
                tier=self.far.name,
                keys=keys,
                near=near,
                far=place,
                trying=books.breakers.order(kind, self.far.name),
            )
        )

    # -- outcomes ----------------------------------------------------------------------------

    def answered(self, transfer: Transfer) -> None:
        """Take in an answer, or that there is none."""
        present = [*map(bool, transfer.present)] if transfer.state is State.DONE else None
        self.answers.took(transfer.seconds, present)
        self.silent = self._books.clock.now if present is None else -inf
        self.far.index.told(transfer.keys, present)
        here = 0 if present is None else sum(present)
        self._count_answers("here", here)
        self._count_answers("none" if present is None else "absent", len(transfer.keys) - here)
        if present is None and not transfer.overdue:
            self._count_failure(transfer)

    def _count_answers(self, answer: str, chunks: int) -> None:
        if chunks:
            self._books.meter.count("asked", chunks, tier=self.far.name, answer=answer)

    def probed(self, transfer: Transfer) -> None:
        """Take in what a probe has found out."""
        well = transfer.state is State.DONE
        if self._books.breakers.probed(self.far.name, well):
            self._costs.recovered(self.far.name)

    def written(self, transfer: Transfer) -> None:
        """Take in a move outward that has ended."""
        books = self._books
        (key,), (slot,) = transfer.keys, transfer.near
        waiting = self._writing.pop(transfer.id)
        books.catalog.near.release(slot)
        if transfer.state is State.FAILED:
            self.far.index.abandoned(key)
            self._count_failure(transfer)
            may_be_tried = books.catalog.near.slot(key) is not None and key not in self._backlog
            if not waiting.again and may_be_tried:
                books.catalog.near.spare(key)
                self._failed[key] = waiting
            return
        books.catalog.publish(key, self.far.name)
        books.meter.count("write_bytes", transfer.moved_bytes, tier=self.far.name)
        books.meter.observe("write_seconds", transfer.active, tier=self.far.name)

    def overdue(self, transfer: Transfer) -> None:
        """A move inward has not ended in time: its key is free at once, so that the chunk can be
        saved; its slot only when nothing is written there any more."""
        transfer.poisoned = True
        self._books.catalog.near.disowned(transfer.keys[0])

    def fetched(self, transfer: Transfer) -> None:
        """Take in a move inward that has ended; if it went well the chunk is near now."""
        books, index = self._books, self.far.index
        (key,) = transfer.keys
        index.release(transfer.far)
        if transfer.lost:
            index.lost(key, transfer.far)
        if transfer.poisoned:  # it was overdue
            books.catalog.near.release(transfer.near[0])
            return
        if transfer.state is State.FAILED:
            books.catalog.near.abandoned(key)
            self._count_failure(transfer)
            return
        self._measure(transfer)
        self.brought, self.silent = books.clock.now, -inf
        self.brought_step = books.clock.step
        books.catalog.publish(key)
        books.meter.count("fetch_bytes", transfer.moved_bytes, tier=self.far.name)
        books.meter.observe("fetch_seconds", transfer.active, tier=self.far.name)

    def _measure(self, transfer: Transfer) -> None:
        """Moves overlap: what the tier has worked for one is what it has worked beyond others."""
        ordered = transfer.expires - self._timeout
        ended = ordered + transfer.seconds
        seconds = max(0.0, ended - max(ordered, self._charged))
        self._charged = max(self._charged, ended)
        self._costs.loaded(self.far.name, self._books.moved_bytes, seconds, ordered=ordered)

    def _count_failure(self, transfer: Transfer) -> None:
        kind = f"{transfer.kind.value}_{transfer.reason or 'unknown'}"
        self._books.meter.count("failures", 1, tier=self.far.name, kind=kind)

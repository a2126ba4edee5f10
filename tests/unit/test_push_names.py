"""Histories in which a router uses the names of pushes again, for other prompts and on other decode
engines, while requests are preempted and come back: whatever is written to a decode engine is the
prompt that it has announced, and its source stays what it is until it was read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from test_push_source import BLOCK, FULL, NULL, View, card, record_of

from lamina_kv.config import PushConfig
from lamina_kv.control.cost import Costs
from lamina_kv.control.leases import LeaseBook
from lamina_kv.control.offers import Offer
from lamina_kv.control.push.source import PushSource
from lamina_kv.control.requests import PushParameters, RequestRecord
from lamina_kv.control.shape import ChunkShape
from lamina_kv.control.transfers import TransferTable
from lamina_kv.keys import prompt_digest
from lamina_kv.plan import TORN, LoadMode, Outcome, PushOrder, TransferId, TransferReceipt
from lamina_kv.push.letters import Fate, Letter, Lost, Opened
from lamina_kv.push.messages import (
    NO_EPOCH,
    Announce,
    Attempt,
    BlockTable,
    Bound,
    Cancel,
    Claim,
    Fenced,
)
from push_books import ClockByHand, push_books

PROMPT = 56
BLOCKS = 4
POOL = 24
PEERS = ("D", "E")
SALTS = (0, 0, 0, 1000)

Label = tuple[int, int]
"""A prompt's salt and the index of a block in it."""


class Pool:
    """Blocks with reference counts, that hold something else as soon as they are given away."""

    def __init__(self) -> None:
        self.references = [0] * POOL
        self.content: list[Label | None] = [None] * POOL

    def allocate(self, count: int) -> list[int] | None:
        free = [block for block, held in enumerate(self.references) if not held][:count]
        if len(free) < count:
            return None
        for block in free:
            self.references[block] = 1
            self.content[block] = None
        return free

    def hold(self, blocks: list[int]) -> None:
        for block in blocks:
            assert self.references[block] > 0
            self.references[block] += 1

    def free(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] -= 1
            assert self.references[block] >= 0


@dataclass
class Running:
    """A request that the engine has; it has blocks, or waits for them."""

    record: RequestRecord
    view: View
    computed: int = 0
    loading: bool = False

    @property
    def has_blocks(self) -> bool:
        return bool(self.view.tables[0])


@dataclass
class Engine:
    """A prefill engine, of which each event is one of :meth:`events`."""

    random: Random
    pool: Pool = field(default_factory=Pool)
    requests: list[Running] = field(default_factory=list)
    announced: dict[tuple[str, int], Announce] = field(default_factory=dict)
    salts: dict[tuple[str, int], int] = field(default_factory=dict)
    moving: list[PushOrder] = field(default_factory=list)
    stopped: set[tuple[str, int]] = field(default_factory=set)
    fenced: set[tuple[str, int]] = field(default_factory=set)
    bound: int = 0
    sent: int = 0
    made: int = 0
    events: int = 0
    clock: ClockByHand = field(default_factory=ClockByHand)

    def __post_init__(self) -> None:
        self.leases = LeaseBook(self.pool)  # type: ignore[arg-type]
        self.transfers = TransferTable(1)
        self.source = PushSource(
            PushConfig(deadline=60.0, silence=5.0, max_inflight=self.random.choice((1, 1 << 30))),
            push_books(ChunkShape(BLOCK, (FULL,), NULL), self.transfers, self.leases, self.clock),
            card("P", (FULL,), POOL),
            Costs(),
        )
        for peer in PEERS:
            self.source.receive([Opened(peer, peer, card(peer, (FULL,), 100_000))])

    # -- the engine --------------------------------------------------------------------------

    def arrive(self) -> None:
        self.made += 1
        push = PushParameters(self._name(), None)
        view = View([[]], push=push, salt=self.random.choice(SALTS), request_id=str(self.made))
        request = Running(record_of(view), view)
        self.requests.append(request)
        self.source.arrived(request.record)

    def _name(self) -> str:
        """One of the two that routers use at this time."""
        return str(self.events // 24 + self.random.randrange(2))

    def admit(self) -> None:
        """With a prefix that is loaded while others run, or none."""
        waiting = [request for request in self.requests if not request.has_blocks]
        blocks = self.pool.allocate(BLOCKS) if waiting else None
        if blocks is None:
            return
        waiting.sort(key=lambda request: bool(request.record.push_over))
        request = waiting[self.random.randrange(min(2, len(waiting)))]
        request.view.tables = [blocks]
        request.loading = self.random.random() < 0.4
        request.computed = 3 * BLOCK if request.loading else 0
        if request.loading:
            request.record.load = TransferId(99_999)
            request.record.offer = Offer(mode=LoadMode.PARKED)
        self.source.admitted(request.record, request.computed)

    def loaded(self) -> None:
        for request in self.requests:
            if request.loading:
                request.loading, request.record.load = False, None
                self._fill(request, request.computed)
                return

    def preempt(self) -> None:
        having = [request for request in self.requests if request.has_blocks]
        if having:
            request = self.random.choice(having)
            self._give_back(request)
            request.record.lose_blocks()
            request.computed, request.loading = 0, False

    def end(self) -> None:
        if self.requests:
            request = self.requests.pop(self.random.randrange(len(self.requests)))
            push = request.view.push
            assert push is not None
            self.source.abandoned(push, request.view.request_id)
            self.source.finished(request.record, request.computed, request.view.tables)
            self._give_back(request)

    def step(self) -> None:
        ran = []
        for request in self.requests:
            if request.has_blocks and not request.loading and request.computed < PROMPT:
                end = min(PROMPT, request.computed + self.random.choice((8, 24, 56)))
                self.source.progress(request.record, request.computed, end)
                ran.append((request, end))
        self.source.plan()
        orders = list(self.source.orders)
        self.source.orders.clear()
        self.stopped |= {(stop.peer, stop.epoch) for stop in self.source.stops}
        self.source.stops.clear()
        self._check(order for order in orders if order.computed)
        for request, end in ran:
            request.computed = end
            self._fill(request, end)
        self._check(orders)
        self.moving += orders
        self.sent += len(orders)

    def _fill(self, request: Running, end: int) -> None:
        for index, block in enumerate(request.view.tables[0][: -(-end // BLOCK)]):
            self.pool.content[block] = (request.view.salt, index)

    def _give_back(self, request: Running) -> None:
        self.pool.free(request.view.tables[0])
        request.view.tables = [[]]

    # -- decode engines ----------------------------------------------------------------------

    def announce(self) -> None:
        self.made += 1
        peer, name = self.random.choice(PEERS), self._name()
        salt, epoch = self.random.choice(SALTS), self.made
        digest = prompt_digest([salt + i for i in range(PROMPT)], b"", b"")
        table = BlockTable(0, tuple(epoch * BLOCKS + i for i in range(BLOCKS)))
        message = Announce(Attempt(name, epoch), digest, 0, PROMPT - 1, 30.0, (table,))
        self.announced[peer, epoch], self.salts[peer, epoch] = message, salt
        self._hear(peer, message)

    def repeat(self) -> None:
        """An announcement that was under way when its connection broke, or an old one."""
        if self.announced:
            peer, epoch = self.random.choice(list(self.announced)[-6:])
            self._hear(peer, self.announced[peer, epoch])

    def cancel(self) -> None:
        """One of its own, or what another one calls so."""
        if self.announced:
            peer, epoch = self.random.choice(list(self.announced)[-6:])
            announce = self.announced[peer, epoch]
            self._hear(self.random.choice((peer, *PEERS)), Cancel(announce.attempt))

    def decline(self) -> None:
        name = self._name()
        self._hear(self.random.choice(PEERS), Cancel(Attempt(name, NO_EPOCH)))

    def claim(self) -> None:
        name = self._name()
        self._hear(self.random.choice(PEERS), Claim((name,), 30.0))

    def lose(self) -> None:
        peer = self.random.choice(PEERS)
        news = [
            Lost(peer, "gone", was_open=True, fate=Fate.CLOSED),
            Opened(peer, peer, card(peer, (FULL,), 100_000)),
        ]
        self.source.receive(news)

    def _hear(self, peer: str, message: Announce | Cancel | Claim) -> None:
        self.source.receive([Letter(peer, message)])

    # -- the wire ----------------------------------------------------------------------------

    def drain(self) -> None:
        """Something was read, and is there."""
        if not self.moving:
            return
        order = self.moving.pop(self.random.randrange(len(self.moving)))
        name = (order.peer, order.epoch)
        if name not in self.stopped:
            self._check([order])
        outcome, reason = Outcome.DONE, ""
        if name in self.stopped or self.random.random() < 0.1:
            outcome, reason = Outcome.FAILED, self.random.choice((TORN, "stopped"))
        transfer = self.transfers.get(order.transfer)
        assert transfer is not None
        assert transfer.apply(0, TransferReceipt(order.transfer, outcome, reason=reason))
        assert transfer.lease is not None
        transfer.lease.release()
        self.source.settle(transfer)

    def _check(self, orders: object) -> None:
        for order in orders:  # type: ignore[attr-defined]
            name = (order.peer, order.epoch)
            assert name not in self.fenced, "nothing is sent after the fence"
            for part in order.pages:
                for source, target in zip(part.sources, part.targets, strict=True):
                    assert target // BLOCKS == order.epoch
                    expected = (self.salts[name], target % BLOCKS)
                    assert self.pool.content[source] == expected, "another prompt's page is sent"

    def letters(self) -> None:
        for letter in self.source.letters:
            match letter.message:
                case Bound():
                    self.bound += 1
                case Fenced(attempt):
                    self.fenced.add((letter.peer, attempt.epoch))
                    assert not any(
                        (order.peer, order.epoch) == (letter.peer, attempt.epoch)
                        for order in self.moving
                    ), "what is fenced is not on its way"
        self.source.letters.clear()


EVENTS = (
    *("arrive", "announce") * 4,
    *("admit", "step", "drain") * 6,
    *("loaded", "preempt", "end") * 2,
    *("cancel", "decline") * 2,
    *("repeat", "claim", "lose"),
)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_sent_is_what_was_announced(seed: int) -> None:
    random = Random(seed)
    bound = sent = 0
    for _ in range(200):
        engine = Engine(random)
        for _ in range(150):
            getattr(engine, random.choice(EVENTS))()
            engine.letters()
            engine.events += 1
            engine.clock.now += random.choice((0.0, 0.1, 1.0))
        for _ in range(2 * len(engine.requests)):
            engine.end()
        while engine.moving:
            engine.drain()
        engine.clock.now += 1000.0
        engine.step()
        engine.letters()
        assert not any(engine.pool.references), "nothing is held for ever"
        assert not len(engine.transfers)
        bound, sent = bound + engine.bound, sent + engine.sent
    assert bound > 150
    assert sent > 150

"""The wire writes every page of a push to where it belongs and nothing else, says "delivered" when
all of it is there and never otherwise, and reports that a source is free when nothing reads it any
more, whatever fails in between. One push that fails or hangs costs no other one anything.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from lamina_kv.data import push_receives, push_streams, push_turns, push_wire
from lamina_kv.data.movers.fences import Fence
from lamina_kv.data.push_pipeline import PushRun
from lamina_kv.data.push_receives import Receives
from lamina_kv.data.push_wire import PushIdentity, PushWire
from lamina_kv.geometry import CacheGeometry, Row
from lamina_kv.observe.timeline import Lane, Timeline
from lamina_kv.plan import (
    TORN,
    Binding,
    Outcome,
    PeerOrder,
    PushOrder,
    PushPages,
    PushPlan,
    PushStop,
    ReceiveOrder,
    SendersOrder,
    TransferId,
    TransferReceipt,
)
from lamina_kv.push.cards import (
    EngineCard,
    RankCard,
    RowCard,
    SenderCard,
    encode_card,
    ends_of_senders,
)
from lamina_kv.push.messages import Attempt, Bound, Delivered, encode
from lamina_kv.push.transports.base import (
    Notice,
    Peer,
    Region,
    Spans,
    Transport,
    TransportError,
    Write,
    WriteState,
)
from simulator.wire import Network

PATIENCE = 60.0
LONG = 600.0
BLOCKS = 12
HEADS = 4
"""Of the whole model."""
HEAD_BYTES = (8, 24)
"""Per row, of one head of a block."""
GAP = 16
"""Bytes behind each block of the last row, that nobody may touch."""
BATCH = 1 << 20
MAX_INFLIGHT = 1 << 30
D = "the decode engine"


class Gate(Fence):
    """A fence that passes when a test says so."""

    def __init__(self, *, passed: bool = True) -> None:
        self.awaited = threading.Event()
        self.looks = 0
        self.error: Exception | None = None
        self._passed = threading.Event()
        if passed:
            self._passed.set()

    def open(self) -> None:
        self._passed.set()

    def wait(self) -> None:
        self.awaited.set()
        assert self._passed.wait(PATIENCE)
        if self.error is not None:
            raise self.error

    def passed(self) -> bool:
        self.looks += 1
        if self.error is not None:
            raise self.error
        return self._passed.is_set()


@dataclass
class Begun:
    """One write that was asked for."""

    peer: Peer
    local: Spans
    remote: Spans
    write: Write


class Guarded(Transport):
    """An end of the simulated network, of which wires and a test take turns."""

    def __init__(self, world: World, regions: list[Region]) -> None:
        self.begun: list[Begun] = []
        self.error: Exception | None = None
        self.nobody = False
        self.connects: Exception | None = None
        self.deaf: Exception | None = None
        self._lock = world.lock
        self.end = world.network.end(regions)

    @property
    def name(self) -> Peer:
        return self.end.name

    def describe(self) -> bytes:
        return self.end.describe()

    def connect(self, description: bytes) -> Peer:
        if self.nobody:
            raise TransportError("nobody is there")
        if self.connects is not None:
            raise self.connects
        with self._lock:
            return self.end.connect(description)

    def write(self, peer: Peer, local: Spans, remote: Spans) -> Write:
        with self._lock:
            if self.error is not None:
                raise self.error
            write = self.end.write(peer, local, remote)
            self.begun.append(Begun(peer, local, remote, write))
            return write

    def notify(self, peer: Peer, body: bytes) -> None:
        with self._lock:
            self.end.notify(peer, body)

    def notices(self) -> list[Notice]:
        if self.deaf is not None:
            raise self.deaf
        with self._lock:
            return self.end.notices()

    def close(self) -> None:
        with self._lock:
            self.end.close()


@dataclass
class Rank:
    """One rank, its memory and its wire."""

    memory: npt.NDArray[np.uint8]
    before: npt.NDArray[np.uint8]
    geometry: CacheGeometry
    card: RankCard
    transport: Guarded
    wire: PushWire
    receipts: list[TransferReceipt]
    timeline: Timeline
    senders: tuple[tuple[str, ...], ...] = ()
    ended: list[tuple[str, TransferReceipt]] = field(default_factory=list)

    def page(self, row: int, block: int) -> bytes:
        shape = self.card.rows[row]
        start = shape.address - self.memory.ctypes.data + block * shape.stride
        return self.memory[start : start + shape.page_bytes].tobytes()

    def take_ended(self) -> list[tuple[str, TransferReceipt]]:
        self.ended += self.wire.ended()
        return self.ended

    def outcomes(self) -> list[tuple[int, Outcome, str]]:
        return [(r.transfer, r.outcome, r.reason) for r in self.receipts]


class World:
    """Engines of some ranks each, between which bytes move when a test says so."""

    def __init__(self) -> None:
        self.network = Network()
        self.lock = threading.RLock()
        self.ranks: list[Rank] = []
        self._rng = random.Random(3)
        self._noise = np.random.default_rng(5)

    def engine(
        self,
        incarnation: str,
        ranks: int = 1,
        *,
        replicated: bool = False,
        batch: int = BATCH,
        max_inflight: int = MAX_INFLIGHT,
    ) -> list[Rank]:
        heads = HEADS if replicated else HEADS // ranks
        return [
            self._rank(incarnation, n, ranks, heads, replicated, (batch, max_inflight))
            for n in range(ranks)
        ]

    def _rank(
        self,
        incarnation: str,
        number: int,
        ranks: int,
        heads: int,
        replicated: bool,
        sizes: tuple[int, int],
    ) -> Rank:
        pages = [size * heads for size in HEAD_BYTES]
        strides = [pages[0], pages[1] + GAP]
        offsets = [0, BLOCKS * strides[0]]
        size = offsets[1] + BLOCKS * strides[1]
        memory = self._noise.integers(0, 256, size, np.uint8)
        base = memory.ctypes.data
        geometry = CacheGeometry(
            tuple(
                Row((f"layer.{i}",), 0, offset, stride, page, (i,), heads)
                for i, (offset, stride, page) in enumerate(
                    zip(offsets, strides, pages, strict=True)
                )
            ),
            BLOCKS,
            16,
            16,
            (size,),
        )
        transport = Guarded(self, [Region(base, size)])
        card = RankCard(
            number,
            transport.describe(),
            BLOCKS,
            tuple(
                RowCard(base + row.offset, row.block_stride, row.page_bytes, heads, row.groups)
                for row in geometry.rows
            ),
            transport.name,
        )
        receipts: list[TransferReceipt] = []
        identity = PushIdentity(incarnation, card, ranks, replicated, *sizes)
        timeline = Timeline()
        wire = PushWire(
            identity, transport, report=receipts.extend, wake=lambda: None, timeline=timeline
        )
        rank = Rank(memory, memory.copy(), geometry, card, transport, wire, receipts, timeline)
        self.ranks.append(rank)
        return rank

    def step(self) -> bool:
        with self.lock:
            return self.network.step(self._rng)

    @property
    def moving(self) -> int:
        """Bytes of writes that have not landed."""
        with self.lock:
            return sum(f.source[1] for f in self.network.flights if f.write is not None)

    def until(self, condition: Callable[[], object], *, moves: bool = True) -> None:
        """Until it holds; meanwhile things move, or not."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "it has not happened"
            if not (moves and self.step()):
                time.sleep(0.0005)

    def still(self, seconds: float = 0.05) -> None:
        """Time for what must not happen; nothing moves."""
        time.sleep(seconds)

    def close(self) -> None:
        for rank in self.ranks:
            assert rank.wire.close(PATIENCE)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def card_of(ranks: list[Rank], incarnation: str = D, *, replicated: bool = False) -> bytes:
    groups = (("full", 16, 0), ("full", 16, 0))
    return encode_card(
        EngineCard(incarnation, b"m", replicated, groups, tuple(rank.card for rank in ranks))
    )


def meet(prefill: list[Rank], decode: list[Rank], *, replicated: bool = False) -> None:
    """Each of the two engines is told of the other."""
    card = card_of(decode, replicated=replicated)
    for rank in prefill:
        rank.wire.carry_out(PushPlan(peers=(PeerOrder(D, card),)))
    sender = SenderCard("P", replicated, tuple(rank.card.end for rank in prefill))
    for rank in decode:
        rank.senders = ends_of_senders(sender, len(decode), replicated=False)


def pages(sources: tuple[int, ...], targets: tuple[int, ...]) -> tuple[PushPages, ...]:
    """The same blocks of both groups."""
    return tuple(PushPages(group, sources, targets) for group in (0, 1))


def order(
    transfer: int,
    what: tuple[PushPages, ...],
    *,
    epoch: int = 7,
    last: bool = True,
    patience: float = LONG,
    computed: bool = False,
) -> PushOrder:
    return PushOrder(TransferId(transfer), D, epoch, what, computed, last, patience)


def send(rank: Rank, *orders: PushOrder, failure: str = "") -> None:
    """One step that computes all of it."""
    for each in orders:
        outgoing = rank.wire.begin(each, 0)
        for row in range(len(rank.card.rows)):
            outgoing.row_ready(row, Gate())
        outgoing.over(failure)


def expect(rank: Rank, epoch: int = 7, deadline: float = LONG, step: int = 0) -> None:
    transfer = TransferId(epoch)
    senders = (SendersOrder(transfer, rank.senders),) if rank.senders else ()
    order = ReceiveOrder(transfer, "r", deadline)
    rank.wire.carry_out(PushPlan(receives=(order,), senders=senders), step)


def only_changed(rank: Rank, blocks: set[int]) -> None:
    """Nothing but these blocks is other than it was."""
    for row, shape in enumerate(rank.card.rows):
        start = shape.address - rank.memory.ctypes.data
        for block in range(BLOCKS):
            first = start + block * shape.stride
            end = first + (shape.page_bytes if block in blocks else 0)
            rest = slice(end, first + shape.stride)
            assert (rank.memory[rest] == rank.before[rest]).all(), (row, block)


@pytest.fixture
def two(world: World) -> tuple[Rank, Rank]:
    """A prefill and a decode engine of one rank each that know each other."""
    prefill, decode = world.engine("P"), world.engine(D)
    meet(prefill, decode)
    expect(decode[0])
    return prefill[0], decode[0]


Two = tuple[Rank, Rank]


# -- what arrives --------------------------------------------------------------------------------


def test_every_page_arrives_and_nothing_else(world: World, two: Two) -> None:
    prefill, decode = two
    first, second = pages((3, 4, 5, 9), (6, 7, 8, 0)), pages((1,), (2,))
    send(prefill, order(1, first, last=False), order(2, second))
    world.until(decode.take_ended)
    ((request, receipt),) = decode.ended
    assert (request, receipt.transfer, receipt.outcome) == ("r", 7, Outcome.DONE)
    for part in (*first, *second):
        for source, target in zip(part.sources, part.targets, strict=True):
            assert decode.page(part.group, target) == prefill.page(part.group, source)
    only_changed(decode, {6, 7, 8, 0, 2})
    world.until(lambda: len(prefill.receipts) == 2)
    assert prefill.outcomes() == [(1, Outcome.DONE, ""), (2, Outcome.DONE, "")]
    block = sum(size * HEADS for size in HEAD_BYTES)
    assert [receipt.moved_bytes for receipt in prefill.receipts] == [4 * block, block]


def test_a_receive_has_a_lane_on_the_timeline(world: World, two: Two) -> None:
    prefill, decode = two
    before = Timeline.now()
    expect(decode, epoch=8, step=5)
    send(prefill, order(1, pages((0,), (0,)), epoch=8))
    world.until(decode.take_ended)
    decode.wire.carry_out(PushPlan(give_ups=(TransferId(7),)), 9)
    world.until(lambda: len(decode.timeline.spans()) == 2)
    well, given_up = decode.timeline.spans()
    assert (well.lane, well.step, well.row) == (Lane.RECEIVE, 5, -1)
    assert before <= well.start <= well.end
    assert (given_up.lane, given_up.step) == (Lane.RECEIVE, 0)
    assert {span.lane for span in prefill.timeline.spans()} == {Lane.PUSH}


def test_delivered_means_that_all_is_there(world: World, two: Two) -> None:
    """Whatever lands last. Of a source nothing is said before its write has ended."""
    prefill, decode = two
    send(prefill, order(1, pages((0, 2), (0, 2)), last=False), order(2, pages((5,), (5,))))
    world.until(lambda: world.moving, moves=False)
    while world.moving:
        assert not decode.take_ended()
        world.step()
        world.still(0.002)
    world.until(decode.take_ended)
    assert decode.ended[0][1].outcome is Outcome.DONE


def test_the_last_order_first(world: World, two: Two) -> None:
    """Its write lands before that of the order before it."""
    prefill, decode = two
    send(prefill, order(1, pages((0,), (0,)), last=False), order(2, pages((5,), (5,))))
    world.until(lambda: len(prefill.transport.begun) == 2, moves=False)
    late = prefill.transport.begun[0].write
    with world.lock:
        held = [flight for flight in world.network.flights if flight.write is late]
        world.network.flights = [f for f in world.network.flights if f.write is not late]
    while world.step():
        pass
    world.still()
    assert not decode.take_ended()
    assert not prefill.receipts
    with world.lock:
        world.network.flights += held
    world.until(decode.take_ended)
    assert [receipt.transfer for receipt in prefill.receipts] == [1, 2]


def test_nothing_to_send(world: World, two: Two) -> None:
    prefill, decode = two
    send(prefill, order(1, ()))
    world.until(decode.take_ended)
    only_changed(decode, set())


def test_rows_leave_when_their_fence_has_passed(world: World) -> None:
    prefill, decode = world.engine("P", batch=1), world.engine(D)
    meet(prefill, decode)
    expect(decode[0])
    (sender,) = prefill
    gates = [Gate(passed=False), Gate(passed=False)]
    outgoing = sender.wire.begin(order(1, pages((3,), (3,))), 0)
    for row, gate in enumerate(gates):
        outgoing.row_ready(row, gate)
    outgoing.over("")
    world.still()
    assert not sender.transport.begun
    for count, gate in enumerate(gates, 1):
        gate.open()
        world.until(lambda count=count: len(sender.transport.begun) == count)
    world.until(decode[0].take_ended)
    assert decode[0].page(1, 3) == sender.page(1, 3)


def test_nobody_looks_at_a_fence_until_it_has_passed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is behind its host for a whole prefill: a row's fence wakes the wire."""
    monkeypatch.setattr(push_wire, "IDLE_POLL", LONG)
    prefill, decode = world.engine("P", batch=1), world.engine(D)
    meet(prefill, decode)
    expect(decode[0])
    (sender,) = prefill
    gates = [Gate(passed=False), Gate(passed=False)]
    outgoing = sender.wire.begin(order(1, pages((3,), (3,))), 0)
    for row, gate in enumerate(gates):
        outgoing.row_ready(row, gate)
    outgoing.over("")
    for count, gate in enumerate(gates, 1):
        world.until(gate.awaited.is_set)
        looks = gate.looks
        time.sleep(0.02)
        assert gate.looks == looks
        gate.open()
        world.until(lambda count=count: len(sender.transport.begun) == count)
    world.until(decode[0].take_ended)


def test_a_device_that_fails_ends_the_push(world: World) -> None:
    prefill, decode = world.engine("P"), world.engine(D)
    meet(prefill, decode)
    (sender,) = prefill
    gate = Gate(passed=False)
    outgoing = sender.wire.begin(order(1, pages((3,), (3,))), 0)
    outgoing.row_ready(0, gate)
    outgoing.over("")
    assert gate.awaited.wait(PATIENCE)
    gate.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    gate.open()
    world.until(lambda: sender.receipts)
    (receipt,) = sender.receipts
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, "RuntimeError")
    assert not sender.transport.begun


@pytest.mark.parametrize(
    ("mine", "theirs", "replicated"),
    [(2, 1, False), (1, 2, False), (4, 2, False), (2, 2, False), (2, 1, True), (1, 2, True)],
)
def test_ranks(world: World, mine: int, theirs: int, replicated: bool) -> None:
    """Head for head. What every rank has comes from one of them."""
    prefill = world.engine("P", mine, replicated=replicated)
    decode = world.engine(D, theirs, replicated=replicated)
    if replicated:
        for rank in prefill[1:]:
            rank.memory[:] = prefill[0].memory
    meet(prefill, decode, replicated=replicated)
    what = pages((1, 2, 7), (4, 5, 3))
    for rank in decode:
        expect(rank)
    for rank in prefill:
        send(rank, order(1, what))
    world.until(lambda: all(rank.take_ended() for rank in decode))
    world.until(lambda: all(rank.receipts for rank in prefill))

    def whole(ranks: list[Rank], row: int, block: int) -> bytes:
        parts = [rank.page(row, block) for rank in ranks]
        return parts[0] if replicated else b"".join(parts)

    for part in what:
        for source, target in zip(part.sources, part.targets, strict=True):
            assert whole(decode, part.group, target) == whole(prefill, part.group, source)
    for rank in decode:
        only_changed(rank, {4, 5, 3})
    assert all(rank.outcomes() == [(1, Outcome.DONE, "")] for rank in prefill)


def test_one_of_two_senders_is_not_all(world: World) -> None:
    prefill, decode = world.engine("P", 2), world.engine(D)
    meet(prefill, decode)
    expect(decode[0])
    send(prefill[1], order(1, pages((1,), (1,))))
    world.until(lambda: prefill[1].receipts)
    while world.step():
        pass
    world.still()
    assert not decode[0].take_ended()
    send(prefill[0], order(1, pages((1,), (1,))))
    world.until(decode[0].take_ended)


# -- how it is sent ------------------------------------------------------------------------------


def test_a_small_prompt_takes_one_write(world: World, two: Two) -> None:
    prefill, decode = two
    send(prefill, order(1, pages((1, 2, 3), (1, 2, 3))))
    world.until(decode.take_ended)
    (begun,) = prefill.transport.begun
    # The blocks of the first row are neighbours in memory, those of the second have gaps.
    assert len(begun.local) == len(begun.remote) == 1 + 3


@pytest.mark.parametrize(
    ("sources", "targets", "runs"),
    [((1, 2, 3), (5, 6, 7), 1), ((1, 2, 3), (7, 6, 5), 3), ((1, 2, 4), (1, 2, 3), 2)],
)
def test_neighbours_on_both_sides_are_one_stretch(
    world: World, two: Two, sources: tuple[int, ...], targets: tuple[int, ...], runs: int
) -> None:
    prefill, decode = two
    send(prefill, order(1, (PushPages(0, sources, targets),)))
    world.until(decode.take_ended)
    (begun,) = prefill.transport.begun
    assert len(begun.local) == runs
    for source, target in zip(sources, targets, strict=True):
        assert decode.page(0, target) == prefill.page(0, source)


def test_large_rows_do_not_wait_for_each_other(world: World) -> None:
    prefill, decode = world.engine("P", batch=32), world.engine(D)
    meet(prefill, decode)
    outgoing = prefill[0].wire.begin(order(1, pages((1,), (1,))), 0)
    outgoing.row_ready(0, Gate())
    world.until(lambda: len(prefill[0].transport.begun) == 1)
    outgoing.row_ready(1, Gate())
    outgoing.over("")
    world.until(lambda: len(prefill[0].transport.begun) == 2)


@pytest.mark.parametrize("pushes", [1, 3])
def test_bytes_in_flight_to_one_engine_are_bounded(world: World, pushes: int) -> None:
    window = 100
    prefill, decode = world.engine("P", batch=1, max_inflight=window), world.engine(D)
    meet(prefill, decode)
    blocks = tuple(range(12))
    for epoch in range(pushes):
        expect(decode[0], epoch=epoch)
        mine = blocks[epoch::pushes]
        for n in mine:
            send(prefill[0], order(n, pages((n,), (n,)), last=n == mine[-1], epoch=epoch))
    most = 0

    def is_over() -> bool:
        nonlocal most
        most = max(most, world.moving)
        return len(decode[0].take_ended()) == pushes

    world.until(is_over)
    assert window / 2 < most <= window + window // push_turns.SHARE
    only_changed(decode[0], set(blocks))
    assert decode[0].page(1, 9) == prefill[0].page(1, 9)


def test_a_short_prompt_does_not_wait_for_long_ones(world: World) -> None:
    """It waits for what is on its way, and each of its writes for one of each of the others."""
    window = 96
    prefill, decode = world.engine("P", batch=1, max_inflight=window), world.engine(D)
    meet(prefill, decode)
    (sender,), longs, short = prefill, (1, 2, 3), 9
    for epoch in longs:
        send(sender, order(epoch, pages(tuple(range(8)), tuple(range(8))), epoch=epoch))
    world.until(lambda: world.moving >= window, moves=False)
    expect(decode[0], epoch=short)
    send(sender, order(short, (PushPages(0, (8,), (8,)),), epoch=short))
    nobody = PushOrder(TransferId(10), "nobody", 1, (), False, True, LONG)
    send(sender, nobody)  # answered at once: what was ordered before it has been taken up
    world.until(lambda: sender.receipts, moves=False)
    begun = len(sender.transport.begun)
    world.until(decode[0].take_ended)
    page = sender.card.rows[0].address + 8 * sender.card.rows[0].stride
    mine = [
        page <= int(write.local[0, 0]) < page + sender.card.rows[0].stride
        for write in sender.transport.begun[begun:]
    ]
    last = max(index for index, is_mine in enumerate(mine) if is_mine)
    assert sum(mine) == -(-HEAD_BYTES[0] * HEADS // (window // push_turns.SHARE)) == 3
    assert mine[: last + 1].count(False) <= 3 * len(longs)
    world.until(lambda: len(sender.receipts) == 5)


def test_a_chunk_that_is_larger_than_the_bound_moves_row_by_row_among_small_ones(
    world: World,
) -> None:
    """However many of those there are."""
    prefill, decode = world.engine("P", batch=1, max_inflight=64), world.engine(D)
    meet(prefill, decode)
    (sender,) = prefill
    expect(decode[0], epoch=1)
    outgoing = sender.wire.begin(order(1, pages(tuple(range(8)), tuple(range(8))), epoch=1), 0)
    begun = 0
    for row in range(2):
        outgoing.row_ready(row, Gate())
        while decode[0].page(row, 7) != sender.page(row, 7):
            assert begun < 1000, "small ones go past it"
            while begun < len(sender.receipts) + 2:
                begun += 1
                small = order(100 + begun, (PushPages(0, (11,), (11,)),), epoch=100 + begun)
                send(sender, small)
            world.step()
    outgoing.over("")
    world.until(decode[0].take_ended)
    assert decode[0].ended[0][1].outcome is Outcome.DONE


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_parts_of_a_write_are_the_write(size: int) -> None:
    rng = np.random.default_rng(size)
    for count in (1, 2, 30):
        lengths = rng.integers(1, 100, count)
        local, remote = (
            np.stack((rng.integers(0, 1 << 40, count), lengths), axis=1).astype(np.uint64)
            for _ in range(2)
        )
        parts = list(push_turns.cut(local, remote, size))
        sizes = [int(here[:, 1].sum()) for here, _ in parts]
        assert all(part == size for part in sizes[:-1])
        assert 0 < sizes[-1] <= size
        for side, whole in enumerate((local, remote)):
            found = [int(a) + i for part in parts for a, n in part[side] for i in range(int(n))]
            assert found == [int(a) + i for a, n in whole for i in range(int(n))]
        assert all((here[:, 1] == there[:, 1]).all() for here, there in parts)


# -- what goes wrong -----------------------------------------------------------------------------


def test_a_write_that_fails(world: World, two: Two) -> None:
    """Nothing of that push is sent any more, and nobody says that it is there."""
    prefill, decode = two
    send(prefill, order(1, pages((1,), (1,)), last=False))
    world.until(lambda: prefill.transport.begun, moves=False)
    with world.lock:
        world.network.fail(prefill.transport.begun[0].write)
    world.until(lambda: prefill.receipts)
    for transfer in (2, 3):
        send(prefill, order(transfer, pages((2,), (2,)), last=transfer == 3))
        world.until(lambda transfer=transfer: len(prefill.receipts) == transfer)
    assert prefill.outcomes() == [(n, Outcome.FAILED, TORN) for n in (1, 2, 3)]
    assert len(prefill.transport.begun) == 1
    while world.step():
        pass
    world.still()
    assert not decode.take_ended()


def test_sources_are_read_until_all_writes_have_ended(world: World, two: Two) -> None:
    """A failure says nothing about the writes beside it."""
    prefill, _ = two
    both = order(1, pages((1,), (1,)), last=False), order(2, pages((2,), (2,)))
    send(prefill, *both)
    world.until(lambda: len(prefill.transport.begun) == 2, moves=False)
    with world.lock:
        world.network.fail(prefill.transport.begun[0].write)
    world.until(lambda: prefill.receipts, moves=False)
    world.still()
    assert [receipt.transfer for receipt in prefill.receipts] == [1]
    world.until(lambda: len(prefill.receipts) == 2)
    assert prefill.receipts[1].outcome is Outcome.FAILED


def test_stop(world: World, two: Two) -> None:
    prefill, decode = two
    send(prefill, order(1, pages((1,), (1,)), last=False))
    world.until(lambda: prefill.transport.begun, moves=False)
    prefill.wire.carry_out(PushPlan(stops=(PushStop(D, 7),)))
    world.still()
    assert not prefill.receipts, "it is still read"
    world.until(lambda: prefill.receipts)
    send(prefill, order(2, pages((2,), (2,))))
    world.until(lambda: len(prefill.receipts) == 2)
    assert prefill.outcomes() == [(n, Outcome.FAILED, "stopped") for n in (1, 2)]
    world.still()
    assert not decode.take_ended()
    only_changed(decode, {1})


def test_a_stop_in_the_plan_of_its_first_order(world: World, two: Two) -> None:
    """What is carried out first is the stop. Nothing of the push is sent, nor kept."""
    prefill, decode = two
    prefill.wire.carry_out(PushPlan(stops=(PushStop(D, 7),)))
    send(prefill, order(1, pages((1,), (1,)), last=False))
    world.until(lambda: prefill.receipts)
    assert prefill.outcomes() == [(1, Outcome.FAILED, "stopped")]
    world.until(lambda: not prefill.wire._streams)
    assert not prefill.transport.begun
    assert not decode.take_ended()


def test_a_stop_of_something_else(world: World, two: Two) -> None:
    prefill, decode = two
    send(prefill, order(1, pages((1,), (1,)), last=False))
    world.until(lambda: prefill.transport.begun, moves=False)
    prefill.wire.carry_out(PushPlan(stops=(PushStop(D, 8), PushStop("another", 7))))
    send(prefill, order(2, pages((2,), (2,))))
    world.until(decode.take_ended)


def test_too_late(world: World, two: Two) -> None:
    prefill, decode = two
    send(prefill, order(1, pages((1,), (1,)), patience=0.0))
    world.until(lambda: prefill.receipts)
    assert prefill.outcomes() == [(1, Outcome.FAILED, "too_late")]
    assert not prefill.transport.begun
    world.still()
    assert not decode.take_ended()


def test_the_step_fails(world: World, two: Two) -> None:
    """What it computed is worth nothing, whether or not some of it has left."""
    prefill, decode = two
    send(prefill, order(1, pages((1,), (1,))), failure="forward_failed")
    world.until(lambda: prefill.receipts)
    assert prefill.outcomes() == [(1, Outcome.FAILED, "forward_failed")]
    world.still()
    assert not decode.take_ended()


@pytest.mark.parametrize("error", [ValueError("not in a region"), RuntimeError("anything")])
def test_a_transport_that_refuses(world: World, two: Two, error: Exception) -> None:
    """It costs that push, and sources come back."""
    prefill, decode = two
    prefill.transport.error = error
    send(prefill, order(1, pages((1,), (1,)), last=False), order(2, pages((2,), (2,))))
    world.until(lambda: len(prefill.receipts) == 2)
    assert {receipt.outcome for receipt in prefill.receipts} == {Outcome.FAILED}
    prefill.transport.error = None
    expect(decode, epoch=8)
    send(prefill, order(3, pages((3,), (3,)), epoch=8))
    world.until(decode.take_ended)
    assert decode.ended[0][1].transfer == 8


def test_a_connection_that_fails_as_nobody_expected(world: World, two: Two) -> None:
    prefill, decode = two
    prefill.transport.connects = RuntimeError("anything")
    send(prefill, order(1, pages((1,), (1,)), last=False), order(2, pages((2,), (2,))))
    world.until(lambda: len(prefill.receipts) == 2)
    assert prefill.outcomes() == [(n, Outcome.FAILED, "RuntimeError") for n in (1, 2)]
    prefill.transport.connects = None
    expect(decode, epoch=8)
    send(prefill, order(3, pages((3,), (3,)), epoch=8))
    world.until(decode.take_ended)
    assert decode.ended[0][1].transfer == 8


def test_an_order_that_cannot_be_begun(
    world: World, two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its push has failed, each order once, and nothing is said to be there."""
    prefill, decode = two
    send(prefill, order(1, pages((1,), (1,)), last=False))
    world.until(lambda: len(prefill.receipts) == 1)

    def refuse(*_: object) -> None:
        raise IndexError("no such page")

    with monkeypatch.context() as patch:
        patch.setattr(push_streams, "PageSpans", refuse)
        send(prefill, order(2, pages((2,), (2,)), last=False))
        world.until(lambda: len(prefill.receipts) == 2)
    send(prefill, order(3, pages((3,), (3,))))
    world.until(lambda: len(prefill.receipts) == 3)
    assert prefill.outcomes() == [
        (1, Outcome.DONE, ""),
        (2, Outcome.FAILED, "IndexError"),
        (3, Outcome.FAILED, "IndexError"),
    ]
    world.still()
    assert not decode.take_ended()


def test_a_peer_that_is_gone(world: World, two: Two) -> None:
    prefill, decode = two
    with world.lock:
        world.network.kill(decode.transport.end.name)
    send(prefill, order(1, pages((1,), (1,))))
    world.until(lambda: prefill.receipts)
    assert prefill.receipts[0].outcome is Outcome.FAILED


def test_no_destination_waits_for_another(world: World, two: Two) -> None:
    """One does not take what it is sent."""
    prefill, decode = two
    other = world.engine("other")
    prefill.wire.carry_out(PushPlan(peers=(PeerOrder("other", card_of(other, "other")),)))
    other[0].senders = ((prefill.card.end,),)
    expect(other[0], epoch=1)
    with world.lock:
        world.network.stopped.add(decode.transport.end.name)
    send(prefill, order(1, pages((1,), (1,))))
    send(prefill, PushOrder(TransferId(2), "other", 1, pages((2,), (2,)), False, True, LONG))
    world.until(other[0].take_ended)
    assert [receipt.transfer for receipt in prefill.receipts] == [2]


@pytest.mark.parametrize("how", ["never", "forgotten", "nobody"])
def test_a_peer_that_is_not_known(world: World, how: str) -> None:
    (prefill,), decode = world.engine("P"), world.engine(D)
    if how == "forgotten":
        meet([prefill], decode)
        prefill.wire.carry_out(PushPlan(gone=(D,)))
    if how == "nobody":
        rank = RankCard(0, b"sim:nobody", BLOCKS, decode[0].card.rows)
        card = encode_card(EngineCard(D, b"m", False, (), (rank,)))
        prefill.wire.carry_out(PushPlan(peers=(PeerOrder(D, card),)))
    send(prefill, order(1, pages((1,), (1,)), last=False), order(2, pages((2,), (2,))))
    world.until(lambda: len(prefill.receipts) == 2)
    assert prefill.outcomes() == [(n, Outcome.FAILED, "unreachable") for n in (1, 2)]


def test_a_peer_that_is_reached_later(world: World) -> None:
    """It does not have to introduce itself anew."""
    (prefill,), (decode,) = world.engine("P"), world.engine(D)
    prefill.transport.nobody = True
    meet([prefill], [decode])
    send(prefill, order(1, pages((1,), (1,)), epoch=6))
    world.until(lambda: prefill.receipts)
    assert prefill.outcomes() == [(1, Outcome.FAILED, "unreachable")]
    prefill.transport.nobody = False
    expect(decode)
    send(prefill, order(2, pages((2,), (2,))))
    world.until(decode.take_ended)


def test_a_peer_that_was_gone_and_is_back(world: World, two: Two) -> None:
    """Between two steps, so that one plan says both."""
    prefill, decode = two
    card = card_of([decode])
    prefill.wire.carry_out(PushPlan(gone=(D,), peers=(PeerOrder(D, card),)))
    send(prefill, order(1, pages((1,), (1,))))
    world.until(decode.take_ended)


def test_close_calls_back_what_moves(world: World, two: Two) -> None:
    prefill, _ = two
    send(prefill, order(1, pages((1,), (1,))))
    world.until(lambda: prefill.transport.begun, moves=False)
    assert prefill.wire.close(PATIENCE)
    assert prefill.transport.begun[0].write.state() is WriteState.FAILED


# -- what is received ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [TransportError("broken"), RuntimeError("anything")])
def test_a_transport_that_hears_nothing_any_more(
    world: World, two: Two, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for a deadline, and it is said once."""
    _, decode = two
    decode.transport.deaf = error
    world.until(decode.take_ended)
    expect(decode, epoch=8)
    world.until(lambda: len(decode.take_ended()) == 2)
    world.still()
    assert [(receipt.outcome, receipt.reason) for _, receipt in decode.ended] == [
        (Outcome.FAILED, type(error).__name__)
    ] * 2
    (said,) = (record for record in caplog.records if record.name == "lamina_kv.data")
    assert "nothing more is received" in said.message


NESTED = b"\x94" + msgspec.msgpack.encode("delivered") + b"\x91" * 3000 + b"\x00"


@pytest.mark.parametrize("body", [b"", b"\x00garbage", NESTED])
def test_a_notice_that_nobody_understands_costs_nobody_else_anything(
    world: World, two: Two, caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    prefill, decode = two
    peer = prefill.transport.connect(decode.card.wire)
    for _ in range(3):
        prefill.transport.notify(peer, body)
    world.until(lambda: not world.step() and not decode.transport.end.inbox, moves=False)
    send(prefill, order(1, pages((1,), (1,))))
    world.until(decode.take_ended)
    assert decode.ended[0][1].outcome is Outcome.DONE
    (said,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert "a notice from" in said.message


def test_a_fault_of_a_notice_is_that_of_no_other(
    world: World, two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only an end that hears nothing any more ends what waits for it."""
    prefill, decode = two
    take, faults = Receives.notice, [KeyError("a fault of ours")]

    def notice(receives: Receives, notice: Notice) -> None:
        if faults:
            raise faults.pop()
        take(receives, notice)

    monkeypatch.setattr(Receives, "notice", notice)
    peer = prefill.transport.connect(decode.card.wire)
    prefill.transport.notify(peer, b"")
    world.until(lambda: not faults)
    send(prefill, order(1, pages((1,), (1,))))
    world.until(decode.take_ended)
    assert decode.ended[0][1].outcome is Outcome.DONE


def notice(end: str = "p0", *, epoch: int = 7, incarnation: str = D) -> Notice:
    return Notice(Peer(end), encode(Delivered(incarnation, epoch)))


def expecting(*epochs: int, deadline: float = LONG, ends: tuple[str, ...] = ("p0",)) -> Receives:
    receives = Receives(D)
    for epoch in epochs:
        receives.expect(ReceiveOrder(TransferId(epoch), f"r{epoch}", deadline))
        receives.owed_by(TransferId(epoch), ends)
    return receives


def ended(receives: Receives) -> list[tuple[str, Outcome, str]]:
    return [(name, receipt.outcome, receipt.reason) for name, receipt in receives.ended()]


def test_a_notice_that_is_early() -> None:
    """The order, or who sends, is on its way from the scheduler."""
    receives = expecting()
    receives.notice(notice("p1"))
    receives.expect(ReceiveOrder(TransferId(7), "r7", LONG))
    receives.notice(notice("p0"))
    assert ended(receives) == []
    receives.owed_by(TransferId(7), ("p0", "p1"))
    assert ended(receives) == [("r7", Outcome.DONE, "")]
    receives.owed_by(TransferId(7), ("p0", "p1"))
    assert ended(receives) == []


def test_a_notice_that_comes_twice() -> None:
    receives = expecting(7, ends=("p0", "p1"))
    receives.notice(notice("p0"))
    receives.notice(notice("p0"))
    assert ended(receives) == []
    receives.notice(notice("p1"))
    receives.notice(notice("p1"))
    assert ended(receives) == [("r7", Outcome.DONE, "")]


@pytest.mark.parametrize("early", [False, True])
def test_a_stranger_delivers_nothing(early: bool) -> None:
    """Nor does anybody as long as it is not known who sends."""
    receives = Receives(D)
    if early:
        receives.notice(notice("stranger"))
    receives.expect(ReceiveOrder(TransferId(7), "r7", LONG))
    receives.notice(notice("stranger"))
    assert ended(receives) == []
    receives.owed_by(TransferId(7), ())
    assert ended(receives) == []
    receives.owed_by(TransferId(7), ("p0", "p1"))
    receives.notice(notice("p0"))
    receives.notice(notice("stranger"))
    assert ended(receives) == []
    receives.notice(notice("p1"))
    assert ended(receives) == [("r7", Outcome.DONE, "")]


def test_a_notice_that_is_late() -> None:
    """Nobody waits for it; nor is it kept for the one that comes after."""
    receives = expecting(7)
    receives.give_up(TransferId(7), "given_up")
    receives.notice(notice())
    assert ended(receives) == [("r7", Outcome.FAILED, "given_up")]
    receives.expect(ReceiveOrder(TransferId(8), "r8", LONG))
    receives.owed_by(TransferId(8), ("p0",))
    assert ended(receives) == []
    assert len(receives) == 1


@pytest.mark.parametrize(
    "strange",
    [
        notice(incarnation="the engine that was here before"),
        notice(epoch=6),
        Notice(Peer("p"), encode(Bound(Attempt("push", 7)))),
    ],
    ids=["incarnation", "epoch", "kind"],
)
def test_a_notice_that_means_nothing(strange: Notice) -> None:
    receives = expecting(7)
    receives.notice(strange)
    assert ended(receives) == []
    receives.notice(notice())
    assert ended(receives) == [("r7", Outcome.DONE, "")]


def test_a_receive_that_is_given_up_twice_or_after_its_end() -> None:
    receives = expecting(7, 8)
    receives.notice(notice())
    for _ in range(2):
        receives.give_up(TransferId(7), "given_up")
        receives.give_up(TransferId(8), "given_up")
    assert ended(receives) == [("r7", Outcome.DONE, ""), ("r8", Outcome.FAILED, "given_up")]


def test_a_deadline() -> None:
    receives = expecting(7, deadline=0.0)
    assert ended(receives) == [("r7", Outcome.FAILED, "deadline")]
    assert len(receives) == 0


def test_early_notices_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_receives, "EARLY", 8)
    receives = expecting()
    for epoch in range(1, 8 + 2):
        receives.notice(notice(epoch=epoch))
    for epoch in (1, 2):
        receives.expect(ReceiveOrder(TransferId(epoch), f"r{epoch}", LONG))
        receives.owed_by(TransferId(epoch), ("p0",))
    assert ended(receives) == [("r2", Outcome.DONE, "")]


def test_ends_of_one_push_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_receives, "MAX_ENDS", 8)
    receives = expecting()
    for number in range(100):
        receives.notice(notice(f"stranger {number}"))
    assert len(receives._early[7]) == 8
    receives.expect(ReceiveOrder(TransferId(7), "r7", LONG))
    receives.notice(notice("another"))
    assert len(receives._expected[7].delivered) == 8


# -- the step ------------------------------------------------------------------------------------


class StepMover:
    """Fences of one step, all of which have passed."""

    def __init__(self) -> None:
        self.fences = 0

    def fence_compute(self) -> Fence:
        self.fences += 1
        return Gate()


def run_of(
    rank: Rank,
    *orders: PushOrder,
    gathers: Sequence[int] = (),
    mover: StepMover | None = None,
) -> PushRun:
    mover, kept = mover or StepMover(), [TransferId(transfer) for transfer in gathers]
    return PushRun(orders, rank.geometry, mover, rank.wire, gathers=kept)  # type: ignore[arg-type]


def test_rows_that_no_hook_announced_are_behind_one_fence(world: World, two: Two) -> None:
    """The engine's thread makes an event of the device for each fence."""
    prefill, decode = two
    mover = StepMover()
    run = run_of(prefill, order(1, pages((1,), (1,))), mover=mover)
    run.sweep("")
    world.until(decode.take_ended)
    assert mover.fences == 1
    for row in (0, 1):
        assert decode.page(row, 1) == prefill.page(row, 1)


def test_what_was_computed_before_leaves_at_once(world: World, two: Two) -> None:
    prefill, decode = two
    run = run_of(prefill, order(1, pages((1,), (1,)), computed=True))
    assert not run.moves_rows
    world.until(decode.take_ended)
    run.row_written(0)
    run.sweep("")
    world.until(lambda: prefill.receipts)
    assert prefill.outcomes() == [(1, Outcome.DONE, "")]


def test_a_row_leaves_when_its_last_layer_has_written(world: World) -> None:
    (prefill,), decode = world.engine("P", batch=1), world.engine(D)
    meet([prefill], decode)
    expect(decode[0])
    run = run_of(prefill, order(1, pages((1,), (1,))))
    assert run.moves_rows
    world.still()
    assert not prefill.transport.begun
    run.row_written(1)
    run.row_written(1)
    world.until(lambda: prefill.transport.begun)
    assert [len(begun.local) for begun in prefill.transport.begun] == [1]
    run.sweep("")  # no hook spoke for the first row
    world.until(decode[0].take_ended)
    assert len(prefill.transport.begun) == 2
    for row in (0, 1):
        assert decode[0].page(row, 1) == prefill.page(row, 1)


def test_a_row_without_pages_of_a_group(world: World, two: Two) -> None:
    prefill, decode = two
    run = run_of(prefill, order(1, (PushPages(1, (4,), (5,)),)))
    run.row_written(0)
    run.row_written(1)
    run.sweep("")
    world.until(decode.take_ended)
    (begun,) = prefill.transport.begun
    assert len(begun.local) == 1
    assert decode.page(1, 5) == prefill.page(1, 4)
    assert decode.memory[: BLOCKS * decode.card.rows[0].stride].tobytes() == (
        decode.before[: BLOCKS * decode.card.rows[0].stride].tobytes()
    )


def test_a_step_that_fails(world: World, two: Two) -> None:
    prefill, decode = two
    run = run_of(prefill, order(1, pages((1,), (1,))))
    run.row_written(0)
    run.sweep("forward_failed")
    world.until(lambda: prefill.receipts)
    assert prefill.receipts[0].outcome is Outcome.FAILED
    world.still()
    assert not decode.take_ended()


# -- destinations that become known while the step runs -------------------------------------------


def binding(decode: Rank, transfer: int, what: tuple[PushPages, ...]) -> Binding:
    return Binding(PeerOrder(D, card_of([decode])), order(transfer, what))


def test_what_is_written_leaves_when_its_destination_is_known(world: World) -> None:
    """Also to a decode engine of which no plan has spoken."""
    (prefill,), (decode,) = world.engine("P", batch=1), world.engine(D)
    decode.senders = ((prefill.transport.name,),)
    expect(decode)
    run = run_of(prefill, gathers=[3])
    assert run.moves_rows
    run.row_written(0)
    world.still()
    assert not prefill.transport.begun
    bound = binding(decode, 3, pages((3,), (4,)))
    prefill.wire.bind(bound)
    world.until(lambda: len(prefill.transport.begun) == 1)
    run.row_written(1)
    world.until(lambda: len(prefill.transport.begun) == 2)
    run.sweep("")
    prefill.wire.carry_out(PushPlan(bindings=(bound,)))  # the next plan
    world.until(decode.take_ended)
    world.until(lambda: prefill.receipts)
    world.still()
    assert prefill.outcomes() == [(3, Outcome.DONE, "")]
    assert len(prefill.transport.begun) == 2
    for row in (0, 1):
        assert decode.page(row, 4) == prefill.page(row, 3)
    only_changed(decode, {4})


@pytest.mark.parametrize("when", ["before the plan", "after the step"])
def test_a_destination_may_be_early_or_late(world: World, two: Two, when: str) -> None:
    prefill, decode = two
    bound = binding(decode, 3, pages((3,), (4,)))
    if when == "before the plan":
        prefill.wire.bind(bound)
    run = run_of(prefill, gathers=[2, 3])
    run.sweep("")
    if when == "after the step":
        world.still()
        prefill.wire.bind(bound)
    world.until(decode.take_ended)
    world.until(lambda: prefill.receipts)
    assert prefill.outcomes() == [(3, Outcome.DONE, "")]
    only_changed(decode, {4})


def test_what_is_dropped_is_not_sent_whoever_asks_for_it(world: World, two: Two) -> None:
    prefill, decode = two
    run_of(prefill, gathers=[3]).sweep("")
    prefill.wire.carry_out(PushPlan(drops=(TransferId(3),)))
    prefill.wire.bind(binding(decode, 3, pages((3,), (4,))))
    world.still()
    assert not prefill.transport.begun
    assert not prefill.receipts


@pytest.mark.parametrize("bound", ["before", "after", "never"])
def test_a_step_that_fails_fails_what_it_gathers(world: World, two: Two, bound: str) -> None:
    prefill, decode = two
    run = run_of(prefill, gathers=[3])
    run.row_written(0)
    if bound == "before":
        prefill.wire.bind(binding(decode, 3, pages((3,), (4,))))
        world.still()
    run.sweep("forward_failed")
    world.until(lambda: prefill.receipts)
    if bound == "after":
        prefill.wire.bind(binding(decode, 3, pages((3,), (4,))))
    world.still()
    assert prefill.outcomes() == [(3, Outcome.FAILED, "forward_failed")]
    assert not decode.take_ended()


def test_what_was_stopped_before_its_destination_came_is_not_sent(world: World, two: Two) -> None:
    prefill, decode = two
    run = run_of(prefill, gathers=[3])
    prefill.wire.carry_out(PushPlan(stops=(PushStop(D, 7),)))
    prefill.wire.bind(binding(decode, 3, pages((3,), (4,))))
    run.sweep("")
    world.until(lambda: prefill.receipts)
    assert prefill.outcomes() == [(3, Outcome.FAILED, "stopped")]
    assert not prefill.transport.begun

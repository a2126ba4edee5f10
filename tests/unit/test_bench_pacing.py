"""A paced tier delivers at the pace it is given, one thing after the other, and loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from lamina.bench.pacing import Link, PacedSource
from lamina.data.load_pipeline import BadChunks, Piece
from lamina.data.movers.base import Fence
from lamina.geometry import CacheGeometry, Row
from lamina.plan import ChunkKey, TierName


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Frozen(Clock):
    """Time that does not pass: everything is asked for at once."""

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


class Passed(Fence):
    def wait(self) -> None: ...

    def passed(self) -> bool:
        return True


def link(clock: Clock, bandwidth: float = 1000.0, latency: float = 0.0) -> Link:
    made = Link(clock, clock.sleep)
    made.pace(bandwidth, latency)
    return made


def test_bytes_take_their_size_over_the_bandwidth() -> None:
    clock = Clock()
    link(clock, bandwidth=1000).carry(250)
    assert clock.now == pytest.approx(100.25)


def test_latency_is_paid_by_each_that_finds_the_pipe_empty() -> None:
    clock = Clock()
    pipe = link(clock, latency=0.5)
    pipe.carry(100)
    clock.now += 10
    pipe.carry(100)
    assert clock.slept == pytest.approx([0.6, 0.6])


def test_what_is_asked_for_at_once_pays_latency_once_and_shares_the_bandwidth() -> None:
    clock = Frozen()
    pipe = link(clock, latency=0.5)
    for _ in range(3):
        pipe.carry(100)
    assert clock.slept == pytest.approx([0.6, 0.7, 0.8])


def test_an_unpaced_link_does_not_sleep() -> None:
    clock = Clock()
    Link(clock, clock.sleep).carry(1 << 40)
    assert clock.slept == []


def test_a_new_pace_holds_for_what_is_asked_for_from_then_on() -> None:
    clock = Clock()
    pipe = link(clock, bandwidth=100)
    pipe.carry(100)
    pipe.pace(1000, 0)
    pipe.carry(100)
    assert clock.slept == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize(
    ("bandwidth", "latency"), [(0, 0), (-1, 0), (float("nan"), 0), (1, -0.1), (1, float("nan"))]
)
def test_an_impossible_pace_is_refused(bandwidth: float, latency: float) -> None:
    with pytest.raises(ValueError, match="positive bandwidth"):
        Link().pace(bandwidth, latency)


class Tier:
    """A tier that notes what it was asked for, and when."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.asked: list[tuple[int, Piece, float]] = []
        self.fence = Passed()
        self.bad = False

    def load_row(
        self, row: int, piece: Piece, after: Fence, admit: Callable[[], bool]
    ) -> Fence | None:
        self.asked.append((row, piece, self.clock.now))
        if self.bad:
            raise BadChunks([0], [0], "test")
        return self.fence if admit() else None


PAGES = (8, 32)
GEOMETRY = CacheGeometry(
    rows=tuple(Row((f"layer.{i}",), 0, i * 800, size, size) for i, size in enumerate(PAGES)),
    num_blocks=10,
    block_tokens=16,
    chunk_tokens=32,
    allocation_bytes=(4000,),
)
PIECE = Piece(
    group=0,
    tier=TierName.HOST,
    first=0,
    keys=(ChunkKey(b"a"), ChunkKey(b"b")),
    slots=np.array([0, 1]),
    pages=np.arange(4),
    blocks=np.arange(4),
)


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_comes_when_its_bytes_have_come_through_the_link(row: int) -> None:
    clock = Clock()
    tier = Tier(clock)
    source = PacedSource(tier, link(clock, bandwidth=100), GEOMETRY)
    fence = source.load_row(row, PIECE, Passed(), lambda: True)

    assert fence is tier.fence
    ((asked_row, piece, when),) = tier.asked
    assert (asked_row, piece) == (row, PIECE)
    assert when == pytest.approx(100 + 4 * PAGES[row] / 100)


def test_what_goes_to_two_places_comes_through_the_link_once() -> None:
    clock = Clock()
    pipe = link(clock, bandwidth=100)
    key = PIECE.keys[0]
    twice = Piece(
        group=0,
        tier=TierName.HOST,
        first=0,
        keys=(key, key),
        slots=np.array([3, 3]),
        pages=np.array([0, GEOMETRY.blocks_per_chunk]),
        blocks=np.array([5, 7]),
    )
    PacedSource(Tier(clock), pipe, GEOMETRY).load_row(0, twice, Passed(), lambda: True)
    assert clock.now == pytest.approx(100 + PAGES[0] / 100)
    assert pipe.carried == PAGES[0]


def test_what_came_is_counted_from_when_the_pace_was_set() -> None:
    pipe = link(Clock())
    pipe.carry(100)
    pipe.carry(20)
    assert pipe.carried == 120
    pipe.pace(10, 0)
    assert pipe.carried == 0


def test_engine_memory_is_not_asked_for_before_the_bytes_are_there() -> None:
    clock = Clock()
    granted_at: list[float] = []

    def admit() -> bool:
        granted_at.append(clock.now)
        return False

    source = PacedSource(Tier(clock), link(clock, bandwidth=32), GEOMETRY)
    assert source.load_row(0, PIECE, Passed(), admit) is None
    assert granted_at == pytest.approx([101.0])


def test_a_failure_of_the_tier_is_passed_on() -> None:
    tier = Tier(Clock())
    tier.bad = True
    with pytest.raises(BadChunks):
        PacedSource(tier, Link(), GEOMETRY).load_row(0, PIECE, Passed(), lambda: True)


def test_threads_share_one_pipe() -> None:
    clock = Frozen()
    pipe = link(clock)
    threads = [threading.Thread(target=pipe.carry, args=(100,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(clock.slept) == pytest.approx([0.1 * (i + 1) for i in range(8)])

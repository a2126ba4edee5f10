"""A paced link delivers at the pace it is given, one thing after the other, and loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lamina_kv.bench.pacing import Link, PacedMover
from lamina_kv.data.movers.base import make_mover
from lamina_kv.data.near import NearSlab
from lamina_kv.geometry import CacheGeometry, Row


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


PAGES = (8, 32)
GEOMETRY = CacheGeometry(
    rows=tuple(Row((f"layer.{i}",), 0, i * 800, size, size) for i, size in enumerate(PAGES)),
    num_blocks=10,
    block_tokens=16,
    chunk_tokens=32,
    allocation_bytes=(4000,),
)


class Rank:
    """An engine's cache, a near tier of two slots, and a slow link between them."""

    def __init__(self, pipe: Link) -> None:
        self.cache = torch.zeros(4000, dtype=torch.uint8)
        self.mover = PacedMover(make_mover(GEOMETRY, [self.cache]), pipe, GEOMETRY)
        self.near = NearSlab(GEOMETRY, 2 * GEOMETRY.object_bytes, self.mover.allocate_host)
        self.near.memory.random_()

    def load(self, row: int, near_pages: list[int], blocks: list[int]) -> list[bytes]:
        """Load pages; what the engine has in these blocks then."""
        near, pages = np.array(near_pages), np.array(blocks)
        self.mover.await_near(self.near, near)
        after = self.mover.fence_compute()
        self.mover.load([row], self.mover.pairs(self.near, near, pages), after).wait()
        start, size = GEOMETRY.rows[row].offset, PAGES[row]
        return [bytes(self.cache[start + b * size : start + (b + 1) * size]) for b in blocks]

    def near_page(self, row: int, page: int) -> bytes:
        slot, block = divmod(page, GEOMETRY.blocks_per_chunk)
        start = GEOMETRY.extent_offsets[row] + block * PAGES[row]
        return bytes(self.near.object(slot)[start : start + PAGES[row]])


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rank(clock: Clock) -> Iterator[Rank]:
    made = Rank(link(clock, bandwidth=100))
    yield made
    made.mover.close()


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_comes_when_its_bytes_have_come_through_the_link(
    rank: Rank, clock: Clock, row: int
) -> None:
    pages = [0, 1, 2, 3]
    assert rank.load(row, pages, [4, 5, 6, 7]) == [rank.near_page(row, page) for page in pages]
    assert clock.now == pytest.approx(100 + 4 * PAGES[row] / 100)


def test_what_goes_to_two_places_comes_through_the_link_once(rank: Rank, clock: Clock) -> None:
    assert rank.load(0, [3, 3], [5, 7]) == [rank.near_page(0, 3)] * 2
    assert clock.now == pytest.approx(100 + PAGES[0] / 100)


def test_saves_do_not_wait_for_the_link(rank: Rank, clock: Clock) -> None:
    rank.cache.random_()
    after = rank.mover.fence_compute()
    pairs = rank.mover.pairs(rank.near, np.array([1]), np.array([2]))
    rank.mover.save([0], pairs, after).wait()
    assert rank.near_page(0, 1) == bytes(rank.cache[16:24])
    assert clock.slept == []


def test_what_came_is_counted_from_when_the_pace_was_set() -> None:
    pipe = link(Clock())
    pipe.carry(100)
    pipe.carry(20)
    assert pipe.carried == 120
    pipe.pace(10, 0)
    assert pipe.carried == 0


def test_threads_share_one_pipe() -> None:
    clock = Frozen()
    pipe = link(clock)
    threads = [threading.Thread(target=pipe.carry, args=(100,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(clock.slept) == pytest.approx([0.1 * (i + 1) for i in range(8)])

"""Ranks that hold the same cache: the first keeps it for all, the others read what it keeps and
change nothing; where memory cannot be shared each keeps its own; nobody waits for a rank that has
failed; and nothing is counted twice."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from driven_planner import BLOCK, CHUNK, CHUNK_BYTES, Pool, View

from lamina_kv.config import LoadConfig, load_config
from lamina_kv.control.planner import Planner
from lamina_kv.control.shape import ChunkShape
from lamina_kv.data.executor import Executor, Tiers
from lamina_kv.data.far import FarTier
from lamina_kv.data.movers import Fence
from lamina_kv.data.movers.cpu import CpuMover
from lamina_kv.data.near import NearSlab
from lamina_kv.data.replicas import Replicas
from lamina_kv.data.shared_memory import MemoryFile
from lamina_kv.geometry import OBJECT_HEADER_BYTES, CacheGeometry, Row
from lamina_kv.keys import KEY_BYTES
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import (
    Ask,
    ChunkKey,
    LoadMode,
    LoadOrder,
    Move,
    Outcome,
    PageMap,
    RankReport,
    SaveOrder,
    StepPlan,
    TierName,
    TierOrders,
    TransferId,
    TransferReceipt,
)
from stores import MemoryStore

BLOCKS, PAGE, ROWS, SLOTS = 12, 4096, 2, 4
GEOMETRY = CacheGeometry(
    rows=tuple(Row((f"layer.{i}",), 0, i * BLOCKS * PAGE, PAGE, PAGE) for i in range(ROWS)),
    num_blocks=BLOCKS,
    block_tokens=16,
    chunk_tokens=16,
    allocation_bytes=(ROWS * BLOCKS * PAGE,),
)


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(KEY_BYTES, "little"))


class Gathering:
    """Ranks that are threads of this process."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks)
        self._words: list[Any] = [None] * ranks

    def of(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(word: Any) -> list[Any]:
            self._words[rank] = word
            self._barrier.wait(60)
            words = list(self._words)
            self._barrier.wait(60)
            return words

        return gather

    def together(self, work: Callable[[int], Any]) -> list[Any]:
        """What ``work(rank)`` returned or raised, by rank."""

        def attempt(rank: int) -> Any:
            try:
                return work(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(attempt, range(self.ranks)))


class FlakyMover(CpuMover):
    """Loads fail while ``lost``."""

    lost = False

    def load(self, *arguments: Any, **how: Any) -> Fence:
        if self.lost:
            raise OSError("lost")
        return super().load(*arguments, **how)


@dataclass
class Rank:
    replicas: Replicas
    cache: torch.Tensor
    mover: FlakyMover
    near: NearSlab

    def held(self, slot: int) -> int:
        """What the first page of a slot is full of."""
        page = self.near.object(slot)[OBJECT_HEADER_BYTES:][:PAGE]
        assert page.min() == page.max()
        return int(page[0])

    def fill(self, slot: int, value: int) -> None:
        self.near.object(slot)[OBJECT_HEADER_BYTES:][:PAGE] = value


def open_ranks(ranks: int = 2, count: int = 2, slots: int = SLOTS) -> list[Any]:
    gathering = Gathering(ranks)

    def open_rank(rank: int) -> Rank:
        cache = torch.full((GEOMETRY.allocation_bytes[0],), rank + 1, dtype=torch.uint8)
        mover = FlakyMover(GEOMETRY, [cache])
        replicas = Replicas(rank, count, gathering.of(rank))
        # A follower goes by what its leader has, whatever it would have taken itself.
        capacity = (slots + rank % count) * GEOMETRY.object_bytes
        return Rank(replicas, cache, mover, replicas.open_near(GEOMETRY, mover, capacity))

    return gathering.together(open_rank)


# -- who keeps what ------------------------------------------------------------------------------


def test_each_group_has_one_slab() -> None:
    ranks = open_ranks(ranks=4, count=2)
    assert [rank.replicas.leader for rank in ranks] == [0, 0, 2, 2]
    assert [rank.replicas.follows for rank in ranks] == [False, True, False, True]
    assert [rank.near.slots for rank in ranks] == [SLOTS] * 4
    for number, rank in enumerate(ranks):
        rank.fill(3, 10 + number)
    assert [rank.held(3) for rank in ranks] == [11, 11, 13, 13]
    for rank in ranks:
        rank.mover.close()


def test_without_replicas_every_rank_keeps_its_own_and_nobody_speaks() -> None:
    def gather(_: Any) -> list[Any]:
        raise AssertionError("a rank without replicas has nobody to wait for")

    cache = torch.zeros(GEOMETRY.allocation_bytes[0], dtype=torch.uint8)
    mover = CpuMover(GEOMETRY, [cache])
    replicas = Replicas(3, 1, gather)
    near = replicas.open_near(GEOMETRY, mover, SLOTS * GEOMETRY.object_bytes)
    assert not replicas.follows
    assert near.slots == SLOTS
    mover.close()


def test_where_memory_cannot_be_shared_each_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def elsewhere(_: object) -> MemoryFile:
        raise FileNotFoundError("another machine")

    monkeypatch.setattr(MemoryFile, "open", elsewhere)
    with caplog.at_level(logging.WARNING, "lamina_kv"):
        ranks = open_ranks()
    assert sum("another machine" in record.message for record in caplog.records) == 1
    assert [rank.replicas.follows for rank in ranks] == [False, False]
    assert [rank.replicas.count for rank in ranks] == [1, 1]
    for number, rank in enumerate(ranks):
        rank.fill(0, number + 1)
    assert [rank.held(0) for rank in ranks] == [1, 2]
    for rank in ranks:
        rank.mover.close()


def test_nobody_waits_for_a_leader_that_has_failed() -> None:
    failures = open_ranks(slots=0)
    assert isinstance(failures[0], ValueError)
    assert isinstance(failures[1], RuntimeError)
    assert "rank 0" in str(failures[1])


# -- the executor of a follower -----------------------------------------------------------------


class Running:
    """A rank with an executor; its cache is full of its number + 1."""

    def __init__(self, number: int, rank: Rank, slots: int) -> None:
        self.rank = rank
        self.store = MemoryStore(slots=slots)
        length = GEOMETRY.chunk_bytes
        far = FarTier(TierName("far"), self.store, shard=0, length=length, timeout=60.0)
        follows = rank.replicas.follows
        self.executor = Executor(
            rank=number,
            tiers=Tiers(rank.near, () if follows else (far,), follows),
            mover=rank.mover,
            config=LoadConfig(),
        )
        self._step = 0

    def run(self, plan: StepPlan, count: int) -> dict[int, TransferReceipt]:
        """One step, and its ``count`` receipts by transfer."""
        self._step += 1
        self.executor.begin_step(replace(plan, step=self._step))
        self.executor.start_loads()
        for row in GEOMETRY.rows:
            self.executor.wait_layer(row.layers[0])
            self.executor.layer_written(row.layers[0])
        self.executor.end_step()
        receipts: dict[int, TransferReceipt] = {}
        deadline = time.monotonic() + 60
        while len(receipts) < count and time.monotonic() < deadline:
            found = self.executor.collect().receipt.transfers
            receipts |= {int(receipt.transfer): receipt for receipt in found}
            time.sleep(0.001)
        assert len(receipts) == count
        return receipts


@pytest.fixture(params=[SLOTS, 0], ids=["slots", "by key"])
def running(request: pytest.FixtureRequest) -> Any:
    pair = [Running(number, rank, request.param) for number, rank in enumerate(open_ranks())]
    yield pair
    for each in reversed(pair):
        each.executor.close()


SAVE = SaveOrder(TransferId(1), "r", 2, (7,))
MOVES = TierOrders(
    TierName("far"),
    outward=(Move(TransferId(2), key(1), near=2, far=3),),
    asks=(Ask(TransferId(4), (key(1), key(2))),),
    probe=TransferId(5),
)


def load(number: int, slot: int) -> LoadOrder:
    pages = PageMap(0, np.array([slot], np.int32), np.array([5], np.int32))
    return LoadOrder(TransferId(number), "r", LoadMode.LAYERWISE, (pages,), 10.0)


def test_a_follower_answers_and_its_leader_moves(running: list[Running]) -> None:
    leader, follower = running
    reports = [each.executor.report() for each in running]
    assert [report.follows for report in reports] == [False, True]
    assert [len(report.tiers) for report in reports] == [1, 0]
    for each in reversed(running):  # the follower is first, and nothing comes of it
        (saved,) = each.run(StepPlan(0, saves=(SAVE,)), 1).values()
        assert saved.outcome is Outcome.DONE
        assert saved.moved_bytes == (GEOMETRY.chunk_bytes if each is leader else 0)
        assert follower.rank.held(2) == (1 if each is leader else 0)
    for each in reversed(running):
        receipts = each.run(StepPlan(0, tiers=(MOVES,)), 3)
        assert {receipt.outcome for receipt in receipts.values()} == {Outcome.DONE}
        assert receipts[2].moved_bytes == (GEOMETRY.chunk_bytes if each is leader else 0)
        assert len(receipts[4].present) == 2
        assert len(leader.store.shelf.held) == (1 if each is leader else 0)
    follower.rank.cache.fill_(0)
    (loaded,) = follower.run(StepPlan(0, loads=(load(3, 2),)), 1).values()
    assert loaded.outcome is Outcome.DONE
    assert loaded.moved_bytes == GEOMETRY.chunk_bytes
    assert set(follower.rank.cache[5 * PAGE : 6 * PAGE].tolist()) == {1}


def test_a_follower_whose_load_failed_poisons_the_saves_of_the_step(running: list[Running]) -> None:
    _, follower = running
    follower.rank.mover.lost = True
    receipts = follower.run(StepPlan(0, loads=(load(3, 0),), saves=(SAVE,)), 2)
    assert receipts[3].outcome is Outcome.FAILED
    assert receipts[1].outcome is Outcome.FAILED
    assert receipts[1].reason == "load_failed"


def test_a_follower_answers_only_when_the_loads_of_the_step_are_over(
    running: list[Running],
) -> None:
    _, follower = running
    follower.executor.begin_step(StepPlan(1, saves=(SAVE,)))
    for row in GEOMETRY.rows:
        follower.executor.layer_written(row.layers[0])
    assert follower.executor.collect().receipt.transfers == ()
    follower.executor.end_step()
    assert len(follower.executor.collect().receipt.transfers) == 1


# -- control ------------------------------------------------------------------------------------


def test_control_counts_what_is_shared_once() -> None:
    reports = [
        RankReport(rank, near_slots=4, chunk_bytes=CHUNK_BYTES, follows=rank % 2 == 1)
        for rank in range(4)
    ]
    # Room for one chunk on each rank that keeps any.
    settings = load_config({"save": {"max_inflight": CHUNK_BYTES}}, {})
    meter = Meter()
    planner = Planner(
        settings, ChunkShape.uniform(BLOCK, CHUNK), b"namespace", Pool(), reports, meter
    )
    planner.gauges()
    assert meter.drain().gauges["tier_capacity_bytes", ("host",)] == 4 * 2 * CHUNK_BYTES
    view = View("a", list(range(3 * CHUNK)))
    planner.lookup(view, 0)
    planner.admitted("a", 0)
    assert len(planner.plan_step([("a", 0, view.num_tokens)], forward=True).saves) == 1
    planner.gauges()
    gauges = meter.drain().gauges
    assert gauges["bytes_in_flight", ("save",)] == 2 * CHUNK_BYTES
    assert gauges["tier_used_bytes", ("host",)] == 2 * CHUNK_BYTES

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
from pathlib import Path
from typing import Any

import pytest
import torch
from driven_planner import BLOCK, CHUNK, CHUNK_BYTES, Pool, View

from lamina.config import LoadConfig, load_config
from lamina.control.planner import Planner
from lamina.control.requests import ChunkShape
from lamina.data.executor import Executor
from lamina.data.load_pipeline import BadChunks, Piece, RowSource
from lamina.data.movers import Fence, Mover, make_mover
from lamina.data.replicas import DiskPlace, Replicas, Tiers
from lamina.data.shared_memory import MemoryFile
from lamina.data.sources import tier_sources
from lamina.data.tiers import disk_store
from lamina.data.tiers.disk import DiskReader, DiskTier, ReadFailure, StoreError, StoreNamespace
from lamina.data.tiers.disk_slab import aligned_memory
from lamina.geometry import CacheGeometry, Row
from lamina.keys import KEY_BYTES
from lamina.observe.metrics import Meter
from lamina.plan import (
    ChunkKey,
    ChunkLoad,
    LoadMode,
    LoadOrder,
    Outcome,
    RankReport,
    SaveOrder,
    StepPlan,
    TierName,
    TransferId,
    TransferReceipt,
    WriteThrough,
)

BLOCKS, PAGE, ROWS, SLOTS = 12, 4096, 2, 4
NAMESPACE = StoreNamespace("ab" * 16, {})
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


@dataclass
class Rank:
    replicas: Replicas
    cache: torch.Tensor
    mover: Mover
    tiers: Tiers

    @property
    def disk(self) -> DiskTier | DiskReader:
        assert self.tiers.disk is not None
        return self.tiers.disk

    def page(self, slot: int) -> bytes:
        return bytes(self.tiers.host.extent(0, slot))

    def reads(self, number: int, slot: int) -> bytes | None:
        """Row 1 of a chunk on disk, if it is delivered."""
        into = aligned_memory(PAGE).reshape(1, PAGE)
        good = self.disk.read_row(1, [slot], [key(number)], into).good
        return bytes(into[0]) if good.all() else None

    def close(self) -> None:
        if self.tiers.disk is not None:
            self.tiers.disk.close()
        self.mover.close()


def open_ranks(store: Path | None, ranks: int = 2, count: int = 2) -> list[Any]:
    gathering = Gathering(ranks)
    place = DiskPlace(store, NAMESPACE, 0, SLOTS * ROWS * PAGE, None) if store else None
    if store and not any(store.iterdir()):  # ranks are processes, and may make a store at once
        disk_store.prepare(store)
        disk_store.describe(store, NAMESPACE)

    def open_rank(rank: int) -> Rank:
        cache = torch.full((GEOMETRY.allocation_bytes[0],), rank + 1, dtype=torch.uint8)
        mover = make_mover(GEOMETRY, [cache])
        replicas = Replicas(rank, count, gathering.of(rank))
        # A follower goes by what its leader has, whatever it would have taken itself.
        capacity = (SLOTS + rank % count) * GEOMETRY.chunk_bytes
        tiers = replicas.open_tiers(GEOMETRY, mover, capacity, place)
        return Rank(replicas, cache, mover, tiers)

    return gathering.together(open_rank)


def put(tier: DiskTier | DiskReader, number: int, slot: int, fill: int) -> None:
    assert isinstance(tier, DiskTier)
    tier.begin([slot])
    for row in range(ROWS):
        extent = aligned_memory(PAGE)
        extent[:] = fill
        tier.write_row(row, [slot], [extent])
    tier.commit([(slot, key(number))])


# -- who keeps what ------------------------------------------------------------------------------


def test_each_group_has_one_slab_and_one_shard(tmp_path: Path) -> None:
    ranks = open_ranks(tmp_path, ranks=4, count=2)
    assert [rank.replicas.leader for rank in ranks] == [0, 0, 2, 2]
    assert [rank.replicas.follows for rank in ranks] == [False, True, False, True]
    assert [rank.tiers.host.slots for rank in ranks] == [SLOTS] * 4
    for number, rank in enumerate(ranks):
        rank.tiers.host.extent(0, 3)[:] = 10 + number
    assert [rank.page(3)[0] for rank in ranks] == [11, 11, 13, 13]
    for leader, fill in ((0, 20), (2, 30)):
        put(ranks[leader].disk, 7, 1, fill)
    assert [rank.reads(7, 1) for rank in ranks] == [bytes([b]) * PAGE for b in (20, 20, 30, 30)]
    for rank in ranks:
        rank.close()
    assert sorted(path.name for path in tmp_path.rglob("rank-*")) == [
        f"rank-{leader}.{suffix}" for leader in (0, 2) for suffix in ("lock", "slab", "sqlite")
    ]


def test_without_replicas_every_rank_keeps_its_own_and_nobody_speaks(tmp_path: Path) -> None:
    def gather(_: Any) -> list[Any]:
        raise AssertionError("a rank without replicas has nobody to wait for")

    cache = torch.zeros(GEOMETRY.allocation_bytes[0], dtype=torch.uint8)
    mover = make_mover(GEOMETRY, [cache])
    replicas = Replicas(3, 1, gather)
    place = DiskPlace(tmp_path, NAMESPACE, 8, SLOTS * ROWS * PAGE, None)
    tiers = replicas.open_tiers(GEOMETRY, mover, SLOTS * GEOMETRY.chunk_bytes, place)
    assert not replicas.follows
    assert [path.name for path in tmp_path.rglob("*.slab")] == ["rank-11.slab"]
    assert tiers.disk is not None
    tiers.disk.close()
    mover.close()


def test_without_a_disk_host_memory_is_shared_all_the_same() -> None:
    leader, follower = open_ranks(None)
    leader.tiers.host.extent(1, 0)[:] = 5
    assert follower.tiers.host.extent(1, 0).min() == 5
    assert follower.tiers.disk is None
    leader.close()
    follower.close()


def test_where_memory_cannot_be_shared_each_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def elsewhere(_: object) -> MemoryFile:
        raise FileNotFoundError("another machine")

    monkeypatch.setattr(MemoryFile, "open", elsewhere)
    with caplog.at_level(logging.WARNING, "lamina"):
        ranks = open_ranks(tmp_path)
    assert sum("another machine" in record.message for record in caplog.records) == 1
    assert [rank.replicas.follows for rank in ranks] == [False, False]
    assert [rank.replicas.count for rank in ranks] == [1, 1]
    for number, rank in enumerate(ranks):
        rank.tiers.host.extent(0, 0)[:] = number + 1
    assert [rank.page(0)[0] for rank in ranks] == [1, 2]
    assert len(list(tmp_path.rglob("*.slab"))) == 2
    for rank in ranks:
        rank.close()


def test_nobody_waits_for_a_leader_that_has_failed(tmp_path: Path) -> None:
    (tmp_path / "lamina-store.json").write_text("{}")
    failures = open_ranks(tmp_path)
    assert isinstance(failures[0], StoreError)
    assert isinstance(failures[1], RuntimeError)
    assert "rank 0" in str(failures[1])


# -- the disk of a follower ------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Any:
    leader, follower = open_ranks(tmp_path)
    yield leader, follower
    follower.close()
    leader.close()


def test_a_follower_sees_what_its_leader_changes(pair: tuple[Rank, Rank]) -> None:
    leader, follower = pair
    assert follower.reads(1, 2) is None
    put(leader.disk, 1, 2, fill=9)
    assert follower.reads(1, 2) == bytes([9]) * PAGE
    assert follower.disk.stored() == leader.disk.stored()
    put(leader.disk, 5, 2, fill=8)
    assert follower.reads(1, 2) is None, "the slot was overwritten"
    assert follower.reads(5, 2) == bytes([8]) * PAGE
    assert isinstance(leader.disk, DiskTier)
    leader.disk.drop([2])
    assert follower.reads(5, 2) is None
    assert follower.disk.failures == {ReadFailure.OTHER_KEY: 3}


def test_a_follower_finds_what_was_stored_before_it_started(tmp_path: Path) -> None:
    leader, follower = open_ranks(tmp_path)
    put(leader.disk, 1, 2, fill=9)
    follower.close()
    leader.close()
    leader, follower = open_ranks(tmp_path)
    assert [(c.key, c.slot) for c in follower.disk.stored()] == [(key(1), 2)]
    put(leader.disk, 3, 1, fill=4)
    assert follower.disk.stored() == leader.disk.stored()
    assert follower.reads(1, 2) == bytes([9]) * PAGE
    leader.close()
    follower.close()


def test_a_follower_verifies_what_it_reads(pair: tuple[Rank, Rank], tmp_path: Path) -> None:
    leader, follower = pair
    put(leader.disk, 1, 2, fill=9)
    (slab,) = tmp_path.rglob("*.slab")
    content = bytearray(slab.read_bytes())
    content[(SLOTS + 2) * PAGE + 100] ^= 1
    slab.write_bytes(content)
    assert follower.reads(1, 2) is None
    assert follower.disk.failures == {ReadFailure.CHECKSUM: 1}


def test_a_follower_leaves_index_and_slab_alone(pair: tuple[Rank, Rank]) -> None:
    leader, follower = pair
    put(leader.disk, 1, 2, fill=9)
    before = leader.disk.stored()
    time.sleep(0.01)
    follower.disk.note_used([2])
    assert leader.disk.stored() == before
    with pytest.raises(ValueError, match="read-only"):
        follower.disk._table._held[:] = False
    with pytest.raises(OSError, match="Bad file descriptor"):
        follower.disk._slab.write(0, torch.tensor([0]).numpy(), [aligned_memory(PAGE)])


# -- the executor of a follower -----------------------------------------------------------------


class FlakySource:
    """A tier that loses what it is asked for while ``lost``."""

    def __init__(self, inner: RowSource) -> None:
        self.inner = inner
        self.lost = False

    def load_row(
        self, row: int, piece: Piece, after: Fence, admit: Callable[[], bool]
    ) -> Fence | None:
        if self.lost:
            raise BadChunks([0], [0], "lost")
        return self.inner.load_row(row, piece, after, admit)


class Running:
    """A rank with an executor; its cache is full of its number + 1."""

    def __init__(self, number: int, rank: Rank) -> None:
        self.rank = rank
        sources = tier_sources(rank.tiers.host, rank.tiers.disk, rank.mover, GEOMETRY)
        self.source = FlakySource(sources[TierName.HOST])
        self.executor = Executor(
            rank=number,
            geometry=GEOMETRY,
            mover=rank.mover,
            host=rank.tiers.host,
            disk=rank.tiers.disk,
            config=LoadConfig(),
            sources={**sources, TierName.HOST: self.source},
            follows=rank.replicas.follows,
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


@pytest.fixture
def running(tmp_path: Path) -> Any:
    pair = [Running(number, rank) for number, rank in enumerate(open_ranks(tmp_path))]
    yield pair
    for each in reversed(pair):
        each.executor.close()


SAVE = SaveOrder(TransferId(1), "r", key(1), 2, (7,))
WRITE = WriteThrough(TransferId(2), key(1), host_slot=2, disk_slot=3)


def load(number: int, tier: TierName, slot: int) -> LoadOrder:
    chunk = ChunkLoad(key(1), tier, slot, 0, (5,))
    return LoadOrder(TransferId(number), "r", LoadMode.LAYERWISE, (chunk,), 10.0)


def test_a_follower_answers_and_its_leader_moves(running: list[Running]) -> None:
    leader, follower = running
    assert [each.executor.report().follows for each in running] == [False, True]
    for each in reversed(running):  # the follower is first, and nothing comes of it
        (saved,) = each.run(StepPlan(0, saves=(SAVE,)), 1).values()
        assert saved.outcome is Outcome.DONE
        assert saved.moved_bytes == (GEOMETRY.chunk_bytes if each is leader else 0)
        assert follower.rank.page(2)[0] == (1 if each is leader else 0)
    for each in reversed(running):
        (written,) = each.run(StepPlan(0, writes=(WRITE,)), 1).values()
        assert written.outcome is Outcome.DONE
        assert written.moved_bytes == (GEOMETRY.chunk_bytes if each is leader else 0)
        assert len(follower.rank.disk.stored()) == (1 if each is leader else 0)
    for tier, slot in ((TierName.HOST, 2), (TierName.DISK, 3)):
        follower.rank.cache.fill_(0)
        (loaded,) = follower.run(StepPlan(0, loads=(load(3, tier, slot),)), 1).values()
        assert loaded.outcome is Outcome.DONE
        assert loaded.moved_bytes == GEOMETRY.chunk_bytes
        assert set(follower.rank.cache[5 * PAGE : 6 * PAGE].tolist()) == {1}
    follower.run(StepPlan(0, drop_disk=(3,)), 0)
    assert len(leader.rank.disk.stored()) == 1


def test_a_follower_whose_load_failed_poisons_the_saves_of_the_step(running: list[Running]) -> None:
    _, follower = running
    follower.source.lost = True
    orders = StepPlan(0, loads=(load(3, TierName.HOST, 0),), saves=(SAVE,))
    receipts = follower.run(orders, 2)
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
        RankReport(rank, host_slots=4, disk_slots=0, chunk_bytes=CHUNK_BYTES, follows=rank % 2 == 1)
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

"""The window is obeyed exactly, a row is never moved twice, and a bad request harms no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lamina.data.load_pipeline import (
    BadChunks,
    Load,
    LoadRun,
    Piece,
    window_rows,
)
from lamina.data.movers.base import Fence
from lamina.data.worker_pool import Job, Lost, WorkerPool
from lamina.geometry import CacheGeometry, Row
from lamina.plan import ChunkKey, ChunkLoad, LoadMode, LoadOrder, Outcome, TierName, TransferId

ROWS = 5


def geometry(rows: int = ROWS) -> CacheGeometry:
    return CacheGeometry(
        rows=tuple(Row((f"layer.{i}",), 0, i * 800, 8, 8) for i in range(rows)),
        num_blocks=100,
        block_tokens=16,
        chunk_tokens=32,
        allocation_bytes=(rows * 800,),
    )


class Passed(Fence):
    def wait(self) -> None: ...

    def passed(self) -> bool:
        return True


class RecordingPool(WorkerPool):
    """Notes the row of every job in the order of submission."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        super().__init__("test", 2)

    def submit(self, priority: tuple[float, int], job: Job, lost: Lost) -> None:
        self.rows.append(priority[1])
        super().submit(priority, job, lost)


class RecordingSource:
    """A tier that notes what it is asked for and can be told to fail or to stall."""

    def __init__(self) -> None:
        self.served: list[tuple[int, bytes]] = []
        self.written: list[tuple[int, bytes]] = []
        self.bad: set[tuple[int, bytes]] = set()
        self.stall: threading.Event | None = None
        self.seen = threading.Event()

    def load_row(
        self, row: int, piece: Piece, after: Fence, admit: Callable[[], bool]
    ) -> Fence | None:
        self.served.extend((row, key) for key in piece.keys)
        self.seen.set()
        if self.stall is not None:
            assert self.stall.wait(60)
        if not admit():
            return None
        bad = [i for i, key in enumerate(piece.keys) if (row, key) in self.bad]
        self.written.extend((row, key) for key in piece.keys if (row, key) not in self.bad)
        if bad:
            raise BadChunks(bad, bad, "test")
        return Passed()


@pytest.fixture
def pool() -> Iterator[RecordingPool]:
    pool = RecordingPool()
    yield pool
    assert pool.close(60)


def order(name: str, chunks: int, deadline: float = 60.0) -> LoadOrder:
    return LoadOrder(
        TransferId(sum(name.encode())),
        name,
        LoadMode.LAYERWISE,
        tuple(
            ChunkLoad(ChunkKey(f"{name}{i}".encode()), TierName.HOST, i, 0, (2 * i, 2 * i + 1))
            for i in range(chunks)
        ),
        deadline,
    )


def start(
    pool: RecordingPool,
    source: RecordingSource,
    window: int,
    *orders: LoadOrder,
    self_driven: bool = False,
    patience: float = 60.0,
    rows: int = ROWS,
) -> LoadRun:
    loads = [Load(o, geometry(rows)) for o in orders or (order("a", 1),)]
    run = LoadRun(
        loads,
        geometry(rows),
        {TierName.HOST: source},
        {TierName.HOST: pool},
        window=window,
        cores=2,
        urgency=0,
        self_driven=self_driven,
        patience=patience,
    )
    run.start(Passed())
    return run


@pytest.mark.parametrize("window", [1, 2, 3, ROWS, ROWS + 7])
def test_each_first_wait_submits_one_more_row(pool: RecordingPool, window: int) -> None:
    run = start(pool, RecordingSource(), window)
    assert pool.rows == list(range(min(window, ROWS)))
    for row in range(ROWS):
        run.wait(row)
        assert pool.rows == list(range(min(window + row + 1, ROWS)))


def test_a_row_waited_for_again_returns_at_once_and_submits_nothing(pool: RecordingPool) -> None:
    run = start(pool, RecordingSource(), 1)
    assert len(run.wait(0)) == 1
    submitted = list(pool.rows)
    assert run.wait(0) == []
    assert pool.rows == submitted


def test_a_row_that_is_skipped_over_is_still_loaded_in_order(pool: RecordingPool) -> None:
    run = start(pool, RecordingSource(), 1)
    run.wait(3)
    assert pool.rows == [0, 1, 2, 3, 4]


def test_no_row_is_moved_twice(pool: RecordingPool) -> None:
    source = RecordingSource()
    run = start(pool, source, 2, order("a", 2), order("b", 1))
    for row in (0, 1, 0, 2, 2):
        run.wait(row)
    run.finish()
    assert len(source.served) == len(set(source.served)) == 3 * ROWS


def test_a_parked_load_drives_itself(pool: RecordingPool) -> None:
    source = RecordingSource()
    run = start(pool, source, 1, self_driven=True)
    run.finish()
    assert run.over
    assert [row for row, _ in source.served] == list(range(ROWS))


def test_a_failed_request_is_left_out_from_its_first_bad_chunk_on(pool: RecordingPool) -> None:
    source = RecordingSource()
    source.bad = {(1, b"a1")}
    run = start(pool, source, 1, order("a", 3), order("b", 2))
    run.finish()
    good, other = run.loads
    assert good.failed
    assert good.first_bad == 1
    assert good.lost_blocks() == {2, 3, 4, 5}
    receipt = good.receipt(0.0, 0.0)
    assert receipt.outcome is Outcome.FAILED
    assert receipt.bad_chunks == (b"a1",)
    assert not other.failed
    assert other.receipt(0.0, 0.0).outcome is Outcome.DONE
    assert {(row, key) for row in range(ROWS) for key in (b"b0", b"b1")} <= set(source.written)


def test_time_in_which_the_model_asked_for_no_row_is_not_the_tiers(pool: RecordingPool) -> None:
    run = start(pool, RecordingSource(), 1)
    run.wait(0)
    assert pool.await_idle(60)
    began = time.perf_counter()
    time.sleep(0.1)
    asked_for_none = time.perf_counter() - began
    run.finish()
    (load,) = run.loads
    receipt = load.receipt(run.active, run.waited)
    assert 0 < receipt.active <= receipt.seconds - asked_for_none + 1e-6


def test_time_in_which_a_row_hangs_is_the_tiers(pool: RecordingPool) -> None:
    source = RecordingSource()
    source.stall = threading.Event()
    run = start(pool, source, 1, order("a", 1, deadline=0.1))
    started, deadline = time.perf_counter(), run.deadline
    run.wait(0)
    active = run.active
    source.stall.set()
    assert active > 0
    assert active >= deadline - started


def test_past_its_deadline_a_load_fails_and_never_writes_again(pool: RecordingPool) -> None:
    source = RecordingSource()
    source.stall = threading.Event()
    run = start(pool, source, 2, order("a", 1, deadline=0.05))
    assert source.seen.wait(60)
    run.wait(0)
    assert run.over
    assert run.loads[0].reason == "deadline"
    assert run.loads[0].lost_blocks() == {0, 1}
    source.stall.set()
    assert pool.close(60)
    assert source.written == []


def test_giving_up_waits_for_a_write_that_was_admitted() -> None:
    load = Load(order("a", 1), geometry())
    load.outstanding = 1
    assert load.admit()
    over = threading.Event()
    thread = threading.Thread(target=lambda: (load.give_up("test", 60), over.set()))
    thread.start()
    assert not over.wait(0.05)
    load.leave(1)
    assert over.wait(60)
    thread.join()
    assert not load.admit()


def test_what_is_refused_while_giving_up_waits_for_a_write_has_failed() -> None:
    load = Load(order("a", 2), geometry())
    load.outstanding = 2
    assert load.admit()
    thread = threading.Thread(target=lambda: load.give_up("test", 60))
    thread.start()
    while load.admit():
        load.leave(1)
    load.outstanding = 0
    load.leave(1)
    thread.join(60)
    assert load.lost_blocks() == {0, 1, 2, 3}
    assert load.receipt(0.0, 0.0).outcome is Outcome.FAILED


def test_auto_fills_the_staging_budget() -> None:
    assert window_rows("auto", staging=100, row_bytes=30, rows=16) == 3
    assert window_rows("auto", staging=100, row_bytes=1000, rows=16) == 1
    assert window_rows("auto", staging=100, row_bytes=1, rows=16) == 16
    assert window_rows(12, staging=1, row_bytes=1000, rows=16) == 12


def test_the_window_is_never_longer_than_the_model() -> None:
    assert window_rows(1_000_000_000, staging=1, row_bytes=1000, rows=16) == 16


def test_a_load_is_cut_where_the_tier_changes_and_pages_follow_the_blocks() -> None:
    chunks = (
        ChunkLoad(ChunkKey(b"a"), TierName.HOST, 7, 1, (50,)),
        ChunkLoad(ChunkKey(b"b"), TierName.HOST, 3, 0, (51, 52)),
        ChunkLoad(ChunkKey(b"c"), TierName.DISK, 9, 0, (53,)),
    )
    load = Load(LoadOrder(TransferId(1), "r", LoadMode.PARKED, chunks, 1.0), geometry())
    host, disk = load.pieces
    assert (host.first, host.slots.tolist(), host.pages.tolist()) == (0, [7, 3], [1, 2, 3])
    assert host.blocks.tolist() == [50, 51, 52]
    assert (disk.first, disk.tier, disk.pages.tolist()) == (2, TierName.DISK, [0])


class StuckSource(RecordingSource):
    """A tier that stalls on the chunks of one request only."""

    def __init__(self, prefix: bytes) -> None:
        super().__init__()
        self.prefix = prefix
        self.release = threading.Event()

    def load_row(
        self, row: int, piece: Piece, after: Fence, admit: Callable[[], bool]
    ) -> Fence | None:
        if piece.keys[0].startswith(self.prefix):
            assert self.release.wait(60)
        return super().load_row(row, piece, after, admit)


def test_a_load_that_is_stuck_fails_alone(pool: RecordingPool) -> None:
    source = StuckSource(b"a")
    run = start(pool, source, 1, order("a", 1, deadline=1.0), order("b", 1))
    run.finish()
    stuck, other = run.loads
    assert stuck.failed
    assert not other.failed
    assert [row for row, key in source.written if key == b"b0"] == list(range(ROWS))
    assert stuck.receipt(0.0, 0.0).bad_chunks == ()
    source.release.set()
    assert pool.close(60)
    assert all(key != b"a0" for _, key in source.written)

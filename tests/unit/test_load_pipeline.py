"""The window is obeyed exactly, no row is moved twice, and what was given up writes no more."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lamina_kv.data.copier import Copier
from lamina_kv.data.load_pipeline import LoadRun, LoadStuck, window_rows
from lamina_kv.data.loads import PIECE_BYTES, Load
from lamina_kv.data.movers.base import Pairs
from lamina_kv.data.movers.cpu import CpuMover
from lamina_kv.data.movers.fences import CopyFailed, Fence
from lamina_kv.data.near import Indices, NearSlab
from lamina_kv.data.worker_pool import Job, Lost, WorkerPool
from lamina_kv.geometry import CacheGeometry, Row
from lamina_kv.plan import LoadMode, LoadOrder, Outcome, PageMap, TransferId

ROWS = 5
PATIENCE = 60.0


def geometry(page: int = 8) -> CacheGeometry:
    return CacheGeometry(
        rows=tuple(Row((f"layer.{i}",), 0, i * 100 * page, page, page) for i in range(ROWS)),
        num_blocks=100,
        block_tokens=16,
        chunk_tokens=32,
        allocation_bytes=(ROWS * 100 * page,),
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


class RecordingMover(CpuMover):
    """Notes what it is asked for, and may fail or take its time.

    Attributes:
        copied: row and first block of every copy.
        bad: copies that fail.
        pinning: near memory is not fit for copies before it is set.
        stall: a copy that has begun does not end before it is set.
        fence: what copies end with; None for one that has passed.
        seen: set when a copy is wanted.
        begun: set when one has begun.
    """

    def __init__(self) -> None:
        super().__init__(geometry(), [torch.zeros(geometry().allocation_bytes, dtype=torch.uint8)])
        self.copied: list[tuple[int, int]] = []
        self.bad: set[tuple[int, int]] = set()
        self.pinning: threading.Event | None = None
        self.stall: threading.Event | None = None
        self.fence: Fence | None = None
        self.seen, self.begun = threading.Event(), threading.Event()

    def await_near(self, near: NearSlab, near_pages: Indices) -> None:
        self.seen.set()
        if self.pinning is not None:
            assert self.pinning.wait(PATIENCE)

    def load(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = True
    ) -> Fence:
        self.begun.set()
        if self.stall is not None:
            assert self.stall.wait(PATIENCE)
        copies = [(row, int(pairs.pages[0])) for row in rows]
        if self.bad.intersection(copies):
            raise OSError("a row is lost")
        self.copied += copies
        fence = super().load(rows, pairs, after)
        return fence if self.fence is None else self.fence


class Rig:
    """A pool and a mover, and loads on them."""

    def __init__(self, mover: RecordingMover | None = None) -> None:
        self.pool, self.mover = RecordingPool(), mover or RecordingMover()
        size = 50 * geometry().object_bytes
        self.copier = Copier(
            NearSlab(geometry(), size, self.mover.allocate_host), self.mover, self.pool
        )
        self.waiter = WorkerPool("land", 1)

    def start(self, window: int, *orders: LoadOrder, **options: Any) -> LoadRun:
        loads = [Load(each, geometry()) for each in orders or (order("a", 0),)]
        given = {"parked": False, "patience": PATIENCE, "waiter": self.waiter, **options}
        run = LoadRun(loads, self.copier, window=window, **given)
        run.start(Passed())
        return run

    def finish(self, run: LoadRun) -> None:
        for row in range(ROWS):
            run.wait(row)

    def close(self) -> None:
        assert self.pool.close(PATIENCE)
        assert self.waiter.close(PATIENCE)
        self.mover.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def order(name: str, *blocks: int, timeout: float = PATIENCE, group: int = 0) -> LoadOrder:
    count = len(blocks)
    pages = PageMap(group, np.arange(count, dtype=np.int32), np.array(blocks, np.int32))
    number = TransferId(sum(name.encode()))
    return LoadOrder(number, name, LoadMode.LAYERWISE, (pages,), timeout)


@pytest.mark.parametrize("window", [1, 2, 3, ROWS, ROWS + 7])
def test_each_first_wait_submits_one_more_row(rig: Rig, window: int) -> None:
    run = rig.start(window)
    assert rig.pool.rows == list(range(min(window, ROWS)))
    for row in range(ROWS):
        run.wait(row)
        assert rig.pool.rows == list(range(min(window + row + 1, ROWS)))


def test_a_row_waited_for_again_returns_at_once_and_submits_nothing(rig: Rig) -> None:
    run = rig.start(1)
    run.wait(0)
    submitted = list(rig.pool.rows)
    assert run.wait(0) is None
    assert rig.pool.rows == submitted


def test_a_row_that_is_skipped_over_is_still_loaded_in_order(rig: Rig) -> None:
    rig.start(1).wait(3)
    assert rig.pool.rows == [0, 1, 2, 3, 4]


def test_no_row_is_moved_twice(rig: Rig) -> None:
    run = rig.start(2, order("a", 0, 1), order("b", 7))
    for row in (0, 1, 0, 2, 2):
        run.wait(row)
    rig.finish(run)
    assert len(rig.mover.copied) == len(set(rig.mover.copied)) == 2 * ROWS


def test_a_parked_load_drives_itself(rig: Rig) -> None:
    over = threading.Event()
    run = rig.start(1, parked=True, done=over.set)
    assert over.wait(PATIENCE)
    assert run.landed
    assert [row for row, _ in rig.mover.copied] == list(range(ROWS))


def test_a_load_is_cut_into_pieces_that_threads_share() -> None:
    shape = geometry(page=PIECE_BYTES // 3)
    load = Load(order("a", 9, 8, 7, 6, 5, 4, 3), shape)
    assert [piece.near.tolist() for piece in load.pieces] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [piece.blocks.tolist() for piece in load.pieces] == [[9, 8, 7], [6, 5, 4], [3]]
    assert load.outstanding == 3 * ROWS


def test_a_load_that_fails_does_so_as_a_whole_and_harms_no_other(rig: Rig) -> None:
    rig.mover.bad = {(1, 0)}
    run = rig.start(1, order("a", 0, 1), order("b", 7))
    rig.finish(run)
    failed, other = run.loads
    receipt = failed.receipt(run.times.active, run.times.waited)
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, "OSError")
    assert other.receipt(0.0, 0.0).outcome is Outcome.DONE
    assert run.failed
    assert {row for row, block in rig.mover.copied if block == 0} == {0}, "nobody needs the rest"
    assert {row for row, block in rig.mover.copied if block == 7} == set(range(ROWS))


def test_time_in_which_the_model_asked_for_no_row_is_not_the_tiers(rig: Rig) -> None:
    run = rig.start(1)
    run.wait(0)
    assert rig.pool.await_idle(PATIENCE)
    began = time.perf_counter()
    time.sleep(0.1)
    asked_for_none = time.perf_counter() - began
    rig.finish(run)
    receipt = run.loads[0].receipt(run.times.active, run.times.waited)
    assert 0 < receipt.active <= receipt.seconds - asked_for_none + 1e-6
    assert receipt.moved_bytes == ROWS * 8


def test_time_in_which_a_row_hangs_is_the_tiers(rig: Rig) -> None:
    rig.mover.pinning = threading.Event()
    run = rig.start(1, order("a", 0), parked=True)
    assert rig.mover.seen.wait(PATIENCE)
    time.sleep(0.1)
    run.give_up("test")
    rig.mover.pinning.set()
    assert run.times.active >= 0.1


def test_what_was_given_up_has_failed_and_never_writes_again(rig: Rig) -> None:
    rig.mover.pinning = threading.Event()
    run = rig.start(2, order("a", 0, timeout=0.02), parked=True)
    assert rig.mover.seen.wait(PATIENCE)
    assert not run.landed
    time.sleep(0.03)
    assert run.expired
    run.give_up("late")
    assert run.landed
    receipt = run.loads[0].receipt(0.0, 0.0)
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, "late")
    rig.mover.pinning.set()
    assert rig.pool.await_idle(PATIENCE)
    assert rig.mover.copied == []
    assert rig.pool.rows == [0, 1], "no further row was submitted"


def test_what_is_all_there_when_it_is_given_up_has_arrived(rig: Rig) -> None:
    run = rig.start(1, parked=True)
    assert rig.pool.await_idle(PATIENCE)
    run.give_up("late")
    assert run.loads[0].receipt(0.0, 0.0).outcome is Outcome.DONE


def test_what_is_given_up_has_landed_when_the_copy_that_had_begun_has(rig: Rig) -> None:
    rig.mover.stall = threading.Event()
    run = rig.start(1, parked=True)
    assert rig.mover.begun.wait(PATIENCE)
    over = threading.Event()
    run.give_up("test")
    assert not run.landed
    thread = threading.Thread(target=lambda: (run.land(), over.set()))
    thread.start()
    assert not over.wait(0.05)
    rig.mover.stall.set()
    assert over.wait(PATIENCE)
    thread.join()
    copied = len(rig.mover.copied)
    assert rig.pool.await_idle(PATIENCE)
    assert len(rig.mover.copied) == copied == 1
    assert run.loads[0].reason == "test"


def test_what_is_refused_while_a_copy_is_waited_for_has_failed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When that copy ends all pieces are over, and yet rows are missing."""
    pinned, rows = threading.Event(), iter(range(ROWS))

    def first_at_once(*_: object) -> None:
        if next(rows):
            assert pinned.wait(PATIENCE)

    monkeypatch.setattr(rig.mover, "await_near", first_at_once)
    rig.mover.stall = threading.Event()
    run = rig.start(ROWS, parked=True)
    assert rig.mover.begun.wait(PATIENCE)
    run.give_up("test")
    pinned.set()
    while run.loads[0].outstanding > 1:
        time.sleep(0.001)
    rig.mover.stall.set()
    run.land()
    assert run.loads[0].outstanding == 0
    assert run.loads[0].receipt(0.0, 0.0).outcome is Outcome.FAILED


def test_a_copy_that_does_not_end_cannot_be_given_up(rig: Rig) -> None:
    rig.mover.stall = threading.Event()
    run = rig.start(1, parked=True, patience=0.02)
    assert rig.mover.begun.wait(PATIENCE)
    run.give_up("test")
    with pytest.raises(LoadStuck, match="blocks of a"):
        run.land()
    with pytest.raises(LoadStuck, match="blocks of a"):
        run.check()
    rig.mover.stall.set()


def test_a_row_that_the_model_waits_for_has_its_time(rig: Rig) -> None:
    rig.mover.stall = threading.Event()
    run = rig.start(1, patience=0.02)
    with pytest.raises(LoadStuck, match="row 0 of the loads for a"):
        run.wait(0)
    rig.mover.stall.set()


class BrokenFence(Passed):
    """A fence of a device that fails.

    Args:
        broken: the questions that are answered with an error.
    """

    def __init__(self, *broken: str) -> None:
        self._broken = broken

    def wait(self) -> None:
        self._answer("wait")

    def passed(self) -> bool:
        self._answer("passed")
        return "wait" not in self._broken

    def span(self) -> tuple[float, float]:
        self._answer("span")
        return 0.0, 0.0

    def _answer(self, question: str) -> None:
        if question in self._broken:
            raise RuntimeError("an illegal address was met")


@pytest.mark.parametrize(
    ("parked", "broken"),
    [
        (True, ("passed", "wait", "span")),
        (False, ("passed", "wait", "span")),
        (True, ("span",)),
        (False, ("span",)),
        (True, ("wait",)),
    ],
)
def test_an_error_of_the_device_is_a_failed_load_and_nothing_is_kept(
    rig: Rig, parked: bool, broken: tuple[str, ...]
) -> None:
    rig.mover.fence = BrokenFence(*broken)
    over = threading.Event()
    run = rig.start(2, order("a", 0), parked=parked, done=over.set)
    if not parked:
        rig.finish(run)
    assert over.wait(PATIENCE)
    assert run.landed
    run.land(0.0)
    (receipt,) = run.receipts()
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, "RuntimeError")
    run.check()


@pytest.mark.parametrize("parked", [True, False])
def test_who_is_told_that_a_run_is_over_finds_that_it_has_landed(rig: Rig, parked: bool) -> None:
    """Its receipts come with the step then, and not with the next one."""
    landed: list[bool] = []
    over = threading.Event()

    def done() -> None:
        landed.append(run.landed)
        over.set()

    pinned = rig.mover.pinning = threading.Event()  # until the run has a name
    run = rig.start(ROWS, parked=parked, done=done)
    pinned.set()
    if not parked:
        rig.finish(run)
    assert over.wait(PATIENCE)
    assert landed == [True]


class HalfMover(RecordingMover):
    """A device that has launched a part of each copy when it fails.

    Attributes:
        launched: passes when that part is copied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched = Launched()

    def load(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = True
    ) -> Fence:
        raise CopyFailed(self.launched) from OSError("out of memory")


class Launched(Fence):
    """A fence that a test lets pass."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def wait(self) -> None:
        assert self.event.wait(PATIENCE)

    def passed(self) -> bool:
        return self.event.is_set()


@pytest.mark.parametrize("parked", [True, False])
def test_a_copy_that_fails_half_way_is_over_when_its_half_is_copied(parked: bool) -> None:
    rig = Rig(HalfMover())
    assert isinstance(rig.mover, HalfMover)
    over = threading.Event()
    run = rig.start(1, order("a", 0), parked=parked, done=over.set)
    if not parked:
        rig.finish(run)
    assert rig.pool.await_idle(PATIENCE)
    assert not run.landed, "its blocks and slots may still be read and written"
    with pytest.raises(LoadStuck):
        run.land(0.0)
    rig.mover.launched.event.set()
    assert over.wait(PATIENCE)
    assert run.landed
    (receipt,) = run.receipts()
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, "OSError")
    assert receipt.moved_bytes == 0
    rig.close()


def test_a_device_that_hangs_holds_who_waits_for_it_no_longer_than_he_wants(rig: Rig) -> None:
    rig.mover.fence = fence = Launched()
    run = rig.start(1, order("a", 0))
    rig.finish(run)
    with pytest.raises(LoadStuck, match="blocks of a"):
        run.land(0.01)
    fence.event.set()
    run.land(0.01)
    assert run.landed


def test_a_run_without_pages_is_over_at_once(rig: Rig) -> None:
    over = threading.Event()
    run = rig.start(1, order("a"), parked=True, done=over.set)
    assert over.is_set()
    assert run.landed
    assert run.loads[0].receipt(0.0, 0.0).outcome is Outcome.DONE


def test_auto_fills_the_staging_budget() -> None:
    assert window_rows("auto", staging=100, row_bytes=30, rows=16) == 3
    assert window_rows("auto", staging=100, row_bytes=1000, rows=16) == 1
    assert window_rows("auto", staging=100, row_bytes=1, rows=16) == 16
    assert window_rows(12, staging=1, row_bytes=1000, rows=16) == 12


def test_the_window_is_never_longer_than_the_model() -> None:
    assert window_rows(1_000_000_000, staging=1, row_bytes=1000, rows=16) == 16

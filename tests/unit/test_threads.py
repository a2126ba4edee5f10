"""Every thread of the data side chooses its device before it does anything else, and none that
cannot work leaves anybody waiting.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from test_executor import geometry, pages
from test_push_wire import Guarded, World

import lamina_kv.data
from lamina_kv.config import LoadConfig
from lamina_kv.data.executor import Executor, Tiers
from lamina_kv.data.far import FarTier
from lamina_kv.data.load_pipeline import LoadRun
from lamina_kv.data.loads import Load
from lamina_kv.data.movers.cpu import CpuMover
from lamina_kv.data.movers.cuda import CudaMover
from lamina_kv.data.movers.device import TorchDevice
from lamina_kv.data.near import NearSlab
from lamina_kv.data.push_wire import PushIdentity
from lamina_kv.data.save_pipeline import SaveRun
from lamina_kv.data.threads import Threads
from lamina_kv.data.worker_pool import WorkerPool
from lamina_kv.keys import KEY_BYTES
from lamina_kv.plan import (
    Ask,
    ChunkKey,
    LoadMode,
    LoadOrder,
    Move,
    Outcome,
    PeerOrder,
    PushOrder,
    PushPages,
    PushPlan,
    ReceiveOrder,
    SaveOrder,
    StepPlan,
    TierName,
    TierOrders,
    TransferId,
    TransferReceipt,
)
from lamina_kv.push.cards import EngineCard, RankCard, RowCard, encode_card
from lamina_kv.push.transports.base import Region
from stores import MemoryStore

PATIENCE = 60.0
FAR = TierName("far")
KEYS = [ChunkKey(number.to_bytes(KEY_BYTES, "little")) for number in range(4)]
Patch = pytest.MonkeyPatch


def unexpected(error: BaseException) -> None:
    raise AssertionError(f"a job was lost: {error!r}")


class Device:
    """What threads do with a device, in which order."""

    def __init__(self) -> None:
        self.started: list[threading.Thread] = []
        self.entered: list[threading.Thread] = []
        self.strangers: list[str] = []
        self.error: BaseException | None = None

    def enter(self) -> None:
        """A thread chooses it."""
        self.entered.append(threading.current_thread())
        if self.error is not None:
            raise self.error

    def used(self, what: str) -> None:
        """A thread works with it."""
        thread = threading.current_thread()
        if thread not in self.entered and thread is not threading.main_thread():
            self.strangers.append(f"{what} on {thread.name}")


class DeviceMover(CpuMover):
    """A mover of a device that has to be chosen."""

    device: Device

    def enter_thread(self) -> None:
        self.device.enter()

    def load(self, *arguments: Any, **how: Any) -> Any:
        self.device.used("load")
        return super().load(*arguments, **how)

    def save(self, *arguments: Any, **how: Any) -> Any:
        self.device.used("save")
        return super().save(*arguments, **how)


class Rank:
    """One rank with everything that has threads: a near tier and a far one, and pushes."""

    def __init__(self, device: Device) -> None:
        shape = self.geometry = geometry()
        cache = torch.randint(0, 256, (shape.allocation_bytes[0],), dtype=torch.uint8)
        mover = DeviceMover(shape, [cache])
        mover.device = device
        near = NearSlab(shape, 6 * shape.object_bytes, mover.allocate_host)
        store, length = MemoryStore(slots=4), shape.chunk_bytes
        far = FarTier(FAR, store, shard=0, length=length, timeout=PATIENCE)
        self.world = World()
        end = Guarded(self.world, [Region(cache.data_ptr(), cache.numel())])
        rows = tuple(
            RowCard(cache.data_ptr() + r.offset, r.block_stride, r.page_bytes, 1, r.groups)
            for r in shape.rows
        )
        card = RankCard(0, end.describe(), shape.num_blocks, rows)
        self.peer = PeerOrder("d", encode_card(EngineCard("d", b"", False, (), (card,))))
        self.executor = Executor(
            rank=0,
            tiers=Tiers(near, (far,)),
            mover=mover,
            config=LoadConfig(),
            push=(PushIdentity("p", card, 1, False, 1, 1), end),
        )
        self.arrived: set[str] = set()
        self.failed: set[str] = set()

    def run(self, plan: StepPlan) -> None:
        executor = self.executor
        executor.begin_step(plan)
        executor.start_loads()
        for row in self.geometry.rows:
            executor.wait_layer(row.layers[0])
            executor.layer_written(row.layers[0])
        executor.end_step()

    def settle(self, count: int) -> dict[int, TransferReceipt]:
        receipts: dict[int, TransferReceipt] = {}
        deadline = time.monotonic() + PATIENCE
        while len(receipts) < count and time.monotonic() < deadline:
            outcomes = self.executor.collect()
            self.arrived |= outcomes.arrived
            self.failed |= outcomes.failed
            receipts |= {receipt.transfer: receipt for receipt in outcomes.receipt.transfers}
            if not self.world.step():
                time.sleep(0.001)
        return receipts

    def everything(self) -> dict[int, TransferReceipt]:
        """Two chunks are saved, and one of them goes to far; then all the rest follows."""
        saves = tuple(SaveOrder(TransferId(n + 1), "r", n, (2 * n, 2 * n + 1)) for n in (0, 1))
        self.run(StepPlan(1, saves=saves))
        receipts = self.settle(2)
        outward = (Move(TransferId(3), KEYS[0], 0, 0),)
        self.run(StepPlan(2, tiers=(TierOrders(FAR, outward=outward),)))
        receipts |= self.settle(1)
        push = PushOrder(
            TransferId(8), "d", 1, (PushPages(0, (0,), (30,)),), computed=True, last=True,
            patience=PATIENCE,
        )  # fmt: skip
        pushes = PushPlan(
            orders=(push,), peers=(self.peer,), receives=(ReceiveOrder(TransferId(9), "e", 0.2),)
        )
        loads = (
            load(4, LoadMode.LAYERWISE, "a", 1, (10, 11)),
            load(5, LoadMode.PARKED, "b", 1, (12, 13)),
        )
        inward, asks = (Move(TransferId(6), KEYS[0], 3, 0),), (Ask(TransferId(7), (KEYS[0],)),)
        tiers = (TierOrders(FAR, inward=inward, asks=asks),)
        self.run(StepPlan(3, loads=loads, tiers=tiers, push=pushes))
        return receipts | self.settle(6)


def load(number: int, mode: LoadMode, name: str, slot: int, blocks: tuple[int, ...]) -> LoadOrder:
    return LoadOrder(TransferId(number), name, mode, (pages(slot, blocks),), inf)


@pytest.fixture
def device(monkeypatch: Patch) -> Device:
    device = Device()
    start = threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        device.started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    return device


@pytest.fixture
def rank(device: Device) -> Iterator[Rank]:
    rank = Rank(device)
    yield rank
    rank.executor.close()


# -- the device ----------------------------------------------------------------------------------


def test_every_thread_chooses_its_device_first(rank: Rank, device: Device) -> None:
    receipts = rank.everything()
    assert {number: receipts[number].outcome for number in range(1, 9)} == dict.fromkeys(
        range(1, 9), Outcome.DONE
    )
    names = {re.sub(r"-\d+$", "", thread.name) for thread in device.started}
    assert names == {
        "lamina-load", "lamina-land", "lamina-save", "lamina-write-far", "lamina-read-far",
        "lamina-host-memory",
        "lamina-populate", "lamina-push",
    }  # fmt: skip
    assert device.entered.count(device.started[0]) == 1
    assert set(device.entered) == set(device.started)
    assert device.strangers == []


def test_threads_are_started_in_one_place() -> None:
    """So that one which is added later chooses its device, too."""
    folder = Path(lamina_kv.data.__file__).parent
    starts = re.compile(r"\bThread\(|ThreadPool|start_new_thread|threading\.Timer|multiprocessing")
    found = {path.name for path in folder.rglob("*.py") if starts.search(path.read_text())}
    assert found == {"threads.py"}


def test_a_cuda_mover_chooses_its_own_device(monkeypatch: Patch) -> None:
    """And makes a context current, which torch does not on a new thread that is for device 0."""
    chosen: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: chosen.append(("asks", device)))
    mover = CudaMover.__new__(CudaMover)
    mover._device = TorchDevice.__new__(TorchDevice)
    mover._device._device = torch.device("cuda", 3)
    mover.enter_thread()
    device = torch.device("cuda", 3)
    assert chosen == [device, ("asks", device)]


def test_cores_that_are_others_by_now_stop_nobody(device: Device, monkeypatch: Patch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("these cores are another container's")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    rank = Rank(device)
    receipts = rank.everything()
    assert {receipts[number].outcome for number in range(1, 9)} == {Outcome.DONE}
    rank.executor.close()


# -- threads that cannot work --------------------------------------------------------------------


def test_transfers_of_threads_that_cannot_begin_fail(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.error = MemoryError("no room for a context on this device")
    rank = Rank(device)
    receipts = rank.everything()
    assert {number: receipt.outcome for number, receipt in receipts.items()} == dict.fromkeys(
        range(1, 10), Outcome.FAILED
    )
    assert {receipt.reason for receipt in receipts.values()} == {"MemoryError"}
    assert rank.arrived == {"b", "e"}
    assert rank.failed == {"a", "b"}
    rank.executor.close()
    said = [record.getMessage() for record in caplog.records if "until the engine is" in record.msg]
    assert len(said) == 6, "once for each pool, and for the wire"


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), ZeroDivisionError()])
@pytest.mark.parametrize("mode", list(LoadMode))
def test_a_load_that_ends_in_whatever_way_is_not_taken_for_done(
    rank: Rank, monkeypatch: Patch, mode: LoadMode, error: BaseException
) -> None:
    def end(*_: object, **__: object) -> None:
        raise error

    rank.run(StepPlan(1, saves=(SaveOrder(TransferId(1), "r", 1, (2, 3)),)))
    rank.settle(1)
    with monkeypatch.context() as patch:
        patch.setattr(CpuMover, "load", end)
        rank.run(StepPlan(2, loads=(load(2, mode, "a", 1, (10, 11)),)))
        receipt = rank.settle(1)[2]
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, type(error).__name__)
    assert rank.failed == {"a"}
    rank.run(StepPlan(3, loads=(load(3, mode, "a", 1, (10, 11)),)))
    assert rank.settle(1)[3].outcome is Outcome.DONE


@pytest.mark.parametrize("error", [SystemExit(1), ZeroDivisionError()])
def test_a_save_that_ends_in_whatever_way_is_not_taken_for_done(
    rank: Rank, monkeypatch: Patch, error: BaseException
) -> None:
    def end(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(CpuMover, "save", end)
    rank.run(StepPlan(1, saves=(SaveOrder(TransferId(1), "r", 1, (2, 3)),)))
    receipt = rank.settle(1)[1]
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, type(error).__name__)


class Beginners:
    """Threads of which only some can begin."""

    def __init__(self, failing: int) -> None:
        self.left = failing
        self._lock = threading.Lock()

    def enter(self) -> None:
        with self._lock:
            self.left -= 1
            if self.left >= 0:
                raise OSError("no device")


@pytest.mark.parametrize("failing", [1, 2])
def test_jobs_of_a_thread_that_cannot_begin_are_left_to_the_others(failing: int) -> None:
    done: list[int] = []
    lost: list[str] = []
    pool = WorkerPool("test", 2, Threads(Beginners(failing).enter))
    for number in range(20):
        pool.submit(
            (0, number),
            lambda number=number: done.append(number),  # type: ignore[misc]
            lambda error: lost.append(type(error).__name__),
        )
    assert pool.await_idle(PATIENCE)
    assert (len(done), lost) == ((20, []) if failing == 1 else (0, ["OSError"] * 20))
    assert pool.close(PATIENCE)


def test_a_pool_is_idle_when_its_job_has_raised() -> None:
    def end() -> None:
        raise SystemExit

    lost: list[BaseException] = []
    pool = WorkerPool("test", 1)
    pool.submit((0, 0), end, lost.append)
    assert pool.await_idle(PATIENCE)
    assert [type(error) for error in lost] == [SystemExit]
    pool.submit((0, 0), lambda: None, unexpected)
    assert pool.close(PATIENCE)


def test_jobs_that_a_job_submits_while_the_pool_closes_are_run() -> None:
    done = threading.Event()
    pool = WorkerPool("test", 1)
    go_on = threading.Event()

    def first() -> None:
        go_on.wait(PATIENCE)
        pool.submit((0, 0), done.set, unexpected)

    pool.submit((0, 0), first, unexpected)
    threading.Timer(0.05, go_on.set).start()
    assert pool.close(PATIENCE)
    assert done.is_set()


def test_who_waits_for_a_pool_waits_for_the_job_that_runs() -> None:
    pool, go_on = WorkerPool("test", 1), threading.Event()
    assert pool.await_idle(0)
    pool.submit((0.0, 0), lambda: go_on.wait(PATIENCE), unexpected)
    assert not pool.await_idle(0.01)
    go_on.set()
    assert pool.await_idle(PATIENCE)
    assert pool.close(PATIENCE)
    assert pool.await_idle(0), "nobody waits for a pool that has ended"


# -- Lamina, broken ------------------------------------------------------------------------------


def one_thread_chooses_no_device(patch: Patch) -> None:
    start = Threads.start

    def hasty(threads: Threads, name: str, *rest: Any) -> threading.Thread:
        begin = Threads(cores=threads.cores) if name == "push" else threads
        return start(begin, name, *rest)

    patch.setattr(Threads, "start", hasty)


def a_piece_that_is_lost_counts_as_loaded(patch: Patch) -> None:
    def lost(run: LoadRun, row: int, load: Load, error: BaseException) -> None:
        run._piece_over(row, load)

    patch.setattr(LoadRun, "_lost", lost)


def a_row_that_is_lost_counts_as_saved(patch: Patch) -> None:
    patch.setattr(SaveRun, "_lost", lambda saves, error: None)


def test_threads_that_are_broken_are_seen(device: Device, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        one_thread_chooses_no_device(patch)
        rank = Rank(device)
        with pytest.raises(AssertionError):
            test_every_thread_chooses_its_device_first(rank, device)
        rank.executor.close()


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (
            a_piece_that_is_lost_counts_as_loaded,
            lambda rank, patch: test_a_load_that_ends_in_whatever_way_is_not_taken_for_done(
                rank, patch, LoadMode.PARKED, SystemExit(1)
            ),
        ),
        (
            a_row_that_is_lost_counts_as_saved,
            lambda rank, patch: test_a_save_that_ends_in_whatever_way_is_not_taken_for_done(
                rank, patch, SystemExit(1)
            ),
        ),
    ],
    ids=["load", "save"],
)
def test_a_lost_job_that_counts_is_seen(
    broken: Callable[[Patch], None],
    test: Callable[[Rank, Patch], None],
    rank: Rank,
    monkeypatch: Patch,
) -> None:
    with monkeypatch.context() as patch:
        broken(patch)
        with pytest.raises(AssertionError):
            test(rank, monkeypatch)

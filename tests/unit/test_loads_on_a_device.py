"""Loads and saves where copies run behind the host: what has arrived has passed, what is queued is
bounded, nobody who computes waits for what is parked, times are the device's, and a device that
fails or hangs is no riddle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from lamina_kv.config import LoadConfig
from lamina_kv.data.executor import Executor, Outcomes, Tiers
from lamina_kv.data.load_pipeline import LoadStuck
from lamina_kv.data.movers import device_fence, host_memory
from lamina_kv.data.movers.cuda import CudaMover
from lamina_kv.data.near import NearSlab
from lamina_kv.geometry import CacheGeometry, Row
from lamina_kv.observe.timeline import Lane, Timeline
from lamina_kv.plan import (
    TIMED_OUT,
    LoadMode,
    LoadOrder,
    Outcome,
    PageMap,
    SaveOrder,
    StepPlan,
    TransferId,
    TransferReceipt,
)
from simulator.device import (
    BYTES_PER_SECOND,
    LAUNCH_SECONDS,
    SimulatedDevice,
    SimulatedEvent,
    SimulatedStream,
)

ROWS, PAGE, BLOCKS = 8, 64, 32
GEOMETRY = CacheGeometry(
    rows=tuple(Row((f"layer.{i}",), 0, i * BLOCKS * PAGE, PAGE, PAGE) for i in range(ROWS)),
    num_blocks=BLOCKS,
    block_tokens=16,
    chunk_tokens=32,
    allocation_bytes=(ROWS * BLOCKS * PAGE,),
)
ROW_SECONDS = LAUNCH_SECONDS + 2 * PAGE / BYTES_PER_SECOND
"""What the device takes to copy a row of a chunk."""


class Rank:
    """A rank on a simulated device that is never late by itself."""

    def __init__(self, shape: CacheGeometry = GEOMETRY, **config: object) -> None:
        cache = torch.zeros(shape.allocation_bytes[0], dtype=torch.uint8)
        self.device = SimulatedDevice([cache], Random(0))
        self.device.changes_pace = False
        mover = CudaMover(shape, [cache], self.device)
        self.anchors, self.step_loads, self.other_loads, self.saves = self.device.streams[1:5]
        near = NearSlab(shape, 8 * shape.object_bytes, mover.allocate_host)
        self.timeline = Timeline()
        self.executor = Executor(
            rank=0,
            tiers=Tiers(near),
            mover=mover,
            config=LoadConfig.model_validate(config),
            timeline=self.timeline,
        )
        self.step = 0
        self.receipts: list[TransferReceipt] = []

    def run(self, *orders: LoadOrder, saves: tuple[SaveOrder, ...] = ()) -> Outcomes:
        """A step of the engine, whose kernels take as long as a row of a load."""
        self.step += 1
        self.executor.begin_step(StepPlan(self.step, loads=orders, saves=saves))
        self.executor.start_loads()
        for row in range(ROWS):
            if self.executor.moves_rows:
                self.executor.wait_layer(f"layer.{row}")
            self.device.launch(lambda: None, ROW_SECONDS)
            if self.executor.moves_rows:
                self.executor.layer_written(f"layer.{row}")
        self.executor.end_step()
        return self.collect()

    def collect(self) -> Outcomes:
        outcomes = self.executor.collect()
        self.receipts += outcomes.receipt.transfers
        return outcomes

    def settle(self) -> TransferReceipt:
        """The one receipt that comes."""
        eventually(lambda: bool(self.collect() and self.receipts))
        (receipt,) = self.receipts
        return receipt

    def queued(self, stream: SimulatedStream) -> int:
        """Copies that a stream has been given and has not made."""
        given = sum(kind == "copy" for kind, _ in stream.log)
        return given - sum(copy.stream is stream for copy in self.device.copies)


@pytest.fixture
def make() -> Iterator[Callable[..., Rank]]:
    ranks: list[Rank] = []

    def make(shape: CacheGeometry = GEOMETRY, **config: object) -> Rank:
        ranks.append(Rank(shape, **config))
        ranks[-1].device.settle()
        for stream in ranks[-1].device.streams:
            stream.log.clear()
        ranks[-1].device.copies.clear()
        return ranks[-1]

    yield make
    for rank in ranks:
        for stream in rank.device.streams:
            rank.device.release(stream)
        rank.executor.close()


def load(number: int, mode: LoadMode, *, timeout: float = 60.0) -> LoadOrder:
    pages = PageMap(0, np.array([2, 3], np.int32), np.array([number, number + 10], np.int32))
    return LoadOrder(TransferId(number), f"r{number}", mode, (pages,), timeout)


def save(number: int, slot: int, *, overwritten: bool = False) -> SaveOrder:
    return SaveOrder(TransferId(number), f"r{number}", slot, (1, 2), 0, overwritten)


def eventually(done: Callable[[], bool]) -> None:
    due = time.monotonic() + 60
    while not done():
        assert time.monotonic() < due
        time.sleep(0.001)


def test_a_parked_load_holds_no_step_and_has_arrived_when_it_is_copied(
    make: Callable[..., Rank],
) -> None:
    rank = make(load_ahead=ROWS)
    rank.other_loads.held = True
    outcomes = rank.run(load(1, LoadMode.PARKED))
    eventually(lambda: rank.queued(rank.other_loads) == ROWS)
    for _ in range(3):
        assert outcomes.arrived == frozenset()
        assert not any(kind == "wait" for kind, _ in rank.device.compute.log)
        outcomes = rank.run()
    rank.device.release(rank.other_loads)
    arrived: set[str] = set()
    eventually(lambda: bool(arrived.update(rank.collect().arrived) or arrived))
    assert rank.queued(rank.other_loads) == 0


def test_a_load_of_a_step_passes_those_that_are_parked(make: Callable[..., Rank]) -> None:
    rank = make(load_ahead=ROWS)
    rank.other_loads.held = True
    rank.run(load(1, LoadMode.PARKED))
    eventually(lambda: rank.queued(rank.other_loads) == ROWS)
    rank.run(load(2, LoadMode.LAYERWISE))
    rank.device.settle()
    assert rank.queued(rank.step_loads) == 0
    assert rank.device.compute.idle
    assert rank.settle().outcome is Outcome.DONE
    assert rank.queued(rank.other_loads) == ROWS


@pytest.mark.parametrize(("config", "rows"), [({"load_ahead": 2}, 2), ({"staging": 3 * 128}, 3)])
def test_the_window_bounds_what_is_queued_on_the_device(
    make: Callable[..., Rank], config: dict[str, object], rows: int
) -> None:
    rank = make(**config)
    rank.other_loads.held = True
    rank.run(load(1, LoadMode.PARKED))
    eventually(lambda: rank.queued(rank.other_loads) == rows)
    time.sleep(0.02)  # nothing more comes
    assert rank.queued(rank.other_loads) == rows
    rank.device.release(rank.other_loads)
    assert rank.settle().outcome is Outcome.DONE


def test_nobody_waits_for_a_load_that_is_given_up(make: Callable[..., Rank]) -> None:
    rank = make(load_ahead=2)
    rank.other_loads.held = True
    rank.run(load(1, LoadMode.PARKED, timeout=0.01))
    eventually(lambda: rank.queued(rank.other_loads) == 2)
    time.sleep(0.02)
    for _ in range(3):
        outcomes = rank.run()  # else this would wait until the device is released
        assert rank.receipts == []
        assert outcomes.arrived == frozenset()
    rank.device.release(rank.other_loads)
    receipt = rank.settle()
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, TIMED_OUT)
    assert sum(copy.stream is rank.other_loads for copy in rank.device.copies) == 2


@pytest.mark.parametrize("mode", list(LoadMode))
def test_times_are_those_of_the_device(
    make: Callable[..., Rank], mode: LoadMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of two threads either may be the first to launch.
    monkeypatch.setattr("lamina_kv.data.executor.LOAD_THREADS", 1)
    rank = make()
    rank.run(load(1, mode))
    rank.device.settle()
    receipt = rank.settle()
    assert receipt.active == pytest.approx(ROWS * ROW_SECONDS, rel=1e-3)
    # A kernel takes as long as a row: the model waits for the first row, and meets the others.
    waits = ROW_SECONDS if mode is LoadMode.LAYERWISE else 0.0
    assert receipt.waited == pytest.approx(waits, rel=1e-2, abs=1e-6)


def test_the_timeline_shows_what_the_device_did(
    make: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina_kv.data.executor.LOAD_THREADS", 1)
    rank = make()
    rank.run(load(1, LoadMode.LAYERWISE))
    rank.device.settle()
    rank.settle()
    rank.run()
    spans = rank.timeline.spans()

    def seconds(lane: Lane) -> list[Any]:
        wanted = [span for span in spans if span.lane is lane and span.step == 1]
        assert [span.row for span in wanted] == sorted(span.row for span in wanted)
        return [pytest.approx(span.end - span.start, abs=2e-6) for span in wanted]

    assert seconds(Lane.LOAD) == [ROW_SECONDS] * ROWS
    assert seconds(Lane.COMPUTE) == [ROW_SECONDS] * ROWS
    assert seconds(Lane.WAIT)[0] == ROW_SECONDS


def test_of_a_load_that_has_not_landed_one_fence_is_asked(
    make: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina_kv.data.loads.PIECE_BYTES", PAGE)  # two pieces of a row
    rank = make()
    rank.step_loads.held = True
    rank.run(load(1, LoadMode.LAYERWISE))
    asked: list[SimulatedEvent] = []
    passed = SimulatedEvent.passed

    def counted(event: SimulatedEvent) -> bool:
        asked.append(event)
        return passed(event)

    monkeypatch.setattr(SimulatedEvent, "passed", counted)
    rank.collect()
    assert len(asked) == 1
    monkeypatch.undo()
    rank.device.release(rank.step_loads)
    rank.device.settle()
    assert rank.settle().outcome is Outcome.DONE


def test_a_load_is_reported_when_it_has_been_read_though_another_one_has_failed(
    make: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = make(load_ahead=ROWS)
    rank.step_loads.held = True
    copy = CudaMover.load

    def failing(mover: CudaMover, rows: Any, pairs: Any, after: Any, **how: Any) -> Any:
        if 2 in pairs.pages:
            raise OSError("a row is lost")
        return copy(mover, rows, pairs, after, **how)

    monkeypatch.setattr(CudaMover, "load", failing)
    outcomes = rank.run(load(1, LoadMode.LAYERWISE), load(2, LoadMode.LAYERWISE))
    assert outcomes.failed == {"r2"}
    assert rank.receipts == []
    rank.device.release(rank.step_loads)
    rank.device.settle()
    outcomes = rank.collect()
    found = {receipt.transfer: receipt.outcome for receipt in rank.receipts}
    assert found == {1: Outcome.DONE, 2: Outcome.FAILED}
    assert outcomes.failed == frozenset(), "it was said before"


# -- a device that is busy ------------------------------------------------------------------------


def test_what_the_forward_overwrites_is_read_before_all_other_saves(
    make: Callable[..., Rank],
) -> None:
    rank = make()
    rank.saves.held = True
    rank.run(saves=(save(1, 4),))
    eventually(lambda: rank.queued(rank.saves) == 1)
    rank.run(saves=(save(2, 5, overwritten=True),))
    rank.device.settle()
    assert rank.device.compute.idle, "the model waits for saves that are nothing to it"
    rank.device.release(rank.saves)
    eventually(lambda: bool(rank.collect()) and len(rank.receipts) == 2)
    assert {receipt.outcome for receipt in rank.receipts} == {Outcome.DONE}


@pytest.mark.parametrize("mode", list(LoadMode))
def test_nobody_waits_to_know_what_time_it_is_on_the_device(
    make: Callable[..., Rank], mode: LoadMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = make()
    monkeypatch.setattr(device_fence, "ANCHOR_SECONDS", -1.0)  # always another one
    rank.anchors.held = True
    rank.run(load(1, mode))
    rank.device.settle()
    assert rank.settle().outcome is Outcome.DONE
    rank.run()


# -- a device that fails --------------------------------------------------------------------------


def test_a_device_that_fails_under_a_parked_load_fails_it_with_a_reason(
    make: Callable[..., Rank],
) -> None:
    rank = make(load_ahead=2)
    rank.other_loads.held = True
    rank.run(load(1, LoadMode.PARKED))
    eventually(lambda: rank.queued(rank.other_loads) == 2)
    rank.device.fail("an illegal address was met")
    told: list[Outcomes] = []

    def has_arrived() -> bool:
        told.append(rank.collect())
        return bool(told[-1].arrived)

    eventually(has_arrived)
    assert told[-1].arrived == told[-1].failed == {"r1"}
    (receipt,) = rank.receipts
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, "RuntimeError")
    rank.executor.quiet()


def test_a_device_that_fails_under_what_the_model_has_read_stops_the_engine(
    make: Callable[..., Rank],
) -> None:
    rank = make()
    rank.step_loads.held = True
    rank.run(load(1, LoadMode.LAYERWISE))
    assert not rank.receipts
    rank.device.fail("an illegal address was met")
    rank.executor.end_step()  # its trace ends, and no more
    with pytest.raises(LoadStuck, match="device has failed while it copied rows for r1"):
        rank.collect()
    with pytest.raises(LoadStuck):
        rank.executor.begin_step(StepPlan(9))


UNEVEN = replace(
    GEOMETRY,
    rows=tuple(replace(row, page_bytes=PAGE // (1 + i % 2)) for i, row in enumerate(GEOMETRY.rows)),
)
"""Rows of two kinds: a save of all rows is two launches."""


@pytest.mark.parametrize("overwritten", [True, False])
def test_of_a_save_that_fails_half_way_the_half_is_waited_for(
    make: Callable[..., Rank], overwritten: bool
) -> None:
    rank = make(UNEVEN)
    for stream in rank.device.streams[4:]:
        stream.held = True
    rank.device.launches_left = 1
    rank.run(saves=(save(1, 4, overwritten=overwritten),))
    eventually(lambda: sum(map(rank.queued, rank.device.streams[4:])) == 1)
    time.sleep(0.02)  # nothing comes
    rank.collect()
    assert not rank.receipts, "its slot may be given to another chunk, and is still written"
    for stream in rank.device.streams[4:]:
        rank.device.release(stream)
    receipt = rank.settle()
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, "RuntimeError")


# -- a device that hangs --------------------------------------------------------------------------


@pytest.fixture
def impatient(make: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch) -> Rank:
    rank = make()
    rank.step_loads.held = True
    rank.run(load(1, LoadMode.LAYERWISE))
    monkeypatch.setattr(rank.executor, "_patience", 0.05)
    return rank


def test_the_wait_for_a_device_before_memory_goes_has_an_end(impatient: Rank) -> None:
    with pytest.raises(LoadStuck, match="blocks of r1"):
        impatient.executor.quiet()
    impatient.device.release(impatient.step_loads)
    impatient.executor.quiet()
    assert impatient.settle().outcome is Outcome.DONE


@pytest.mark.parametrize("hangs", ["a load", "a save"])
def test_closing_beside_a_device_that_hangs_keeps_its_memory(
    make: Callable[..., Rank], hangs: str, caplog: pytest.LogCaptureFixture
) -> None:
    rank = make(deadline=0.05)
    kept = len(host_memory._kept)
    if hangs == "a load":
        rank.step_loads.held = True
        rank.run(load(1, LoadMode.LAYERWISE))
    else:
        rank.saves.held = True
        rank.run(saves=(save(1, 4),))
        eventually(lambda: rank.queued(rank.saves) == 1)
    rank.executor.close()
    assert rank.device.registered, "what the device may still use is pinned"
    assert len(host_memory._kept) == kept + 1, "and mapped"
    assert "kept until the process ends" in caplog.text
    del host_memory._kept[kept:]

"""The executor brings back the bytes that were saved, reports every transfer once, and trusts
nothing that was computed on a failed load."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lamina_kv.config import LoadConfig
from lamina_kv.data import save_pipeline
from lamina_kv.data.executor import Executor, Outcomes, Tiers
from lamina_kv.data.far import FarTier
from lamina_kv.data.movers import Fence
from lamina_kv.data.movers.cpu import CpuMover
from lamina_kv.data.near import Indices, NearSlab
from lamina_kv.geometry import CacheGeometry, Row
from lamina_kv.keys import KEY_BYTES
from lamina_kv.observe.timeline import Lane, Timeline
from lamina_kv.plan import (
    Ask,
    ChunkKey,
    LoadMode,
    LoadOrder,
    Move,
    NearSlots,
    Outcome,
    PageMap,
    SaveOrder,
    StepPlan,
    TierName,
    TierOrders,
    TransferId,
    TransferReceipt,
)
from stores import MemoryStore

BLOCKS, STRIDE = 40, 640
PAGES = (512, 640, 384)
"""Rows of different page sizes in one block-outermost allocation would need one stride each;
layer-outermost ones share it, and the gap after a short page must stay untouched."""


def geometry() -> CacheGeometry:
    return CacheGeometry(
        rows=tuple(
            Row((f"layer.{i}",), 0, i * BLOCKS * STRIDE, STRIDE, page)
            for i, page in enumerate(PAGES)
        ),
        num_blocks=BLOCKS,
        block_tokens=16,
        chunk_tokens=32,
        allocation_bytes=(len(PAGES) * BLOCKS * STRIDE,),
    )


class FlakyMover(CpuMover):
    """Copies that fail, or take their time.

    Attributes:
        bad_row: a row that cannot be loaded.
        pinning: near memory is not fit for copies before it is set.
        pinned: how many near slots are fit for copies; None for all.
        stall: a load that has begun does not end before it is set.
    """

    bad_row = -1
    pinning: threading.Event | None = None
    pinned: NearSlots | None = None
    stall: threading.Event | None = None

    def near_slots(self, near: NearSlab) -> NearSlots:
        return self.pinned or super().near_slots(near)

    def await_near(self, near: NearSlab, near_pages: Indices) -> None:
        if self.pinning is not None:
            assert self.pinning.wait(60)

    def load(self, rows: Sequence[int], *arguments: Any, **how: Any) -> Fence:
        if self.stall is not None:
            assert self.stall.wait(60)
        if self.bad_row in rows:
            raise OSError("a row is lost")
        return super().load(rows, *arguments, **how)


class Rank:
    """One rank: an engine cache of random bytes, a near tier, a far one, an executor."""

    def __init__(
        self,
        config: LoadConfig | None = None,
        shape: CacheGeometry | None = None,
        *,
        follows: bool = False,
    ) -> None:
        self.geometry = shape or geometry()
        self.cache = torch.randint(0, 256, (self.geometry.allocation_bytes[0],), dtype=torch.uint8)
        self.mover = FlakyMover(self.geometry, [self.cache])
        size = 10 * self.geometry.object_bytes
        self.near = NearSlab(self.geometry, size, self.mover.allocate_host)
        self.store = MemoryStore(slots=4)
        name, length = TierName("far"), self.geometry.chunk_bytes
        far = FarTier(name, self.store, shard=0, length=length, timeout=60.0)
        self.timeline = Timeline()
        self.executor = Executor(
            rank=0,
            tiers=Tiers(self.near, () if follows else (far,), follows),
            mover=self.mover,
            config=config or LoadConfig(),
            timeline=self.timeline,
        )
        self.step = 0

    @property
    def layers(self) -> list[str]:
        """In the order of the forward."""
        return [layer for row in self.geometry.rows for layer in row.layers]

    def pages(self, blocks: Sequence[int]) -> list[bytes]:
        return [
            bytes(self.cache[row.offset + b * STRIDE :][: row.page_bytes].tolist())
            for row in self.geometry.rows
            for b in blocks
        ]

    def run(self, plan: StepPlan, *, hooks: bool = True) -> None:
        """One step of an engine, whose layers write nothing."""
        self.step += 1
        self.executor.begin_step(replace(plan, step=self.step))
        self.executor.start_loads()
        if plan.forward and hooks and self.executor.moves_rows:
            for layer in self.layers:
                self.executor.wait_layer(layer)
                self.executor.layer_written(layer)
        self.executor.end_step()

    def settle(self, count: int) -> list[TransferReceipt]:
        """Collect until ``count`` receipts have come, and see that no more follow."""
        receipts: list[TransferReceipt] = []
        deadline = time.monotonic() + 60
        while len(receipts) < count and time.monotonic() < deadline:
            receipts += self.executor.collect().receipt.transfers
            time.sleep(0.001)
        assert len(receipts) == count
        assert self.executor.collect().receipt.transfers == ()
        return receipts

    def save(self, slot: int, blocks: tuple[int, ...]) -> None:
        self.run(StepPlan(0, saves=(save(1, slot, blocks),)))
        (receipt,) = self.settle(1)
        assert receipt.outcome is Outcome.DONE


def test_before_the_engines_memory_goes_nobody_reads_or_writes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank = Rank(LoadConfig(mode="parked"))
    rank.save(3, (7, 2))
    slow, copy = threading.Event(), rank.mover.save

    def slowly(*arguments: Any, **how: Any) -> Fence:
        slow.wait(60)
        return copy(*arguments, **how)

    monkeypatch.setattr(rank.mover, "save", slowly)
    rank.mover.pinning = threading.Event()
    rank.run(StepPlan(0, saves=(save(2, 4, (4, 9)),)))
    rank.run(StepPlan(0, loads=(load(3, (11, 5), mode=LoadMode.PARKED),), forward=False))
    threading.Timer(0.1, slow.set).start()
    rank.executor.quiet()
    rank.cache.zero_()
    rank.mover.pinning.set()
    assert {r.transfer: r.outcome for r in rank.settle(2)} == {
        2: Outcome.DONE,
        3: Outcome.FAILED,
    }
    assert not rank.cache.any(), "a load that was given up has written"
    rank.executor.close()


def test_a_save_that_does_not_end_keeps_the_engines_memory_awake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank = Rank(LoadConfig(deadline=0.1))
    hangs, copy = threading.Event(), rank.mover.save

    def hanging(*arguments: Any, **how: Any) -> Fence:
        hangs.wait(60)
        return copy(*arguments, **how)

    monkeypatch.setattr(rank.mover, "save", hanging)
    rank.run(StepPlan(0, saves=(save(2, 4, (4, 9)),)))
    with pytest.raises(TimeoutError, match=r"load\.deadline, 0\.1 s"):
        rank.executor.quiet()
    hangs.set()
    rank.executor.close()


@pytest.fixture
def rank() -> Iterator[Rank]:
    rank = Rank()
    yield rank
    rank.executor.close()


def save(number: int, slot: int, blocks: tuple[int, ...]) -> SaveOrder:
    return SaveOrder(TransferId(number), "r", slot, blocks)


def pages(slot: int, blocks: tuple[int, ...], *, first: int = 0, group: int = 0) -> PageMap:
    """The blocks of a chunk of two from its block ``first`` on."""
    near = 2 * slot + first + np.arange(len(blocks), dtype=np.int32)
    return PageMap(group, near, np.array(blocks, np.int32))


def load(
    number: int,
    blocks: tuple[int, ...],
    *,
    slot: int = 3,
    first: int = 0,
    mode: LoadMode = LoadMode.LAYERWISE,
    timeout: float = 60.0,
) -> LoadOrder:
    parts = (pages(slot, blocks, first=first),)
    return LoadOrder(TransferId(number), "r", mode, parts, timeout)


@pytest.mark.parametrize("mode", list(LoadMode))
@pytest.mark.parametrize("load_ahead", [1, 2, 9, "auto"])
def test_what_is_loaded_is_what_was_saved(mode: LoadMode, load_ahead: int | str) -> None:
    rank = Rank(LoadConfig.model_validate({"load_ahead": load_ahead}))
    rank.save(3, (7, 2))
    expected = rank.pages((7, 2))
    untouched = rank.pages(range(20, 40))
    rank.cache[: 20 * STRIDE] = 0
    rank.run(StepPlan(0, loads=(load(2, (11, 5), mode=mode),)))
    (receipt,) = rank.settle(1)
    assert receipt.outcome is Outcome.DONE
    assert receipt.moved_bytes == rank.geometry.chunk_bytes
    assert rank.pages((11, 5)) == expected
    assert rank.pages(range(20, 40)) == untouched
    rank.executor.close()


def test_half_a_chunk_is_loaded_by_half(rank: Rank) -> None:
    rank.save(3, (7, 2))
    expected, other = rank.pages((2,)), rank.pages((11,))
    rank.run(StepPlan(0, loads=(load(2, (5,), first=1),)))
    rank.settle(1)
    assert rank.pages((5,)) == expected
    assert rank.pages((11,)) == other


def test_rows_that_no_hook_announces_are_saved_all_the_same(rank: Rank) -> None:
    rank.run(StepPlan(0, saves=(save(1, 3, (7, 2)),)), hooks=False)
    rank.settle(1)
    expected = rank.pages((7, 2))
    rank.run(StepPlan(0, loads=(load(2, (11, 5)),)))
    rank.settle(1)
    assert rank.pages((11, 5)) == expected


@pytest.mark.parametrize("hooks", [True, False])
def test_what_the_forward_overwrites_is_saved_as_it_was_before(rank: Rank, hooks: bool) -> None:
    slow, copy = threading.Event(), rank.mover.save

    def slowly(*arguments: Any, **how: Any) -> Fence:
        slow.wait(0.02)
        return copy(*arguments, **how)

    rank.mover.save = slowly  # type: ignore[method-assign]
    before, beside = rank.pages((7, 2)), rank.pages((4, 9))
    passing = replace(save(1, 3, (7, 2)), overwritten=True)
    rank.executor.begin_step(StepPlan(1, saves=(passing, save(2, 4, (4, 9)))))
    for row in rank.geometry.rows:
        for block in (7, 2):
            start = row.offset + block * STRIDE
            rank.cache[start : start + row.page_bytes] = 99
        if hooks:
            rank.executor.layer_written(row.layers[0])
    rank.executor.end_step()
    receipts = rank.settle(2)
    assert {receipt.transfer for receipt in receipts} == {1, 2}
    assert all(receipt.outcome is Outcome.DONE for receipt in receipts)
    rank.run(StepPlan(0, loads=(load(3, (11, 5)), load(4, (12, 6), slot=4))))
    rank.settle(2)
    assert rank.pages((11, 5)) == before
    assert rank.pages((12, 6)) == beside


def test_a_save_that_cannot_be_made_before_the_forward_does_not_stop_it(rank: Rank) -> None:
    passing = replace(save(1, 3, (7, BLOCKS)), overwritten=True)
    rank.run(StepPlan(0, saves=(passing,)))
    (receipt,) = rank.settle(1)
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, "IndexError")


def test_a_row_is_saved_as_it_was_when_its_layer_had_written_it(rank: Rank) -> None:
    rank.executor.begin_step(StepPlan(1, saves=(save(1, 3, (7, 2)),)))
    for row in rank.geometry.rows:
        rank.executor.wait_layer(row.layers[0])
        start = row.offset + 7 * STRIDE
        rank.cache[start : start + row.page_bytes] = 99
        rank.executor.layer_written(row.layers[0])
    rank.executor.end_step()
    rank.settle(1)
    rank.run(StepPlan(0, loads=(load(2, (11, 5)),)))
    rank.settle(1)
    assert rank.pages((11,)) == [bytes([99]) * page for page in PAGES]


@pytest.fixture
def by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves are taken for large ones."""
    monkeypatch.setattr(save_pipeline, "ROW_BYTES", 1)


@pytest.mark.usefixtures("by_rows")
def test_a_row_is_saved_once_per_step(rank: Rank) -> None:
    rank.executor.begin_step(StepPlan(1, saves=(save(1, 3, (7, 2)),)))
    for _ in range(3):
        for row in rank.geometry.rows:
            rank.executor.layer_written(row.layers[0])
    rank.executor.end_step()
    rank.settle(1)
    spans = [span for span in rank.timeline.spans() if span.lane is Lane.SAVE]
    assert sorted(span.row for span in spans) == [0, 1, 2]


def test_a_layer_that_reads_the_cache_of_another_one_is_ignored_without_a_word(
    rank: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    rank.save(3, (7, 2))
    expected = rank.pages((7, 2))
    rank.executor.begin_step(StepPlan(1, loads=(load(2, (11, 5)),)))
    rank.executor.start_loads()
    for layer in (*rank.layers, "no.such.layer"):
        rank.executor.wait_layer(layer)
        rank.executor.layer_written(layer)
    rank.executor.end_step()
    rank.settle(1)
    assert rank.pages((11, 5)) == expected
    assert not caplog.records


def test_a_step_with_nothing_to_move_asks_for_no_hooks(rank: Rank) -> None:
    rank.executor.begin_step(StepPlan(1))
    assert not rank.executor.moves_rows
    rank.executor.end_step()


def test_a_failed_load_in_the_step_poisons_the_saves_of_its_step(rank: Rank) -> None:
    rank.save(3, (7, 2))
    rank.mover.bad_row = 1
    rank.run(StepPlan(0, loads=(load(2, (11, 5)),), saves=(save(3, 4, (11, 5)),)))
    outcomes = rank.executor.collect()
    assert outcomes.failed == {"r"}
    receipts = list(outcomes.receipt.transfers) + rank.settle(2 - len(outcomes.receipt.transfers))
    by_id = {r.transfer: r for r in receipts}
    assert (by_id[TransferId(2)].outcome, by_id[TransferId(2)].reason) == (
        Outcome.FAILED,
        "OSError",
    )
    assert by_id[TransferId(3)].outcome is Outcome.FAILED
    assert by_id[TransferId(3)].reason == "load_failed"


@pytest.mark.parametrize("mode", list(LoadMode))
def test_a_row_moves_only_the_groups_that_have_a_layer_in_it(mode: LoadMode) -> None:
    """Two groups share rows 0 and 2; row 1 is of the first alone, and chunks of the second have one
    block, as those of states have."""
    shape = geometry()
    rows = [replace(row, groups=(0, 1)) for row in shape.rows]
    rows[1] = replace(rows[1], groups=(0,))
    rank = Rank(shape=replace(shape, rows=tuple(rows)))
    orders = (
        save(1, 3, (7, 2)),
        replace(save(2, 4, (9,)), group=1),
    )
    rank.run(StepPlan(0, saves=orders))
    receipts = {r.transfer: r.moved_bytes for r in rank.settle(2)}
    assert receipts == {1: 2 * sum(PAGES), 2: PAGES[0] + PAGES[2]}
    before = {block: rank.pages((block,)) for block in (7, 2, 9, 11, 5, 6)}
    parts = (pages(3, (11, 5)), pages(4, (6,), group=1))
    order = LoadOrder(TransferId(3), "r", mode, parts, 60.0)
    rank.run(StepPlan(0, loads=(order,), forward=mode is LoadMode.LAYERWISE, outstanding=True))
    (receipt,) = rank.settle(1)
    assert receipt.outcome is Outcome.DONE
    assert receipt.moved_bytes == 2 * sum(PAGES) + PAGES[0] + PAGES[2]
    assert rank.pages((11, 5)) == rank.pages((7, 2))
    assert rank.pages((6,)) == [before[9][0], before[6][1], before[9][2]]
    rank.executor.close()


def test_a_load_with_nothing_in_some_rows_ends(rank: Rank) -> None:
    rows = [replace(row, groups=(i % 2,)) for i, row in enumerate(rank.geometry.rows)]
    only = Rank(shape=replace(rank.geometry, rows=tuple(rows)))
    for number, mode in enumerate(LoadMode):
        order = LoadOrder(TransferId(number), "r", mode, (pages(4, (6,), group=1),), 60.0)
        only.run(StepPlan(0, loads=(order,), outstanding=True))
        (receipt,) = only.settle(1)
        assert (receipt.outcome, receipt.moved_bytes) == (Outcome.DONE, PAGES[1])
    only.executor.close()


@pytest.mark.usefixtures("by_rows")
def test_a_row_is_saved_when_all_of_its_layers_have_written_it() -> None:
    """In whatever order they run."""
    shape = geometry()
    rows = [replace(row, layers=(f"{i}.linear", f"{i}.full")) for i, row in enumerate(shape.rows)]
    rank = Rank(shape=replace(shape, rows=tuple(rows)))
    rank.executor.begin_step(StepPlan(0, saves=(save(1, 3, (7, 2)),)))
    rank.executor.start_loads()
    rank.executor.layer_written("0.full")
    time.sleep(0.05)
    assert not [span for span in rank.timeline.spans() if span.lane is Lane.SAVE]
    rank.executor.layer_written("0.linear")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(
        span.lane is Lane.SAVE for span in rank.timeline.spans()
    ):
        time.sleep(0.001)
    assert [span.row for span in rank.timeline.spans() if span.lane is Lane.SAVE] == [0]
    rank.executor.end_step()
    rank.settle(1)
    rank.executor.close()


def test_a_small_save_is_one_copy_when_the_step_is_over(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer is asked, and no row has a job of its own."""
    copy, copied = rank.mover.save, []

    def noted(rows: Sequence[int], *arguments: Any, **how: Any) -> Fence:
        copied.append(list(rows))
        return copy(rows, *arguments, **how)

    monkeypatch.setattr(rank.mover, "save", noted)
    rank.executor.begin_step(StepPlan(1, saves=(save(1, 3, (7, 2)), save(2, 4, (4,)))))
    assert not rank.executor.moves_rows
    for layer in rank.layers:
        rank.executor.layer_written(layer)
    assert not copied
    rank.executor.end_step()
    assert len(rank.settle(2)) == 2
    assert copied == [[0, 1, 2]]


@pytest.mark.usefixtures("by_rows")
def test_the_last_copy_of_a_save_is_waited_for_alone(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device copies them in order, and each wait is a thread that wakes up."""
    fences: list[LateFence] = []

    def late(*_: Any, **__: Any) -> Fence:
        fences.append(LateFence())
        return fences[-1]

    monkeypatch.setattr(rank.mover, "save", late)
    executor = rank.executor
    monkeypatch.setattr(executor, "_saver", replace(executor._saver, timeline=None))
    rank.run(StepPlan(1, saves=(save(1, 3, (7, 2)),)))
    rank.settle(1)
    assert [fence.waits for fence in fences] == [0, 0, 1]


class LateFence(Fence):
    """A device that runs behind its host."""

    over = False
    waits = 0

    def wait(self) -> None:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        self.waits += 1

    def passed(self) -> bool:
        return self.over


def late_loads(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> LateFence:
    """Have all loads of ``rank`` end with the fence that is returned."""
    fence, inner = LateFence(), rank.mover.load

    def late(*arguments: Any, **how: Any) -> Fence:
        inner(*arguments, **how)
        return fence

    monkeypatch.setattr(rank.mover, "load", late)
    return fence


def test_a_layerwise_load_is_reported_when_the_device_has_carried_it_out(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots are leased until then, and another process may share them."""
    rank.save(3, (7, 2))
    fence = late_loads(rank, monkeypatch)
    rank.run(StepPlan(0, loads=(load(2, (11, 5)),)))
    assert rank.executor.collect().receipt.transfers == ()
    fence.over = True
    (receipt,) = rank.settle(1)
    assert receipt.outcome is Outcome.DONE


@pytest.mark.usefixtures("by_rows")
def test_a_save_that_is_copied_before_a_load_of_its_step_has_failed_fails_too(rank: Rank) -> None:
    rank.save(3, (7, 2))
    rank.mover.bad_row = len(PAGES) - 1
    orders = StepPlan(9, loads=(load(2, (11, 5)),), saves=(save(3, 4, (11, 5)),))
    rank.executor.begin_step(orders)
    rank.executor.start_loads()
    for row in rank.geometry.rows:
        rank.executor.wait_layer(row.layers[0])
        rank.executor.layer_written(row.layers[0])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(PAGES) > sum(
        span.lane is Lane.SAVE and span.step == 9 for span in rank.timeline.spans()
    ):
        time.sleep(0.001)
    rank.executor.end_step()
    assert {receipt.outcome for receipt in rank.settle(2)} == {Outcome.FAILED}


def test_failures_are_known_when_the_engine_asks_before_it_ends_the_step(rank: Rank) -> None:
    rank.save(3, (7, 2))
    rank.mover.bad_row = 2
    rank.executor.begin_step(StepPlan(1, loads=(load(2, (11, 5)),)))
    rank.executor.start_loads()
    for layer in rank.layers:
        rank.executor.wait_layer(layer)
    assert rank.executor.collect().failed == {"r"}
    rank.executor.end_step()
    assert rank.executor.collect().failed == frozenset()


def test_a_failed_parked_load_still_wakes_its_request(rank: Rank) -> None:
    rank.save(3, (7, 2))
    rank.mover.bad_row = 0
    rank.run(StepPlan(0, loads=(load(2, (11, 5), mode=LoadMode.PARKED),)))
    outcomes = until_arrived(rank)
    assert outcomes.arrived == outcomes.failed == {"r"}


def test_a_parked_load_that_never_ends_wakes_its_request_at_the_deadline(rank: Rank) -> None:
    rank.save(3, (7, 2))
    before = rank.pages((11, 5))
    rank.mover.pinning = threading.Event()
    rank.run(StepPlan(0, loads=(load(2, (11, 5), mode=LoadMode.PARKED, timeout=0.05),)))
    outcomes = until_arrived(rank)
    assert outcomes.arrived == outcomes.failed == {"r"}
    assert outcomes.receipt.transfers[0].reason == "deadline"
    rank.mover.pinning.set()
    rank.executor.close()
    assert rank.pages((11, 5)) == before


def test_closing_ends_loads_under_way_and_all_threads() -> None:
    before = set(threading.enumerate())
    rank = Rank()
    rank.run(StepPlan(0, loads=(load(2, (11, 5), mode=LoadMode.PARKED),)))
    rank.executor.close()
    assert set(threading.enumerate()) <= before


def test_an_idle_step_waits_for_news_but_not_for_long(rank: Rank) -> None:
    rank.mover.pinning = threading.Event()
    rank.run(StepPlan(0, loads=(load(2, (11, 5), mode=LoadMode.PARKED),)))
    rank.run(StepPlan(0, forward=False, outstanding=True))
    assert rank.executor.collect().arrived == frozenset()
    rank.mover.pinning.set()
    rank.settle(1)


def until_arrived(rank: Rank) -> Outcomes:
    """Collect until a request may go on."""
    deadline = time.monotonic() + 60
    while not (outcomes := rank.executor.collect()).arrived and time.monotonic() < deadline:
        time.sleep(0.001)
    return outcomes


def test_before_the_engines_memory_goes_the_device_has_carried_out_every_copy(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank.save(3, (7, 2))
    fence = late_loads(rank, monkeypatch)
    rank.run(StepPlan(0, loads=(load(2, (11, 5)),)))
    assert rank.executor.collect().receipt.transfers == ()
    quiet = threading.Event()
    thread = threading.Thread(target=lambda: (rank.executor.quiet(), quiet.set()))
    thread.start()
    assert not quiet.wait(0.05)
    fence.over = True
    assert quiet.wait(60)
    thread.join()


# -- far tiers -----------------------------------------------------------------------------------

FAR = TierName("far")
KEY = ChunkKey(bytes(range(KEY_BYTES)))


def moves(
    *,
    drops: tuple[int, ...] = (),
    outward: tuple[Move, ...] = (),
    inward: tuple[Move, ...] = (),
    asks: tuple[Ask, ...] = (),
) -> StepPlan:
    """A plan of an engine that runs nothing."""
    return StepPlan(0, tiers=(TierOrders(FAR, drops, outward, inward, asks),), forward=False)


def test_a_chunk_goes_out_and_comes_back_to_another_slot(rank: Rank) -> None:
    rank.save(3, (7, 2))
    expected = rank.pages((7, 2))
    rank.run(moves(outward=(Move(TransferId(2), KEY, near=3, far=1),)))
    (written,) = rank.settle(1)
    assert (written.outcome, written.moved_bytes) == (Outcome.DONE, rank.geometry.chunk_bytes)
    report = rank.executor.report()
    (tier,) = report.tiers
    assert (report.near_slots, tier.name, tier.slots) == (10, FAR, 4)
    assert tier.stored is not None
    assert tier.stored.slots.tolist() == [1]
    assert tier.stored.keys is not None
    assert tier.stored.keys.tobytes() == KEY
    rank.run(moves(inward=(Move(TransferId(3), KEY, near=8, far=1),)))
    (read,) = rank.settle(1)
    assert (read.outcome, read.moved_bytes) == (Outcome.DONE, rank.geometry.chunk_bytes)
    rank.run(StepPlan(0, loads=(load(4, (11, 5), slot=8),)))
    rank.settle(1)
    assert rank.pages((11, 5)) == expected


def test_control_learns_how_much_of_near_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlakyMover, "pinned", NearSlots(2, 10))
    rank = Rank()
    assert rank.executor.report().near == NearSlots(2, 10)
    assert rank.executor.collect().receipt.is_empty
    for now in (NearSlots(5, 10), NearSlots(7, 7)):
        rank.mover.pinned = now
        assert rank.executor.collect().receipt.near == now
        assert rank.executor.collect().receipt.is_empty, "once said it is known"
    rank.executor.close()


def test_what_is_dropped_is_gone(rank: Rank) -> None:
    rank.save(3, (7, 2))
    rank.run(moves(outward=(Move(TransferId(2), KEY, near=3, far=1),)))
    rank.settle(1)
    rank.run(moves(drops=(1,), asks=(Ask(TransferId(3), (KEY,)),)))
    rank.settle(1)
    rank.run(moves(inward=(Move(TransferId(4), KEY, near=8, far=1),)))
    (receipt,) = rank.settle(1)
    assert (receipt.outcome, receipt.reason, receipt.lost) == (Outcome.FAILED, "gone", True)


def test_closing_writes_what_is_queued_and_closes_the_store() -> None:
    rank = Rank()
    rank.save(3, (7, 2))
    rank.run(moves(outward=(Move(TransferId(2), KEY, near=3, far=1),)))
    rank.executor.close()
    assert rank.store.closed
    assert [key for key, _ in rank.store.shelf.held.values()] == [KEY]


def test_a_follower_answers_for_its_leader_at_once() -> None:
    rank = Rank(follows=True)
    move = Move(TransferId(2), KEY, near=3, far=1)
    plan = moves(
        outward=(move,),
        inward=(replace(move, transfer=TransferId(3)),),
        asks=(Ask(TransferId(4), (KEY, KEY)),),
    )
    rank.executor.begin_step(plan)
    receipts = rank.executor.collect().receipt.transfers
    assert {r.transfer: (r.outcome, r.moved_bytes, r.present) for r in receipts} == {
        2: (Outcome.DONE, 0, b""),
        3: (Outcome.DONE, 0, b""),
        4: (Outcome.DONE, 0, b"\1\1"),
    }
    assert rank.executor.report().tiers == ()
    rank.executor.close()


@pytest.mark.usefixtures("by_rows")
def test_layers_are_asked_when_a_step_saves_and_pushes_nothing() -> None:
    rank = Rank()
    rank.executor.begin_step(StepPlan(1, saves=(save(1, 0, (0,)),)))
    rank.executor.start_loads()
    assert rank.executor.moves_rows
    rank.executor.end_step()
    rank.settle(1)
    rank.executor.begin_step(StepPlan(2))
    assert not rank.executor.moves_rows
    rank.executor.end_step()
    rank.executor.close()

"""Promise: a copy that cannot be right is refused before a byte moves; host memory is there at once
and made resident behind the scenes, from the first slots on.
"""

from __future__ import annotations

import gc
import itertools
import logging
import mmap
import os
import platform
import re
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lamina_kv.data import numa
from lamina_kv.data.movers import Fence, Mover, cpu, host_memory, make_mover, pinning, populating
from lamina_kv.data.movers.host_memory import HostMemory
from lamina_kv.data.near import NearSlab
from lamina_kv.data.shared_memory import MemoryFile
from lamina_kv.geometry import CacheGeometry, Row
from lamina_kv.values import format_size

PAGE, BLOCKS, PER_SLOT, SLOTS = 256, 16, 4, 5
PADDED = Row(("b",), 0, BLOCKS * PAGE, PAGE + 8, PAGE)
GEOMETRY = CacheGeometry(
    rows=(Row(("a",), 0, 0, PAGE, PAGE), PADDED),
    num_blocks=BLOCKS,
    block_tokens=16,
    chunk_tokens=16 * PER_SLOT,
    allocation_bytes=(BLOCKS * (2 * PAGE + 8),),
)
NEAR_PAGES = SLOTS * PER_SLOT
Ids = npt.NDArray[np.int64]


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.fixture
def engine() -> torch.Tensor:
    return random_bytes(GEOMETRY.allocation_bytes[0])


@pytest.fixture
def mover(engine: torch.Tensor) -> Iterator[Mover]:
    mover = make_mover(GEOMETRY, [engine])
    yield mover
    mover.close()


@pytest.fixture
def near(mover: Mover) -> NearSlab:
    near = NearSlab(GEOMETRY, SLOTS * GEOMETRY.object_bytes, mover.allocate_host)
    near.memory.copy_(random_bytes(len(near.memory)))
    return near


def page(near: NearSlab, row: int, index: int) -> torch.Tensor:
    """A near page, by the contract of a chunk's object."""
    slot, block = divmod(index, PER_SLOT)
    start = GEOMETRY.extent_offsets[row] + block * PAGE
    return torch.from_numpy(near.object(slot)[start : start + PAGE])


def block(engine: torch.Tensor, row: int, index: int) -> torch.Tensor:
    shape = GEOMETRY.rows[row]
    start = shape.offset + index * shape.block_stride
    return engine[start : start + PAGE]


ORDERS = {
    "run": np.arange(3, 13),
    "reverse": np.arange(3, 13)[::-1].copy(),
    "two runs": np.array([9, 10, 11, 12, 13, 2, 3, 4, 5, 6]),
    "slots": np.array([12, 13, 14, 15, 0, 1, 2, 3, 8, 9]),
    "scattered": np.array([15, 2, 9, 0, 4, 13, 7, 11, 1, 6]),
}


@pytest.mark.parametrize("row", [0, 1], ids=["packed", "padded"])
@pytest.mark.parametrize("blocks", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("pages", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("stretch", [PAGE, cpu.STRETCH_BYTES], ids=["long pages", "short pages"])
def test_pages_go_where_they_are_told(
    mover: Mover,
    engine: torch.Tensor,
    near: NearSlab,
    row: int,
    blocks: Ids,
    pages: Ids,
    stretch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "STRETCH_BYTES", stretch)
    before = near.memory.clone()
    mover.save([row], mover.pairs(near, pages, blocks), mover.fence_compute()).wait()
    for i in range(len(pages)):
        assert torch.equal(page(near, row, pages[i]), block(engine, row, blocks[i]))
    saved = [page(near, row, index).clone() for index in pages]
    for index in pages:
        page(near, row, index)[:] = 0
    elsewhere = near.memory != 0
    assert torch.equal(near.memory[elsewhere], before[elsewhere])
    for index, content in zip(pages, saved, strict=True):
        page(near, row, index)[:] = content
    engine.fill_(0)
    pairs = mover.pairs(near, pages, blocks[::-1].copy())
    mover.load([row], pairs, mover.fence_compute()).wait()
    for i in range(len(pages)):
        assert torch.equal(saved[i], block(engine, row, blocks[-1 - i]))
    assert int(engine.count_nonzero()) == sum(int(content.count_nonzero()) for content in saved)


def even_rows(count: int) -> CacheGeometry:
    """As many rows of one form, all at one distance."""
    size = BLOCKS * PAGE
    rows = tuple(Row((str(row),), 0, row * size, PAGE, PAGE) for row in range(count))
    return CacheGeometry(rows, BLOCKS, 16, 16 * PER_SLOT, (count * size,))


def calls_of_a_copy(rows: int, blocks: Ids, *, is_load: bool) -> int:
    """Calls of Python and of numpy that a copy of all rows takes."""
    geometry = even_rows(rows)
    mover = make_mover(geometry, [random_bytes(geometry.allocation_bytes[0])])
    near = NearSlab(geometry, SLOTS * geometry.object_bytes, mover.allocate_host)
    written, every = mover.fence_compute(), tuple(range(rows))
    move = mover.load if is_load else mover.save
    calls: list[str] = []
    for _ in range(2):  # where rows are is found out once
        pairs = mover.pairs(near, ORDERS["slots"], blocks)
        calls.clear()
        sys.setprofile(lambda frame, event, argument: calls.append(event))
        try:
            move(every, pairs, written)
        finally:
            sys.setprofile(None)
    mover.close()
    return len(calls)


@pytest.mark.parametrize("is_load", [True, False])
@pytest.mark.parametrize("blocks", ORDERS.values(), ids=ORDERS)
def test_a_copy_of_more_rows_takes_no_more_calls(blocks: Ids, is_load: bool) -> None:
    few, many = (calls_of_a_copy(rows, blocks, is_load=is_load) for rows in (2, 60))
    assert few == many > 0


IDS = np.array([1, 2, 3])


def copy(
    mover: Mover, is_load: bool, row: int, near: NearSlab, pages: Ids, blocks: Ids, after: Fence
) -> Fence:
    pairs = mover.pairs(near, pages, blocks)
    return (mover.load if is_load else mover.save)([row], pairs, after)


@pytest.mark.parametrize("is_load", [True, False], ids=["load", "save"])
@pytest.mark.parametrize(
    ("row", "pages", "blocks", "error"),
    [
        (0, IDS, np.array([1, 2, BLOCKS]), IndexError),
        (0, IDS, np.array([1, 2, -1]), IndexError),
        (0, np.array([0, 1, NEAR_PAGES]), IDS, IndexError),
        (0, np.array([0, 1, -1]), IDS, IndexError),
        (2, IDS, IDS, IndexError),
        (-1, IDS, IDS, IndexError),
        (0, IDS, IDS[:2], ValueError),
        (0, IDS.astype(np.int32), IDS, ValueError),
        (0, IDS, IDS.astype(np.float64), ValueError),
        (0, IDS[:, None], IDS[:, None], ValueError),
    ],
)
def test_wrong_ids_are_refused_before_a_byte_moves(
    mover: Mover,
    engine: torch.Tensor,
    near: NearSlab,
    is_load: bool,
    row: int,
    pages: Ids,
    blocks: Ids,
    error: type[Exception],
) -> None:
    before = engine.clone(), near.memory.clone()
    with pytest.raises(error):
        copy(mover, is_load, row, near, pages, blocks, mover.fence_compute())
    assert torch.equal(engine, before[0])
    assert torch.equal(near.memory, before[1])


@pytest.mark.parametrize("is_load", [True, False], ids=["load", "save"])
def test_a_slab_of_another_cache_is_refused(mover: Mover, is_load: bool) -> None:
    other = replace(GEOMETRY, chunk_tokens=16)
    near = NearSlab(other, other.object_bytes, mover.allocate_host)
    with pytest.raises(ValueError, match="another cache"):
        copy(mover, is_load, 0, near, IDS[:0], IDS[:0], mover.fence_compute())


def test_a_slab_smaller_than_a_chunk_says_what_it_needs(mover: Mover) -> None:
    size = GEOMETRY.object_bytes
    with pytest.raises(ValueError, match=rf"host\.capacity: .* use at least {format_size(size)}"):
        NearSlab(GEOMETRY, size - 1, mover.allocate_host)


def test_a_slot_is_the_chunks_object(mover: Mover, engine: torch.Tensor, near: NearSlab) -> None:
    near.memory.fill_(0)
    pairs = mover.pairs(near, np.arange(8, 12), np.arange(4))
    mover.save([0, 1], pairs, mover.fence_compute()).wait()
    held = near.object(2)
    assert held.ctypes.data % 4096 == 0
    rows = [engine[i * BLOCKS * PAGE :] for i in range(2)]
    packed = rows[0][: 4 * PAGE]
    padded = torch.cat([rows[1][i * (PAGE + 8) :][:PAGE] for i in range(4)])
    content = bytes(64) + packed.numpy().tobytes() + padded.numpy().tobytes()
    assert held.tobytes() == content + bytes(len(held) - len(content))
    assert int(near.memory.count_nonzero()) == int(np.count_nonzero(held))


@pytest.mark.parametrize(
    "allocations",
    [
        [],
        [random_bytes(GEOMETRY.allocation_bytes[0] - 1)],
        [random_bytes(GEOMETRY.allocation_bytes[0])] * 2,
        [random_bytes(1, GEOMETRY.allocation_bytes[0])],
        [random_bytes(GEOMETRY.allocation_bytes[0]).view(torch.int8)],
        [random_bytes(GEOMETRY.allocation_bytes[0]).to("meta")],
    ],
    ids=["none", "too small", "too many", "not flat", "dtype", "device"],
)
def test_allocations_that_do_not_fit_the_geometry_are_refused(
    allocations: list[torch.Tensor],
) -> None:
    with pytest.raises(ValueError, match=r"alloc|tensors|mover"):
        make_mover(GEOMETRY, allocations)


class Gate(Fence):
    """A fence that a test opens."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.asked = threading.Event()

    def wait(self) -> None:
        self.asked.set()
        assert self.opened.wait(30)

    def passed(self) -> bool:
        return self.opened.is_set()


@pytest.mark.parametrize("is_load", [True, False], ids=["load", "save"])
def test_nothing_is_copied_before_the_fence(
    mover: Mover, engine: torch.Tensor, near: NearSlab, is_load: bool
) -> None:
    before = engine.clone(), near.memory.clone()
    gate = Gate()
    thread = threading.Thread(target=copy, args=(mover, is_load, 0, near, IDS, IDS, gate))
    thread.start()
    assert gate.asked.wait(30)
    assert torch.equal(engine, before[0])
    assert torch.equal(near.memory, before[1])
    gate.opened.set()
    thread.join()
    assert torch.equal(page(near, 0, 1), block(engine, 0, 1))


def test_compute_is_held_until_the_fence(mover: Mover) -> None:
    gate = Gate()
    thread = threading.Thread(target=mover.hold_compute, args=(gate,))
    thread.start()
    assert gate.asked.wait(30)
    assert thread.is_alive()
    gate.opened.set()
    thread.join(30)
    assert not thread.is_alive()


def test_host_memory_is_page_aligned_zeros_and_outlives_its_mover(mover: Mover) -> None:
    size = 3 * mmap.PAGESIZE + 5
    memory = mover.allocate_host(size)
    assert memory.shape == (size,)
    assert memory.dtype == torch.uint8
    assert memory.data_ptr() % mmap.PAGESIZE == 0
    assert int(memory.count_nonzero()) == 0
    mover.close()
    mover.close()
    memory.fill_(7)
    assert int(memory.sum()) == 7 * size


def test_host_memory_that_no_machine_has_is_refused(mover: Mover) -> None:
    with pytest.raises(OSError, match=r"lower host\.capacity"):
        mover.allocate_host(1 << 60)


@pytest.mark.parametrize("size", [0, -1])
def test_host_memory_of_no_size_is_refused(mover: Mover, size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        mover.allocate_host(size)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Host memory is made resident and pinned in steps of a page."""
    monkeypatch.setattr(populating, "PIECE", mmap.PAGESIZE)
    for step in ("FIRST_STEP", "LARGEST_STEP"):
        monkeypatch.setattr(pinning, step, mmap.PAGESIZE)
    return mmap.PAGESIZE


class Pins:
    """Pins memory for a device that is not there.

    Attributes:
        held: bytes of each range that is pinned, by where it begins.
        let_go: where ranges began that were unpinned.
        allowed: how many ranges may still be pinned; None for any number.
        turns: what each range waits for; None for nothing.
    """

    def __init__(
        self, allowed: int | None = None, turns: threading.Semaphore | None = None
    ) -> None:
        self.held: dict[int, int] = {}
        self.let_go: list[int] = []
        self.allowed = allowed
        self.turns = turns
        self.begun = threading.Semaphore(0)

    def register(self, address: int, length: int) -> None:
        self.begun.release()
        assert self.turns is None or self.turns.acquire(timeout=30)
        if self.allowed == len(self.held):
            raise RuntimeError("out of memory")
        self.held[address] = length

    def unregister(self, address: int) -> None:
        del self.held[address]
        self.let_go.append(address)


def test_host_memory_is_resident_before_it_is_pinned_once_in_order_and_whole(
    pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many threads make it resident, and in whichever order they are done."""
    resident: set[int] = set()
    late, size = threading.Event(), 8 * pieces - 100

    def populate(address: int, length: int) -> None:
        start = address - memory.tensor.data_ptr()
        assert start + length <= size
        if start == 2 * pieces:
            assert late.wait(30)
        resident.add(start)
        if start == 7 * pieces:
            late.set()

    class InOrder(Pins):
        def register(self, address: int, length: int) -> None:
            start = address - memory.tensor.data_ptr()
            assert start in resident, "pinning it faults it in, on one core"
            super().register(address, length)

    ready = threading.Event()
    monkeypatch.setattr(populating, "populate", lambda *piece: (ready.wait(30), populate(*piece)))
    pins = InOrder()
    memory = HostMemory(size, pinner=pins, populators=3)
    ready.set()
    memory.wait()
    base = memory.tensor.data_ptr()
    expected = {base + i * pieces: min(pieces, size - i * pieces) for i in range(8)}
    assert list(pins.held.items()) == list(expected.items())
    assert list(memory.pins) == [i * pieces for i in range(8)]
    assert resident == {i * pieces for i in range(8)}
    memory.close()


def test_steps_grow_while_the_driver_is_quick_and_shrink_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, seconds = 0.0, {1: 0.0, 2: 0.015, 4: 0.5}  # of one call, by its pages
    page = mmap.PAGESIZE

    class Slow(Pins):
        def register(self, address: int, length: int) -> None:
            nonlocal clock
            clock += seconds[length // page]
            super().register(address, length)

    monkeypatch.setattr(pinning, "FIRST_STEP", page)
    monkeypatch.setattr(pinning, "LARGEST_STEP", 4 * page)
    monkeypatch.setattr(pinning, "time", SimpleNamespace(perf_counter=lambda: clock))
    pins = Slow()
    memory = HostMemory(7 * page, pinner=pins)
    memory.wait()
    assert [length // page for length in pins.held.values()] == [1, 2, 2, 2]
    seconds[2] = 0.0
    pins = Slow()
    memory = HostMemory(10 * page, pinner=pins)
    memory.wait()
    assert [length // page for length in pins.held.values()] == [1, 2, 4, 2, 1]


def test_the_first_bytes_are_waited_for_alone(pieces: int) -> None:
    pins = Pins(turns=threading.Semaphore(0))
    memory = HostMemory(3 * pieces, pinner=pins)
    assert pins.begun.acquire(timeout=30)
    memory.wait(0)
    waiter = threading.Thread(target=memory.wait, args=(pieces + 1,))
    waiter.start()
    pins.turns.release()
    assert pins.begun.acquire(timeout=30)
    memory.wait(pieces)
    assert waiter.is_alive(), "the second piece is not there"
    assert (memory.ready, memory.most) == (pieces, 3 * pieces)
    pins.turns.release()
    waiter.join(30)
    assert not waiter.is_alive()
    pins.turns.release()
    memory.wait()
    memory.close()


def test_closing_stops_at_the_next_range_and_unpins_what_there_is(pieces: int) -> None:
    pins = Pins(turns=threading.Semaphore(0))
    memory = HostMemory(1 << 30, pinner=pins)
    assert pins.begun.acquire(timeout=30)
    closer = threading.Thread(target=memory.close)
    closer.start()
    closer.join(0.01)
    assert closer.is_alive(), "the driver is still at it"
    pins.turns.release()
    closer.join(30)
    assert not pins.held
    assert pins.let_go == [memory.tensor.data_ptr()]
    with pytest.raises(RuntimeError, match="closed"):
        memory.wait()
    memory.close()
    assert len(pins.let_go) == 1


def test_who_ends_with_its_memory_leaves_the_pinning_to_the_end(pieces: int) -> None:
    pins = Pins()
    memory = HostMemory(4 * pieces, pinner=pins)
    memory.wait()
    mapping = weakref.ref(memory._mapping)
    memory.close(process_ends=True)
    del memory
    gc.collect()
    assert not pins.let_go
    assert mapping() is not None, "pinned pages would outlive their addresses"
    host_memory._kept.remove(mapping())


@pytest.mark.parametrize(
    ("allowed", "says"),
    [(2, r"only 8 KiB of 16 KiB .*out of memory.*smaller.*host\.capacity"), (0, r"tier is off")],
)
def test_what_cannot_be_pinned_is_said_once_and_the_rest_stays_usable(
    pieces: int, caplog: pytest.LogCaptureFixture, allowed: int, says: str
) -> None:
    pins = Pins(allowed)
    memory = HostMemory(4 * 4096, pinner=pins)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=says):
            memory.wait()
    memory.wait(allowed * pieces)
    assert (memory.ready, memory.most) == (allowed * pieces, allowed * pieces)
    (record,) = caplog.records
    assert re.search(says, record.message)
    memory.close()
    assert len(pins.let_go) == allowed


def test_where_a_large_piece_cannot_be_pinned_smaller_ones_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    page = mmap.PAGESIZE
    for step, size in (("FIRST_STEP", 8), ("LARGEST_STEP", 8), ("LEAST_STEP", 1)):
        monkeypatch.setattr(pinning, step, size * page)

    class Small(Pins):
        def register(self, address: int, length: int) -> None:
            if length > 2 * page or sum(self.held.values()) + length > 7 * page:
                raise RuntimeError("out of memory")
            super().register(address, length)

    pins = Small()
    memory = HostMemory(12 * page, pinner=pins)
    with pytest.raises(RuntimeError, match=rf"only {7 * page >> 10} KiB of .*out of memory"):
        memory.wait()
    assert [length // page for length in pins.held.values()] == [2, 2, 2, 1]
    assert memory.ready == 7 * page
    assert len(caplog.records) == 1
    memory.close()
    assert not pins.held


def test_a_driver_that_hangs_is_said_once_and_holds_nobody_for_ever(
    pieces: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pinning, "STUCK_SECONDS", 0.05)
    monkeypatch.setattr(host_memory, "LOOK_SECONDS", 0.01)
    pins = Pins(turns=threading.Semaphore(1))
    memory = HostMemory(3 * pieces, pinner=pins)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="driver has not returned"):
            memory.wait()
        assert memory.say_if_stuck()
    (record,) = caplog.records
    assert f"stays at {pieces} of {3 * pieces} bytes" in record.message
    assert "restart the engine" in record.message
    assert not memory.close(timeout=0.01)
    mapping = host_memory._kept.pop()
    assert pins.held, "what the driver still works at is neither unpinned nor unmapped"
    pins.turns.release(3)
    memory._thread.join(30)
    assert not memory.say_if_stuck()
    del mapping


def test_what_cannot_be_made_resident_is_said_and_not_pinned(
    pieces: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def populate(_: int, __: int) -> None:
        if next(number) == 2:
            raise OSError("no more memory")

    number = itertools.count()
    monkeypatch.setattr(populating, "populate", populate)
    pins = Pins()
    memory = HostMemory(4 * 4096, pinner=pins, populators=1)
    with pytest.raises(RuntimeError, match=r"only 8 KiB of 16 KiB .*no more memory"):
        memory.wait()
    assert len(pins.held) == 2
    assert len(caplog.records) == 1
    memory.close()


def test_memory_of_the_devices_node_is_asked_for_before_it_is_touched(
    pieces: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []

    def prefer(*wanted: int) -> None:
        asked.append(wanted)
        assert not touched.is_set()
        raise PermissionError("a container")

    touched = threading.Event()
    monkeypatch.setattr(numa, "prefer", prefer)
    monkeypatch.setattr(numa, "cores_of", lambda node: frozenset({7}))
    monkeypatch.setattr(populating, "populate", lambda *_: touched.set())
    monkeypatch.setattr(host_memory, "usable_cores", lambda: frozenset({6, 7}))
    chosen: list[frozenset[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: chosen.append(cores))
    memory = HostMemory(2 * pieces, node=1, populators=2)
    memory.wait()
    assert asked == [(memory.tensor.data_ptr(), 2 * pieces, 1)]
    assert chosen == [{7}] * 3, "who touches it first is there, whether or not it was refused"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    file = MemoryFile.create()
    file.map(pieces, writable=True)
    HostMemory(pieces, file=file, node=1).wait()
    assert len(asked) == 1, "it is where its first process has put it"
    file.close()


def test_host_memory_knows_its_own() -> None:
    memory = HostMemory(8192)
    assert memory.holds(memory.tensor[:10])
    assert memory.holds(memory.tensor[8191:])
    assert not memory.holds(torch.zeros(10, dtype=torch.uint8))


def test_a_forked_child_that_drops_its_parents_memory_keeps_its_own() -> None:
    size = 64 << 20
    memory = HostMemory(size)
    memory.close()
    child = os.fork()
    if not child:
        # The kernel gives it the addresses that are free here: those of the parent's memory.
        own = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        del memory
        gc.collect()
        own[0] = 1
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(
    tuple(map(int, platform.release().split(".")[:2])) < (5, 14),
    reason="Linux before 5.14 cannot populate memory",
)
def test_populating_makes_memory_resident() -> None:
    def resident() -> int:
        # Of memory without a file: of files, the kernel takes back what it needs elsewhere.
        with open("/proc/self/status") as status:
            (line,) = (line for line in status if line.startswith("RssAnon:"))
            return int(line.split()[1]) << 10

    size = 64 << 20
    before = resident()
    memory = HostMemory(size, populators=2)
    memory.wait()
    assert resident() - before > 0.9 * size
    assert int(memory.tensor[:: mmap.PAGESIZE].count_nonzero()) == 0

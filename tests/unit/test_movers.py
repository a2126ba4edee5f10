"""Promise: a copy that cannot be right is refused before a byte moves; host memory is there at once
and made resident behind the scenes, from the first slots on.
"""

from __future__ import annotations

import gc
import mmap
import os
import platform
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lamina_kv.data.movers import Fence, Mover, make_mover
from lamina_kv.data.movers.host_memory import HostMemory, populate
from lamina_kv.data.near import NearSlab
from lamina_kv.geometry import CacheGeometry, Row

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
def test_pages_go_where_they_are_told(
    mover: Mover, engine: torch.Tensor, near: NearSlab, row: int, blocks: Ids, pages: Ids
) -> None:
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
    with pytest.raises(ValueError, match=rf"host\.capacity: {size - 1} .* one chunk of {size}"):
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


def test_host_memory_is_committed_once_in_order_and_whole() -> None:
    pieces: list[tuple[int, int]] = []
    memory = HostMemory(10_000, 4096, lambda address, length: pieces.append((address, length)))
    memory.wait()
    base = memory.tensor.data_ptr()
    assert pieces == [(base, 4096), (base + 4096, 4096), (base + 8192, 1808)]


def test_host_memory_is_given_before_it_is_committed_and_closing_stops_at_the_next_piece() -> None:
    begun, go_on = threading.Event(), threading.Event()
    pieces: list[int] = []

    def commit(_: int, length: int) -> None:
        pieces.append(length)
        begun.set()
        assert go_on.wait(30)

    memory = HostMemory(4 << 30, 1 << 30, commit)
    assert begun.wait(30)
    closer = threading.Thread(target=memory.close)
    closer.start()
    assert memory._closing.wait(30)
    assert closer.is_alive()
    go_on.set()
    closer.join(30)
    assert pieces == [1 << 30]
    with pytest.raises(RuntimeError, match="closed"):
        memory.wait()


def test_the_first_bytes_are_waited_for_alone() -> None:
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def commit(_: int, __: int) -> None:
        begun.release()
        assert go_on.acquire(timeout=30)

    memory = HostMemory(3 * 4096, 4096, commit)
    assert begun.acquire(timeout=30)
    memory.wait(0)
    waiter = threading.Thread(target=memory.wait, args=(4097,))
    waiter.start()
    go_on.release()
    assert begun.acquire(timeout=30)
    memory.wait(4096)
    assert waiter.is_alive(), "the second piece is not there"
    go_on.release()
    waiter.join(30)
    assert not waiter.is_alive()
    go_on.release()
    memory.wait()


def test_what_was_committed_before_an_error_stays_usable() -> None:
    def commit(address: int, _: int) -> None:
        if address != memory.tensor.data_ptr():
            raise OSError("no more memory")

    with pytest.MonkeyPatch.context() as patch:  # the thread begins when the memory has a name
        started: list[Callable[[], None]] = []
        patch.setattr(threading.Thread, "start", lambda thread: started.append(thread.run))
        memory = HostMemory(2 * 4096, 4096, commit)
    started[0]()
    memory.wait(4096)
    with pytest.raises(RuntimeError, match="no more memory"):
        memory.wait(4097)


def test_host_memory_that_cannot_be_committed_says_which_key_to_change() -> None:
    def commit(_: int, __: int) -> None:
        raise OSError("no memory")

    memory = HostMemory(4096, 4096, commit)
    with pytest.raises(RuntimeError, match=r"no memory.*host\.capacity"):
        memory.wait()


def test_host_memory_knows_its_own() -> None:
    memory = HostMemory(8192, 4096, lambda _, __: None)
    assert memory.holds(memory.tensor[:10])
    assert memory.holds(memory.tensor[8191:])
    assert not memory.holds(torch.zeros(10, dtype=torch.uint8))


def test_a_forked_child_that_drops_its_parents_memory_keeps_its_own() -> None:
    size = 64 << 20
    memory = HostMemory(size, size, lambda _, __: None)
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
    memory = HostMemory(size, size, populate)
    memory.wait()
    assert resident() - before > 0.9 * size
    assert int(memory.tensor[:: mmap.PAGESIZE].count_nonzero()) == 0

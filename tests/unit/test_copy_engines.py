"""Promise: what copy engines are given is what a kernel would copy, in few pieces, none of which
lies in memory that two calls have pinned; and where a driver has no such call, or refuses, a kernel
copies.

There is no GPU here: the driver's function is a fake with its types, and the device simulated.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from lamina_kv.data.movers import batched_copy, crossover, pinning
from lamina_kv.data.movers.batched_copy import Attributes, Batch, batch_of, find
from lamina_kv.data.movers.crossover import Way, way_of
from lamina_kv.data.movers.cuda import CudaMover
from lamina_kv.data.movers.row_table import RowShape
from lamina_kv.data.near import NearSlab
from lamina_kv.geometry import CacheGeometry, Row
from simulator.device import SimulatedDevice

# -- what is copied ------------------------------------------------------------------------------


def pieces(batch: Batch) -> list[tuple[int, int, int]]:
    return list(
        zip(batch.sources.tolist(), batch.targets.tolist(), batch.sizes.tolist(), strict=True)
    )


@pytest.mark.parametrize("seed", range(40))
def test_every_byte_goes_where_it_should_and_no_piece_crosses_a_cut(seed: int) -> None:
    random = Random(seed)
    size, slot_pages = random.choice([1, 7, 64]), random.choice([1, 3])
    stride = size + random.choice([0, 5])
    rows, blocks, slots = random.randint(1, 3), 12, 12
    extents = [16 + row * slot_pages * size for row in range(rows)]
    slot_bytes = extents[-1] + slot_pages * size + random.choice([0, 9])
    shape = RowShape(stride, size, slot_bytes, slot_pages, 1)
    engine, near = 10**6, 10**5
    entries = np.array([(engine + row * 10**4, extents[row]) for row in range(rows)])
    count = random.randint(0, blocks)
    pages = random.sample(range(blocks), count)
    held = random.sample(range(slots * slot_pages), count)
    if random.random() < 0.5:
        pages.sort()
        held.sort()
    cuts = sorted(random.sample(range(near + 1, near + slots * slot_bytes), random.randint(0, 9)))
    to_engine = random.random() < 0.5
    expected: dict[int, int] = {}
    for base, offset in entries.tolist():
        for page, block in zip(held, pages, strict=True):
            there = near + offset + page // slot_pages * slot_bytes + page % slot_pages * size
            for byte in range(size):
                expected[base + block * stride + byte] = there + byte
    batch = batch_of(
        entries, shape, near, np.array(held, np.int64), np.array(pages, np.int64), [near, *cuts],
        to_engine=to_engine,
    )  # fmt: skip
    found: dict[int, int] = {}
    for source, target, length in pieces(batch):
        there, here = (source, target) if to_engine else (target, source)
        assert length > 0
        assert not [cut for cut in cuts if there < cut < there + length]
        for byte in range(length):
            assert here + byte not in found, "a byte is copied twice"
            found[here + byte] = there + byte
    assert found == expected
    assert {words.dtype for words in (batch.sources, batch.targets, batch.sizes)} == {
        np.dtype(np.uint64)
    }


def test_neighbours_are_one_piece() -> None:
    shape = RowShape(64, 64, 4096, 4, 16)
    pages, held = np.array([3, 4, 5, 9, 0]), np.array([0, 1, 2, 3, 8])
    entries = np.array([(10**6, 0)])
    batch = batch_of(entries, shape, 4096, held, pages, [4096], to_engine=True)
    assert pieces(batch) == [
        (4096, 10**6 + 3 * 64, 3 * 64),
        (4096 + 3 * 64, 10**6 + 9 * 64, 64),
        (3 * 4096, 10**6, 64),
    ]


# -- the driver ----------------------------------------------------------------------------------


class Library:
    """A driver that copies on the host, and looks at what it is given.

    Attributes:
        calls: copies and stream of each call.
        code: what it returns.
        has: whether it has the function.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.code = 0
        self.has = True
        self._function = batched_copy.PROTOTYPE(self._copy)
        self.cuGetProcAddress_v2 = self._look_up

    def _look_up(
        self, name: bytes, function: Any, version: ctypes.c_int, flags: Any, status: Any
    ) -> int:
        assert (name, version.value, flags.value) == (b"cuMemcpyBatchAsync", 12080, 0)
        if self.has:
            function._obj.value = ctypes.cast(self._function, ctypes.c_void_p).value
        return 0 if self.has else 500

    def _copy(  # the driver's own arguments
        self,
        targets: int,
        sources: int,
        sizes: int,
        count: int,
        attributes: int,
        firsts: int,
        kinds: int,
        refused: int,
        stream: int,
    ) -> int:
        self.calls.append((count, stream))
        assert kinds == 1
        assert ctypes.c_size_t.from_address(firsts).value == 0
        attribute = Attributes.from_address(attributes)
        assert (attribute.source_order, attribute.flags) == (1, 0)
        words = ctypes.c_uint64 * count
        if self.code:
            ctypes.c_size_t.from_address(refused).value = 1
            return self.code
        for target, source, size in zip(
            words.from_address(targets), words.from_address(sources), words.from_address(sizes),
            strict=True,
        ):  # fmt: skip
            ctypes.memmove(target, source, size)
        return 0


def test_the_driver_gets_addresses_sizes_and_a_stream() -> None:
    assert ctypes.sizeof(Attributes) == 24, "as in cuda.h"
    library = Library()
    copy = find(library)
    assert copy is not None
    source = np.arange(100, dtype=np.uint8)
    target = np.zeros(100, np.uint8)
    words = [
        np.array([source.ctypes.data, source.ctypes.data + 50], np.uint64),
        np.array([target.ctypes.data + 10, target.ctypes.data], np.uint64),
        np.array([20, 5], np.uint64),
    ]
    copy.submit(Batch(*words), 77)
    assert library.calls == [(2, 77)]
    assert target[10:30].tolist() == list(range(20))
    assert target[:5].tolist() == list(range(50, 55))
    copy.submit(Batch(*(each[:0] for each in words)), 77)
    assert len(library.calls) == 1, "the driver takes no empty batch"
    library.code = 801
    with pytest.raises(RuntimeError, match="copy 1 of 2, of 5 bytes, with error 801"):
        copy.submit(Batch(*words), 77)


def test_an_older_driver_has_no_such_function() -> None:
    library = Library()
    library.has = False
    assert find(library) is None
    assert find(object()) is None


# -- which of the two ----------------------------------------------------------------------------


def test_the_table_begins_with_pages_of_any_size_and_grows() -> None:
    for table in (crossover.LOADS, crossover.SAVES):
        bounds = [least for least, _ in table]
        assert bounds[0] == 0
        assert all(a < b for a, b in itertools.pairwise(bounds))
    assert way_of(28 << 10, to_engine=True) is Way.COPY_ENGINE
    assert way_of((28 << 10) - 1, to_engine=True) is Way.KERNEL
    assert way_of(1, to_engine=False) is Way.COPY_ENGINE


SMALL, LARGE, BLOCKS, SLOTS = 96, 29 << 10, 8, 6
GEOMETRY = CacheGeometry(
    rows=(
        Row(("a",), 0, 0, LARGE, LARGE),
        Row(("b",), 0, BLOCKS * LARGE, LARGE, LARGE),
        Row(("c",), 0, 2 * BLOCKS * LARGE, SMALL, SMALL),
    ),
    num_blocks=BLOCKS,
    block_tokens=16,
    chunk_tokens=32,
    allocation_bytes=(BLOCKS * (2 * LARGE + SMALL),),
)
HELD, PAGES = np.array([1, 2, 11, 6]), np.array([7, 2, 3, 0])


@pytest.fixture
def engine() -> torch.Tensor:
    return torch.randint(0, 256, GEOMETRY.allocation_bytes, dtype=torch.uint8)


@pytest.fixture
def device(engine: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    for step in ("FIRST_STEP", "LARGEST_STEP"):  # of which some lie in the middle of a page
        monkeypatch.setattr(pinning, step, 5 * mmap.PAGESIZE)
    return SimulatedDevice([engine], Random(0), copy_engines=True)


@pytest.fixture
def mover(device: SimulatedDevice, engine: torch.Tensor) -> Iterator[CudaMover]:
    mover = CudaMover(GEOMETRY, [engine], device)
    device.settle()
    device.copies.clear()
    yield mover
    mover.close()


def there_and_back(mover: CudaMover, engine: torch.Tensor, device: SimulatedDevice) -> None:
    near = NearSlab(GEOMETRY, SLOTS * GEOMETRY.object_bytes, mover.allocate_host)
    pairs, before = mover.pairs(near, HELD, PAGES), engine.clone()
    mover.save([0, 1, 2], pairs, mover.fence_compute()).wait()
    for row in GEOMETRY.rows:
        for page in PAGES:
            start = row.offset + page * row.block_stride
            engine[start : start + row.page_bytes] = 0
    mover.load([0, 1, 2], pairs, mover.fence_compute()).wait()
    device.settle()
    assert torch.equal(engine, before)


def test_small_pages_are_loaded_by_the_kernel_and_the_rest_by_copy_engines(
    device: SimulatedDevice, mover: CudaMover, engine: torch.Tensor
) -> None:
    there_and_back(mover, engine, device)
    assert [(launch.rows, launch.to_engine) for launch in device.copies] == [(1, True)]
    (saves, small), (_, large), (loads, back) = device.batches
    assert saves is not loads
    assert len(small.sizes) in range(3, 5)
    assert int(small.sizes.sum()) == 4 * SMALL
    for batch in (large, back):
        assert int(batch.sizes.sum()) == 2 * 4 * LARGE
        assert len(batch.sizes) > 2 * 4, "some pages lie in two ranges, each pinned by a call"


def test_without_copy_engines_the_kernel_copies_all(
    device: SimulatedDevice, engine: torch.Tensor
) -> None:
    device.copy_engines = False
    mover = CudaMover(GEOMETRY, [engine], device)
    there_and_back(mover, engine, device)
    assert not device.batches
    mover.close()


def test_a_driver_that_refuses_is_not_asked_again(
    device: SimulatedDevice,
    mover: CudaMover,
    engine: torch.Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device.refuses = True
    there_and_back(mover, engine, device)
    (record,) = caplog.records
    assert "by kernels" in record.message
    device.refuses = False
    there_and_back(mover, engine, device)
    assert not device.batches

"""Promise: what the CUDA mover submits is ordered on the device, never by stopping the host, and no
kernel meets memory that is not pinned.

There is no GPU here. A fake of torch's streams and events writes down what is submitted to which
stream and in which order, and the tests look at that; what a real device makes of it they cannot
say. The kernel itself runs in Triton's interpreter (see the property tests), and is compiled here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from lamina_kv.data.movers import cuda as cuda_module
from lamina_kv.data.movers.base import Fence, Pairs
from lamina_kv.data.movers.cuda import CudaMover
from lamina_kv.data.movers.row_table import RowRange, RowTable
from lamina_kv.data.near import NearSlab
from lamina_kv.geometry import CacheGeometry, Row

PAGE, STRIDE, BLOCKS = 64, 96, 8
GEOMETRY = CacheGeometry(
    rows=(Row(("a",), 0, 0, STRIDE, PAGE), Row(("b",), 0, PAGE, STRIDE, 32)),
    num_blocks=BLOCKS,
    block_tokens=16,
    chunk_tokens=32,
    allocation_bytes=(BLOCKS * STRIDE,),
)
OBJECT = 4096
SLOTS = 4
PAGES, IDS = np.array([5, 0, 2]), np.array([1, 7, 3])
PAGE_COPY = "lamina_kv.data.movers.page_copy"


class Stream:
    """Writes down what it is given."""

    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        self.priority = priority
        self.log: list[tuple[str, Event]] = []

    def wait_event(self, event: Event) -> None:
        self.log.append(("wait", event))

    def synchronize(self) -> None:
        self.log.append(("synchronize", Event()))


class Event:
    """Knows where it was recorded and whether the host waited for it."""

    def __init__(self, blocking: bool = False) -> None:
        self.blocking = blocking
        self.host_waits = 0

    def record(self, stream: Stream) -> None:
        stream.log.append(("record", self))

    def synchronize(self) -> None:
        self.host_waits += 1

    def query(self) -> bool:
        return False


@dataclass
class Launch:
    """A copy that was launched: on what, of how many rows, and which pages."""

    stream: Stream
    rows: int
    pairs: torch.Tensor
    to_engine: bool


class Device:
    """What a fake GPU was asked to do."""

    def __init__(self) -> None:
        self.compute = self.current = Stream()
        self.copies: list[Launch] = []
        self.registered: dict[int, int] = {}
        self.chosen_by: list[threading.Thread] = []
        self.pins: threading.Semaphore | None = None
        self.result = 0

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def copy_pages(  # as the real one
        self,
        near: torch.Tensor,
        rows: torch.Tensor,
        part: RowRange,
        pairs: torch.Tensor,
        *,
        to_engine: bool,
    ) -> None:
        entries = rows[part.first : part.first + part.count].tolist()
        self.copies.append(Launch(self.current, part.count, pairs, to_engine))
        self.current.log.append(("copy", Event()))
        shape, held = part.shape, near.numpy()
        for (base, offset), (page, block) in itertools.product(entries, pairs.tolist()):
            engine = (ctypes.c_uint8 * shape.page_bytes).from_address(
                base + block * shape.block_stride
            )
            slot, index = divmod(page, shape.slot_pages)
            start = offset + slot * shape.slot_bytes + index * shape.page_bytes
            place = held[start : start + shape.page_bytes]
            if to_engine:
                engine[:] = place.tolist()
            else:
                place[:] = engine

    def choose(self, _: torch.device) -> None:
        self.chosen_by.append(threading.current_thread())

    def register(self, address: int, length: int, _: int) -> int:
        assert self.pins is None or self.pins.acquire(timeout=30)
        assert threading.current_thread() in self.chosen_by
        self.registered[address] = length
        return self.result

    def unregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    runtime = SimpleNamespace(
        cudaHostRegister=device.register, cudaHostUnregister=device.unregister
    )
    driver = SimpleNamespace(cuThreadExchangeStreamCaptureMode=lambda mode: 0)

    def check_error(code: int) -> None:
        if code:
            raise RuntimeError("out of memory")

    for name, fake in {
        "Stream": Stream,
        "Event": Event,
        "stream": device.stream,
        "current_stream": lambda _: device.compute,
        "device": lambda _: contextlib.nullcontext(),
        "cudart": lambda: runtime,
        "set_device": device.choose,
        "check_error": check_error,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    monkeypatch.setattr(cuda_module, "PIN_PIECE", 4096)
    monkeypatch.setitem(sys.modules, PAGE_COPY, SimpleNamespace(copy_pages=device.copy_pages))
    return device


@pytest.fixture
def engine() -> torch.Tensor:
    return torch.randint(0, 256, (BLOCKS * STRIDE,), dtype=torch.uint8)


@pytest.fixture
def mover(device: Device, engine: torch.Tensor) -> CudaMover:
    mover = CudaMover(GEOMETRY, [engine])
    device.copies.clear()
    return mover


@pytest.fixture
def near(mover: CudaMover) -> NearSlab:
    return slab(mover)


def slab(mover: CudaMover) -> NearSlab:
    return NearSlab(GEOMETRY, SLOTS * OBJECT, mover.allocate_host)


def events(stream: Stream) -> list[str]:
    return [what for what, _ in stream.log]


def pairs(mover: CudaMover, near: NearSlab) -> Pairs:
    return mover.pairs(near, PAGES, IDS)


def test_a_save_follows_the_fence_on_the_device_and_its_own_fence_follows_the_copy(
    device: Device, mover: CudaMover, near: NearSlab
) -> None:
    after = mover.fence_compute()
    fence = mover.save([0], pairs(mover, near), after)
    (copy,) = device.copies
    assert not copy.to_engine
    assert events(copy.stream)[-3:] == ["wait", "copy", "record"]
    (_, computed), (_, awaited), (_, recorded) = device.compute.log[0], *copy.stream.log[-3::2]
    assert awaited is computed
    assert computed.host_waits == 0
    fence.wait()
    assert recorded.host_waits == 1
    assert recorded.blocking, "a waiting thread would spin on one of the engine's cores"


def test_a_load_runs_on_a_stream_of_its_own_before_saves(
    device: Device, mover: CudaMover, near: NearSlab
) -> None:
    after = mover.fence_compute()
    mover.save([0], pairs(mover, near), after)
    mover.load([0], pairs(mover, near), after)
    assert [copy.to_engine for copy in device.copies] == [False, True]
    save, load = (copy.stream for copy in device.copies)
    assert load is not save
    assert device.compute not in (load, save)
    assert load.priority < save.priority
    assert events(load)[-3:] == ["wait", "copy", "record"]
    assert load.log[-3][1] is device.compute.log[0][1]


@pytest.mark.parametrize("is_load", [True, False], ids=["load", "save"])
def test_rows_that_are_alike_are_one_launch_and_one_fence(
    device: Device, engine: torch.Tensor, is_load: bool
) -> None:
    """The pages are uploaded once for all copies of a load or a save."""
    row = GEOMETRY.rows[0]
    rows = [replace(row, offset=i * BLOCKS * STRIDE) for i in range(8)]
    rows[4] = replace(rows[4], page_bytes=32)
    shape = replace(GEOMETRY, rows=tuple(rows), allocation_bytes=(8 * BLOCKS * STRIDE,))
    mover = CudaMover(shape, [torch.zeros(shape.allocation_bytes, dtype=torch.uint8)])
    near = NearSlab(shape, SLOTS * shape.object_bytes, mover.allocate_host)
    device.copies.clear()
    made, after = mover.pairs(near, PAGES, IDS), mover.fence_compute()
    copy = mover.load if is_load else mover.save
    copy(range(8), made, after)
    assert sorted(launch.rows for launch in device.copies) == [1, 7]
    assert events(device.copies[0].stream)[-4:] == ["wait", "copy", "copy", "record"]
    copy([6, 0, 1], made, after)
    assert [launch.rows for launch in device.copies[2:]] == [2, 1]
    assert len({id(launch.pairs) for launch in device.copies}) == 1
    mover.close()


def test_pairs_of_another_mover_are_refused(mover: CudaMover, near: NearSlab) -> None:
    with pytest.raises(TypeError, match="another mover"):
        mover.save([0], Pairs(near, PAGES, IDS), mover.fence_compute())


def test_compute_is_held_on_the_device(device: Device, mover: CudaMover, near: NearSlab) -> None:
    fence = mover.load([0], pairs(mover, near), mover.fence_compute())
    mover.hold_compute(fence)
    recorded = device.copies[0].stream.log[-1][1]
    assert device.compute.log[-1] == ("wait", recorded)
    assert recorded.host_waits == 0


def test_a_fence_of_another_kind_is_waited_for(
    device: Device, mover: CudaMover, near: NearSlab
) -> None:
    class Foreign(Fence):
        waited = False

        def wait(self) -> None:
            assert not device.copies
            Foreign.waited = True

        def passed(self) -> bool:
            return True

    mover.load([0], pairs(mover, near), Foreign())
    assert Foreign.waited


@pytest.mark.parametrize("row", [0, 1])
def test_what_is_saved_comes_back(
    mover: CudaMover, engine: torch.Tensor, near: NearSlab, row: int
) -> None:
    before = engine.clone()
    mover.save([row], pairs(mover, near), mover.fence_compute())
    for block in IDS:
        start = GEOMETRY.rows[row].offset + block * STRIDE
        engine[start : start + GEOMETRY.rows[row].page_bytes] = 0
    assert not torch.equal(engine, before)
    mover.load([row], pairs(mover, near), mover.fence_compute())
    assert torch.equal(engine, before)


def test_memory_that_is_not_the_movers_is_refused(device: Device, mover: CudaMover) -> None:
    elsewhere = NearSlab(GEOMETRY, OBJECT, lambda size: torch.zeros(size, dtype=torch.uint8))
    made = mover.pairs(elsewhere, PAGES[1:2], IDS[:1])
    with pytest.raises(ValueError, match="allocate_host"):
        mover.save([0], made, mover.fence_compute())
    with pytest.raises(ValueError, match="allocate_host"):
        mover.load([0], made, mover.fence_compute())
    assert not device.copies


@pytest.mark.parametrize("is_load", [True, False], ids=["load", "save"])
def test_a_copy_waits_until_the_slots_that_it_touches_are_pinned(
    device: Device, mover: CudaMover, is_load: bool
) -> None:
    device.pins = threading.Semaphore(0)
    near = slab(mover)  # the first slot is one piece to pin, and so is each that follows

    def copy(slot: int) -> threading.Thread:
        made = mover.pairs(near, np.array([2 * slot + 1, 0]), IDS[:2])
        work = mover.load if is_load else mover.save
        thread = threading.Thread(target=work, args=([0], made, mover.fence_compute()))
        thread.start()
        return thread

    last, first = copy(2), copy(0)
    device.pins.release()
    first.join(30)
    assert len(device.copies) == 1
    device.pins.release()
    last.join(0.05)
    assert last.is_alive()
    device.pins.release()
    last.join(30)
    assert len(device.copies) == 2
    assert len(device.registered) == 3
    device.pins.release()


def test_memory_that_cannot_be_pinned_takes_part_in_no_copy(
    device: Device, mover: CudaMover
) -> None:
    device.result = 2
    near = slab(mover)
    with pytest.raises(RuntimeError, match=r"out of memory.*host\.capacity"):
        mover.load([0], pairs(mover, near), mover.fence_compute())
    assert not device.copies


def test_memory_is_pinned_whole_and_let_go_at_the_end(device: Device, mover: CudaMover) -> None:
    near = slab(mover)
    base = near.memory.data_ptr()
    last = mover.pairs(near, np.array([2 * SLOTS - 1]), IDS[:1])
    mover.load([0], last, mover.fence_compute())
    assert device.registered == {base + slot * OBJECT: OBJECT for slot in range(SLOTS)}
    mover.close()
    mover.close()
    assert not device.registered
    near.memory.fill_(1)


@pytest.fixture
def real_page_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    pytest.importorskip("triton", reason="compiling the kernel needs the package triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delitem(sys.modules, PAGE_COPY, raising=False)
    yield importlib.import_module(PAGE_COPY)
    sys.modules.pop(PAGE_COPY)


def accesses(
    page_copy: ModuleType, capability: int, alignment: int, *, to_engine: bool
) -> set[str]:
    """How the kernel, compiled for a device that is not here, reads and writes pages."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, word = page_copy._copy_tiles, min(8, alignment)
    constants = {
        "to_engine": to_engine,
        "alignment": alignment,
        "word_type": page_copy._WORDS[word],
        "word_bytes": word,
        "tile_words": page_copy.TILE_BYTES // word,
        "programs": page_copy.LOAD_PROGRAMS,
    }
    types = {"near": "*u8", "rows": "*i64", "pairs": "*i64"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    sixteens = ["near", "rows", "pairs"]
    if alignment == 16:
        sixteens += ["block_stride", "page_bytes", "slot_bytes"]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in sixteens},
    )
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    found: set[str] = set(re.findall(r"(?:ld|st)\.global\S*", compiled.asm["ptx"]))
    return found


@pytest.mark.parametrize("to_engine", [True, False], ids=["load", "save"])
@pytest.mark.parametrize("capability", [80, 90])
def test_aligned_pages_are_copied_sixteen_bytes_at_a_time(
    real_page_copy: ModuleType, capability: int, to_engine: bool
) -> None:
    assert accesses(real_page_copy, capability, 16, to_engine=to_engine) == {
        "ld.global.v2.b64",
        "st.global.v2.b64",
        "ld.global.b64",  # the page ids and the row
    }


def test_pages_on_odd_addresses_are_copied_byte_by_byte(real_page_copy: ModuleType) -> None:
    assert accesses(real_page_copy, 90, 1, to_engine=True) == {
        "ld.global.b8",
        "st.global.b8",
        "ld.global.b64",  # the page ids and the row
    }


@pytest.mark.parametrize(
    ("address", "stride", "page", "alignment"),
    [
        (64, 64, 64, 16),
        (8, 72, 64, 8),
        (4, 64, 64, 4),
        (0, 66, 64, 2),
        (0, 64, 60, 4),
        (1, 64, 64, 1),
    ],
)
def test_what_is_accessed_at_once_divides_every_address(
    address: int, stride: int, page: int, alignment: int
) -> None:
    rows = (Row(("a",), 0, 0, stride, page),)
    shape = replace(GEOMETRY, rows=rows, allocation_bytes=(BLOCKS * stride,))
    (found,) = RowTable(shape, [address]).shapes()
    assert found.alignment == alignment


def test_the_near_side_counts_too() -> None:
    """Behind a row of odd size everything is odd there."""
    shape = replace(GEOMETRY, rows=(Row(("a",), 0, 0, 64, 33), Row(("b",), 0, 0, 64, 64)))
    assert [each.alignment for each in RowTable(shape, [0, 0]).shapes()] == [1, 2]

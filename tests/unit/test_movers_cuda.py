"""Promise: what the CUDA mover submits is ordered on the device, never by stopping the host, and no
kernel meets memory that is not pinned.

There is no GPU here. The mover runs on the simulated device, see ``tests/simulator/device.py``, and
a fake of torch writes down what it is asked for; what a real device makes of that the tests cannot
say. The kernel itself runs in Triton's interpreter (see the property tests), and is compiled here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from lamina_kv.data import numa
from lamina_kv.data.movers import device_fence, host_memory, pinning
from lamina_kv.data.movers.base import Pairs
from lamina_kv.data.movers.cuda import CudaMover
from lamina_kv.data.movers.device import TorchDevice, TorchEvent
from lamina_kv.data.movers.device_fence import TimedFence
from lamina_kv.data.movers.fences import BothFences, CopyFailed, Fence
from lamina_kv.data.movers.row_table import RowRange, RowTable
from lamina_kv.data.near import NearSlab
from lamina_kv.geometry import CacheGeometry, Row
from lamina_kv.plan import NearSlots
from simulator.device import SimulatedDevice, SimulatedEvent, SimulatedStream

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


@pytest.fixture
def engine() -> torch.Tensor:
    return torch.randint(0, 256, (BLOCKS * STRIDE,), dtype=torch.uint8)


@pytest.fixture
def device(engine: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    monkeypatch.setattr(pinning, "FIRST_STEP", 4096)
    monkeypatch.setattr(pinning, "LARGEST_STEP", 4096)
    device = SimulatedDevice([engine], Random(0))
    device.changes_pace = False
    return device


@pytest.fixture
def mover(device: SimulatedDevice, engine: torch.Tensor) -> CudaMover:
    mover = CudaMover(GEOMETRY, [engine], device)
    device.settle()
    device.copies.clear()
    return mover


@pytest.fixture
def near(mover: CudaMover) -> NearSlab:
    return slab(mover)


def slab(mover: CudaMover) -> NearSlab:
    return NearSlab(GEOMETRY, SLOTS * OBJECT, mover.allocate_host)


def events(stream: SimulatedStream) -> list[str]:
    return [what for what, _ in stream.log]


def event(fence: Fence) -> SimulatedEvent:
    """What a fence of a copy waits for."""
    assert isinstance(fence, TimedFence)
    return cast(SimulatedEvent, fence.event)


def pairs(mover: CudaMover, near: NearSlab) -> Pairs:
    return mover.pairs(near, PAGES, IDS)


def test_a_save_follows_the_fence_on_the_device_and_its_own_fence_follows_the_copy(
    device: SimulatedDevice, mover: CudaMover, near: NearSlab
) -> None:
    after = mover.fence_compute()
    fence = mover.save([0], pairs(mover, near), after)
    assert not fence.passed()
    fence.wait()
    (copy,) = device.copies
    assert not copy.to_engine
    assert copy.pairs.tolist() == [[5, 1], [0, 7], [2, 3]]
    assert events(copy.stream)[-5:] == ["wait", "upload", "record", "copy", "record"]
    assert copy.stream.log[-5][1] is device.compute.log[0][1] is after
    assert copy.stream.log[-1][1] is event(fence)
    assert cast(SimulatedEvent, after).host_waits == 0


def test_a_load_runs_on_a_stream_of_its_own(
    device: SimulatedDevice, mover: CudaMover, near: NearSlab
) -> None:
    after = mover.fence_compute()
    mover.save([0], pairs(mover, near), after).wait()
    mover.load([0], pairs(mover, near), after).wait()
    assert [copy.to_engine for copy in device.copies] == [False, True]
    save, load = (copy.stream for copy in device.copies)
    assert load is not save
    assert device.compute not in (load, save)
    assert events(load)[-5:] == ["wait", "upload", "record", "copy", "record"]
    assert load.log[-5][1] is after


def test_loads_that_no_step_waits_for_have_a_stream_of_their_own(
    device: SimulatedDevice, mover: CudaMover, near: NearSlab
) -> None:
    """A step's loads would stand behind them, however many there are."""
    after = mover.fence_compute()
    parked = mover.load([0], pairs(mover, near), after, urgent=False)
    urgent = mover.load([0], pairs(mover, near), after)
    step, between = device.streams[2:4]
    between.held = True
    urgent.wait()
    assert not parked.passed()
    (copy,) = device.copies
    assert copy.stream is step
    device.release(between)
    parked.wait()
    assert device.copies[1].stream is between


def test_of_two_copies_in_a_stream_the_later_one_says_when_both_are_over(
    device: SimulatedDevice, mover: CudaMover, near: NearSlab
) -> None:
    after = mover.fence_compute()
    first, second = (mover.load([row], pairs(mover, near), after) for row in (0, 1))
    both, other = second.join(first), mover.load([0], pairs(mover, near), after, urgent=False)
    assert event(both) is event(second)
    assert isinstance(other.join(both), BothFences)
    other.join(both).wait()
    assert other.passed()
    span, begins, ends = both.span(), first.span(), second.span()
    assert begins is not None
    assert ends is not None
    assert span == (begins[0], ends[1])
    assert begins[0] < begins[1] <= ends[0] < ends[1]


@pytest.mark.parametrize("is_load", [True, False], ids=["load", "save"])
def test_rows_that_are_alike_are_one_launch_and_one_fence(is_load: bool) -> None:
    """The pages are uploaded once for all copies of a load or a save."""
    row = GEOMETRY.rows[0]
    rows = [replace(row, offset=i * BLOCKS * STRIDE) for i in range(8)]
    rows[4] = replace(rows[4], page_bytes=32)
    shape = replace(GEOMETRY, rows=tuple(rows), allocation_bytes=(8 * BLOCKS * STRIDE,))
    cache = torch.zeros(shape.allocation_bytes, dtype=torch.uint8)
    device = SimulatedDevice([cache], Random(0))
    mover = CudaMover(shape, [cache], device)
    near = NearSlab(shape, SLOTS * shape.object_bytes, mover.allocate_host)
    device.settle()
    device.copies.clear()
    made, after = mover.pairs(near, PAGES, IDS), mover.fence_compute()
    copy = mover.load if is_load else mover.save
    copy(range(8), made, after).wait()
    assert sorted(launch.rows for launch in device.copies) == [1, 7]
    stream = device.copies[0].stream
    assert events(stream)[-6:] == ["wait", "upload", "record", "copy", "copy", "record"]
    copy([6, 0, 1], made, after).wait()
    assert events(stream)[-5:] == ["wait", "record", "copy", "copy", "record"]
    assert [launch.rows for launch in device.copies][2:] == [2, 1]
    mover.close()


@pytest.mark.parametrize("is_load", [True, False], ids=["load", "save"])
def test_of_a_copy_that_fails_half_way_the_half_is_known(
    device: SimulatedDevice, mover: CudaMover, near: NearSlab, is_load: bool
) -> None:
    """Its slots and blocks are used by the device until then."""
    made, after = pairs(mover, near), mover.fence_compute()
    device.launches_left = 1  # the rows differ: each has a launch of its own
    with pytest.raises(CopyFailed) as failed:
        (mover.load if is_load else mover.save)([0, 1], made, after)
    assert isinstance(failed.value.__cause__, RuntimeError)
    assert not failed.value.launched.passed()
    failed.value.launched.wait()
    assert [launch.rows for launch in device.copies] == [1]


def test_a_save_that_a_step_waits_for_passes_those_that_none_does(
    device: SimulatedDevice, mover: CudaMover, near: NearSlab
) -> None:
    made, after = pairs(mover, near), mover.fence_compute()
    saves = device.streams[4]
    saves.held = True
    other = mover.save([0], made, after)
    mover.save([1], made, after, urgent=True).wait()
    (copy,) = device.copies
    assert copy.stream is not saves
    assert not other.passed()
    device.release(saves)
    other.wait()


def test_who_asks_what_time_it_was_does_not_wait_for_the_device(
    device: SimulatedDevice, engine: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An anchor is taken anew on a thread of its own, and holds from then on."""
    clock = 0.0
    monkeypatch.setattr(device_fence, "time", SimpleNamespace(perf_counter=lambda: clock))
    mover = CudaMover(GEOMETRY, [engine], device)
    near = slab(mover)
    fence = mover.load([0], pairs(mover, near), mover.fence_compute())
    fence.wait()
    first = fence.span()
    assert first is not None
    assert first[0] < 1.0
    clock = 100.0  # the device's own time has stood still
    anchors = device.streams[-5]
    anchors.held = True
    assert fence.span() == first
    assert fence.span() == first
    device.release(anchors)
    due = time.monotonic() + 30
    while fence.span() == first:
        assert time.monotonic() < due
    assert fence.span()[0] > 99.0  # type: ignore[index]
    assert len([what for what in events(anchors) if what == "record"]) == 2
    mover.close()


def test_closing_waits_for_a_device_that_hangs_no_longer_than_it_may(
    device: SimulatedDevice, mover: CudaMover, near: NearSlab
) -> None:
    """What it may still read and write stays where it is, pinned."""
    mover.await_near(near, np.array([2 * SLOTS - 1]))
    mover.save([0], pairs(mover, near), mover.fence_compute())
    device.streams[4].held = True
    kept = list(host_memory._kept)
    assert not mover.close(timeout=0.01)
    assert len(host_memory._kept) == len(kept) + 1
    assert len(device.registered) == SLOTS
    device.release(device.streams[4])
    del host_memory._kept[len(kept) :]


def test_closing_unpins_nothing_for_a_device_that_has_failed(
    device: SimulatedDevice, mover: CudaMover, near: NearSlab, caplog: pytest.LogCaptureFixture
) -> None:
    mover.await_near(near, np.array([2 * SLOTS - 1]))
    kept = list(host_memory._kept)
    device.fail("an illegal address was met")
    assert not mover.close(timeout=30.0)
    assert len(device.registered) == SLOTS
    assert "an illegal address was met" in caplog.text
    del host_memory._kept[len(kept) :]


def test_pairs_of_another_mover_are_refused(mover: CudaMover, near: NearSlab) -> None:
    with pytest.raises(TypeError, match="another mover"):
        mover.save([0], Pairs(near, PAGES, IDS), mover.fence_compute())


def test_compute_is_held_on_the_device(
    device: SimulatedDevice, mover: CudaMover, near: NearSlab
) -> None:
    fence = mover.load([0], pairs(mover, near), mover.fence_compute())
    mover.hold_compute(fence)
    assert device.compute.log[-1] == ("wait", event(fence))
    assert event(fence).host_waits == 0


def test_a_fence_of_another_kind_is_waited_for(
    device: SimulatedDevice, mover: CudaMover, near: NearSlab
) -> None:
    class Foreign(Fence):
        waited = False

        def wait(self) -> None:
            device.settle()
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
    mover.save([row], pairs(mover, near), mover.fence_compute()).wait()
    for block in IDS:
        start = GEOMETRY.rows[row].offset + block * STRIDE
        engine[start : start + GEOMETRY.rows[row].page_bytes] = 0
    assert not torch.equal(engine, before)
    mover.load([row], pairs(mover, near), mover.fence_compute()).wait()
    assert torch.equal(engine, before)


def test_memory_that_is_not_the_movers_is_refused(
    device: SimulatedDevice, mover: CudaMover
) -> None:
    elsewhere = NearSlab(GEOMETRY, OBJECT, lambda size: torch.zeros(size, dtype=torch.uint8))
    made = mover.pairs(elsewhere, PAGES[1:2], IDS[:1])
    with pytest.raises(ValueError, match="allocate_host"):
        mover.save([0], made, mover.fence_compute())
    with pytest.raises(ValueError, match="allocate_host"):
        mover.load([0], made, mover.fence_compute())
    device.settle()
    assert not device.copies


@pytest.mark.parametrize("is_load", [True, False], ids=["load", "save"])
def test_a_copy_waits_until_the_slots_that_it_touches_are_pinned(
    device: SimulatedDevice, mover: CudaMover, is_load: bool
) -> None:
    device.pins = threading.Semaphore(0)
    near = slab(mover)  # the first slot is one piece to pin, and so is each that follows

    def copy(slot: int) -> threading.Thread:
        made = mover.pairs(near, np.array([2 * slot + 1, 0]), IDS[:2])
        work, after = mover.load if is_load else mover.save, mover.fence_compute()
        thread = threading.Thread(target=lambda: work([0], made, after).wait())
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
    device: SimulatedDevice, mover: CudaMover
) -> None:
    device.pin_error = "out of memory"
    near = slab(mover)
    with pytest.raises(RuntimeError, match=r"out of memory.*host\.capacity"):
        mover.load([0], pairs(mover, near), mover.fence_compute())
    device.settle()
    assert not device.copies


def test_memory_is_pinned_whole_and_let_go_at_the_end(
    device: SimulatedDevice, mover: CudaMover
) -> None:
    near = slab(mover)
    base = near.memory.data_ptr()
    last = mover.pairs(near, np.array([2 * SLOTS - 1]), IDS[:1])
    mover.load([0], last, mover.fence_compute())
    assert device.registered == {base + slot * OBJECT: OBJECT for slot in range(SLOTS)}
    mover.close()
    mover.close()
    assert not device.registered
    near.memory.fill_(1)


# -- what torch is asked for ---------------------------------------------------------------------


class Stream:
    """Writes down what torch is asked to do with it."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.made = device, priority
        self.log: list[object] = []

    def wait_event(self, event: Event) -> None:
        self.log.append(event)

    def synchronize(self) -> None:
        self.log.append("synchronize")


class Event:
    def __init__(self, enable_timing: bool, blocking: bool) -> None:
        self.made = enable_timing, blocking
        self.log: list[object] = []

    def record(self, stream: Stream) -> None:
        self.log.append(stream)

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def query(self) -> bool:
        return False

    def elapsed_time(self, later: Event) -> float:
        return 250.0


class Library:
    """The driver's library.

    Attributes:
        asked: the functions that were called.
        shares_addresses: what it says of pinned memory.
        code: what it returns.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.shares_addresses = True
        self.code = 0
        self.cuThreadExchangeStreamCaptureMode = self._capture_mode
        self.cuDeviceGet = self._device
        self.cuDeviceGetAttribute = self._attribute
        self.cuDeviceGetPCIBusId = self._address

    def _called(self, name: str) -> int:
        self.asked.append(name)
        return self.code

    def _capture_mode(self, mode: Any) -> int:
        assert mode._obj.value == 2
        return self._called("capture mode")

    def _device(self, device: Any, ordinal: ctypes.c_int) -> int:
        device._obj.value = 10 + ordinal.value
        return self._called("device")

    def _attribute(self, value: Any, which: ctypes.c_int, device: ctypes.c_int) -> int:
        assert (which.value, device.value) == (91, 10)
        value._obj.value = self.shares_addresses
        return self._called("attribute")

    def _address(self, text: Any, length: ctypes.c_int, device: ctypes.c_int) -> int:
        assert (length.value, device.value) == (16, 10)
        text.value = b"0000:3B:00.0"
        return self._called("address")


class Torch:
    """What torch was asked for, in order.

    Attributes:
        library: the driver's.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[object, ...]] = []
        self.current: object = Stream()
        self.code = 0
        runtime = SimpleNamespace(
            cudaHostRegister=self._call("register"), cudaHostUnregister=self._call("unregister")
        )
        self.library = Library()
        for name, fake in {
            "Stream": Stream,
            "Event": Event,
            "stream": partial(self._inside, "stream"),
            "device": partial(self._inside, "device"),
            "current_stream": lambda device: self.current,
            "cudart": lambda: runtime,
            "set_device": self._call("choose"),
            "mem_get_info": self._call("context"),
            "check_error": self._check,
        }.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(ctypes, "CDLL", lambda _: self.library)
        fake_kernel = SimpleNamespace(copy_pages=self._call("copy"))
        patch.setitem(sys.modules, PAGE_COPY, fake_kernel)

    def _call(self, name: str) -> Callable[..., int]:
        def call(*arguments: object, **_: object) -> int:
            self.log.append((name, *arguments))
            return self.code

        return call

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError("out of memory")

    @contextlib.contextmanager
    def _inside(self, kind: str, which: object) -> Iterator[None]:
        self.log.append((kind, which))
        yield
        self.log.append((f"no {kind}", which))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Torch:
    return Torch(monkeypatch)


CPU = torch.device("cpu")


def test_a_thread_that_waits_for_an_event_sleeps(fake: Torch) -> None:
    device = TorchDevice(CPU)
    stream, other = device.stream(-1), device.stream(0)
    assert (stream.made, other.made) == ((CPU, -1), (CPU, 0))  # type: ignore[attr-defined]
    event = device.record(stream, timed=True)
    assert isinstance(event, TorchEvent)
    assert cast(Event, event.event).made == (True, True), "it would spin on one of the cores"
    assert cast(Event, device.record(stream).event).made == (False, True)  # type: ignore[attr-defined]
    event.wait()
    assert cast(Event, event.event).log == [stream, "synchronize"]
    assert not event.passed()
    assert device.record(other, timed=True).seconds_since(event) == 0.25
    device.hold(other, event)
    device.synchronize(other)
    assert cast(Stream, other).log == [event.event, "synchronize"]
    assert device.current_stream() is fake.current


def test_copies_and_their_indices_are_given_to_one_stream(fake: Torch) -> None:
    device = TorchDevice(CPU)
    stream = device.stream(0)
    near = device.pinned(64)
    (shape,) = RowTable(replace(GEOMETRY, rows=GEOMETRY.rows[:1]), [0]).shapes()
    part = RowRange(shape, 0, 1)
    with device.on(stream):
        ids = device.upload(stream, np.array([[3, 4]]))
        device.copy(stream, near, near, part, ids, to_engine=True)
    assert ids.tolist() == [[3, 4]]
    assert fake.log == [
        ("stream", stream),
        ("copy", near, near, part, ids),
        ("no stream", stream),
    ]


def test_memory_is_pinned_beside_a_capture_of_graphs(fake: Torch) -> None:
    device = TorchDevice(CPU)
    device.choose()
    device.register(4096, 8192)
    device.unregister(4096)
    names = [name for name, *_ in fake.log]
    assert names == ["choose", "context", "register", "device", "unregister", "no device"]
    assert fake.log[2] == ("register", 4096, 8192, 0)
    assert fake.library.asked == ["device", "attribute", "capture mode"]
    fake.code = 2
    with pytest.raises(RuntimeError, match="out of memory"):
        device.register(4096, 8192)
    assert fake.library.asked[3:] == ["capture mode"], "the rest does not change"


def test_memory_that_the_device_would_not_find_is_not_pinned(fake: Torch) -> None:
    fake.library.shares_addresses = False
    device = TorchDevice(CPU)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="WSL"):
            device.register(4096, 8192)
    assert not fake.log
    assert fake.library.asked == ["device", "attribute"]


def test_the_node_of_a_device_is_that_of_its_place_on_the_bus(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "0000:3b:00.0"
    place.mkdir()
    monkeypatch.setattr(numa, "DEVICES", tmp_path)
    assert TorchDevice(CPU).numa_node is None
    for said, node in (("1", 1), ("-1", None), ("", None)):
        (place / "numa_node").write_text(f"{said}\n")
        assert TorchDevice(CPU).numa_node == node
    fake.library.code = 3
    assert TorchDevice(CPU).numa_node is None


def test_control_may_use_the_slots_that_are_pinned(
    device: SimulatedDevice, mover: CudaMover
) -> None:
    device.pins = threading.Semaphore(0)
    near = slab(mover)
    assert mover.near_slots(near) == NearSlots(0, SLOTS)
    device.pins.release(2)
    mover.await_near(near, np.array([3]))
    assert mover.near_slots(near) == NearSlots(2, SLOTS)
    device.pin_error = "out of memory"
    device.pins.release()
    with pytest.raises(RuntimeError, match="out of memory"):
        mover.await_near(near, np.array([4]))
    assert mover.near_slots(near) == NearSlots(2, 2)
    mover.close(process_ends=True)
    assert len(device.registered) == 2


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

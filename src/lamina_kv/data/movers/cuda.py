"""The CUDA mover: one launch for many rows, on streams of its own, ordered by events.

**Not yet run on a GPU.** The kernel is tested with Triton's interpreter and by what it compiles
to. The order of streams and events is tested on a simulated device; that torch's calls do what
:mod:`~lamina_kv.data.movers.device` says of them is read from the CUDA and torch documentation.

Host memory is an ordinary mapping near the device that is pinned afterwards with
``cudaHostRegister``, step by step and in the background, see
:mod:`~lamina_kv.data.movers.host_memory`; memory that processes share is pinned by each of them.
torch's own pinned allocator would round a slab up to a power of two, and block the start of the
server until all of it is pinned. Slots are usable in the order in which they are pinned. Control
orders nothing beyond; a copy that comes all the same waits, on the pipeline's thread.

A kernel moves small pages and the copy engines large ones, see
:mod:`~lamina_kv.data.movers.crossover`. Pages are scattered on both sides: the copy engines want a
descriptor for each, and the kernel takes few multiprocessors (see
:data:`~lamina_kv.data.movers.page_copy.LOAD_PROGRAMS`). Loads of a step have a stream of their own,
and so have saves of what a step overwrites: in that of others they would stand behind all that is
queued there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lamina_kv.data.movers.base import Mover, Pairs
from lamina_kv.data.movers.batched_copy import batch_of
from lamina_kv.data.movers.crossover import Way, way_of
from lamina_kv.data.movers.device import Device, Event, TorchDevice
from lamina_kv.data.movers.device_fence import CopyStream, DeviceClock, TimedFence
from lamina_kv.data.movers.fences import CopyFailed, Fence
from lamina_kv.data.movers.host_memory import NO_END, HostMemory, close_all
from lamina_kv.data.movers.row_table import LONGEST_ACCESS, RowRange, RowTable
from lamina_kv.data.near import Indices, NearSlab
from lamina_kv.data.shared_memory import MemoryFile
from lamina_kv.data.threads import Threads
from lamina_kv.geometry import CacheGeometry
from lamina_kv.plan import NearSlots

log = logging.getLogger("lamina_kv.data")

STEP_PRIORITY, PRIORITY = 0, 0
"""Priorities of the streams for what a step waits for, and of the others. 0 is the lowest one that
CUDA has, and the model's. Whether the model gains from what goes before it (-1) is not
measured."""


@dataclass(frozen=True, slots=True, eq=False)
class DevicePairs(Pairs):
    """Pairs that are uploaded once for each stream that copies them.

    Attributes:
        uploaded: by stream, int64 of shape ``(pages, 2)``: near pages and the engine's. They were
            uploaded on that stream and are its own, so that nobody gets their memory before the
            copies that read them have run, see
            :meth:`~lamina_kv.data.movers.device.Device.upload`.
        lock: guards ``uploaded``.
    """

    uploaded: dict[Any, torch.Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def on(self, stream: Any, device: Device[Any]) -> torch.Tensor:
        """The pairs on the device, for copies on ``stream``."""
        with self.lock:
            if (pairs := self.uploaded.get(stream)) is None:
                held = np.stack((self.near_pages, self.pages), axis=1)
                pairs = self.uploaded[stream] = device.upload(stream, held)
            return pairs


class CudaMover(Mover):
    """Copies with a Triton kernel or the copy engines on four streams: loads and saves that a step
    waits for, and those that none does.

    Args:
        geometry: where pages are.
        allocations: as :class:`~lamina_kv.data.movers.base.Mover` says, all on one device.
        device: that device; None makes it from the allocations.

    Attributes:
        has_copy_engines: whether the copy engines are given what they move faster.

    Raises:
        ImportError: if Triton is not installed.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        allocations: Sequence[torch.Tensor],
        device: Device[Any] | None = None,
    ) -> None:
        super().__init__(geometry, allocations)
        device = self._device = device or TorchDevice(self._allocations[0].device)
        bases = [tensor.data_ptr() for tensor in self._allocations]
        addresses = [bases[row.allocation] + row.offset for row in geometry.rows]
        self._table = RowTable(geometry, addresses)
        clock = self._clock = DeviceClock(device, Threads(self.enter_thread))
        self._step_loads = CopyStream(device, device.stream(STEP_PRIORITY), clock)
        self._other_loads = CopyStream(device, device.stream(PRIORITY), clock)
        self._saves = CopyStream(device, device.stream(PRIORITY), clock)
        self._step_saves = CopyStream(device, device.stream(STEP_PRIORITY), clock)
        with device.on(stream := self._step_loads.stream):
            self._rows = device.upload(stream, self._table.entries)
        device.synchronize(stream)  # all streams read them
        self._host: list[HostMemory] = []
        self.has_copy_engines = device.has_copy_engines
        self._compile()

    def enter_thread(self) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`. A thread that has chosen no device makes
        a context on the first one as soon as it waits for an event or leaves a stream, which takes
        half a GiB there for each process."""
        self._device.choose()

    def allocate_host(self, size: int, file: MemoryFile | None = None) -> torch.Tensor:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        memory = HostMemory(
            size,
            file=file,
            pinner=self._device,
            node=self._device.numa_node,
            enter=self.enter_thread,
        )
        self._host.append(memory)
        return memory.tensor

    def near_slots(self, near: NearSlab) -> NearSlots:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        memory, size = self._memory_of(near), near.geometry.object_bytes
        memory.say_if_stuck()
        return NearSlots(memory.ready // size, memory.most // size)

    def await_near(self, near: NearSlab, near_pages: Indices) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        # A kernel that meets memory which is not pinned takes the engine's context down with it.
        self._memory_of(near).wait(near.end_of(near_pages))

    def _memory_of(self, near: NearSlab) -> HostMemory:
        for memory in self._host:
            if memory.holds(near.memory):
                return memory
        raise ValueError("a near slab must be in memory that this mover's allocate_host returned")

    def pairs(self, near: NearSlab, near_pages: Indices, pages: Indices) -> Pairs:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        self._check(near, near_pages, pages)
        return DevicePairs(near, near_pages, pages)

    def load(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = True
    ) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        copies = self._step_loads if urgent else self._other_loads
        return self._copy(copies, rows, pairs, after, to_engine=True)

    def save(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = False
    ) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        copies = self._step_saves if urgent else self._saves
        return self._copy(copies, rows, pairs, after, to_engine=False)

    def fence_compute(self, *, timed: bool = False) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        event = self._device.record(self._device.current_stream(), timed=timed)
        return TimedFence(event, self._clock) if timed else event

    def hold_compute(self, fence: Fence) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        if (event := _event_of(fence)) is not None:
            self._device.hold(self._device.current_stream(), event)

    def close(self, *, process_ends: bool = False, timeout: float | None = None) -> bool:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        due = time.monotonic() + (NO_END if timeout is None else timeout)

        def left() -> float:
            return max(0.0, due - time.monotonic())

        streams = (self._step_loads, self._other_loads, self._saves, self._step_saves)
        try:
            ended = all(copies.passes_within(left()) for copies in streams)
        except RuntimeError as error:
            log.warning("the device has failed, and unpins no memory any more: %s", error)
            ended = False
        if not (self._clock.close(left()) and ended):
            self.keep_memory()
            return False
        return close_all(self._host, process_ends=process_ends, timeout=left())

    def keep_memory(self) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        for memory in self._host:
            memory.keep()

    def _copy(
        self,
        copies: CopyStream,
        rows: Sequence[int],
        pairs: Pairs,
        after: Fence,
        *,
        to_engine: bool,
    ) -> Fence:
        self._check_rows(rows)
        if not isinstance(pairs, DevicePairs):
            raise TypeError("these pairs are from another mover")
        self.await_near(pairs.near, pairs.near_pages)
        device, stream = self._device, copies.stream
        event, parts = _event_of(after), self._table.ranges(rows)
        with copies.turn():
            if event is not None:
                device.hold(stream, event)
            ways = [(self._way_of(part, to_engine=to_engine), part) for part in parts]
            if any(way is Way.KERNEL for way, _ in ways):
                pairs.on(stream, device)  # once for many copies: it is not this one's time
            began = device.record(stream, timed=True)
            try:
                for way, part in ways:
                    if way is Way.COPY_ENGINE and self.has_copy_engines:  # it may have refused one
                        self._copy_by_engine(stream, part, pairs, to_engine=to_engine)
                    else:
                        self._copy_by_kernel(stream, part, pairs, to_engine=to_engine)
            except Exception as error:  # the parts before it are in the stream
                raise CopyFailed(copies.fence(began)) from error
            return copies.fence(began)

    def _way_of(self, part: RowRange, *, to_engine: bool) -> Way:
        if not self.has_copy_engines:
            return Way.KERNEL
        return way_of(part.shape.page_bytes, to_engine=to_engine)

    def _copy_by_kernel(
        self, stream: Any, part: RowRange, pairs: DevicePairs, *, to_engine: bool
    ) -> None:
        indices = pairs.on(stream, self._device)
        self._device.copy(stream, pairs.near.memory, self._rows, part, indices, to_engine=to_engine)

    def _copy_by_engine(
        self, stream: Any, part: RowRange, pairs: DevicePairs, *, to_engine: bool
    ) -> None:
        memory = self._memory_of(pairs.near)
        base = memory.tensor.data_ptr()
        batch = batch_of(
            self._table.entries[part.first : part.first + part.count],
            part.shape,
            pairs.near.memory.data_ptr(),
            pairs.near_pages,
            pairs.pages,
            [base + start for start in memory.pins],
            to_engine=to_engine,
        )
        try:
            self._device.copy_batch(stream, batch)
        except RuntimeError as error:
            self.has_copy_engines = False
            log.warning("copies are made by kernels from now on, which are slower: %s", error)
            # Whatever of it is in the stream copies the same bytes, before this.
            self._copy_by_kernel(stream, part, pairs, to_engine=to_engine)

    def _compile(self) -> None:
        """Compile the kernel for every shape of row, so that no copy has to wait for that."""
        device, stream = self._device, self._step_loads.stream
        near = device.pinned(LONGEST_ACCESS)
        with device.on(stream):
            nothing = device.upload(stream, np.empty((0, 2), np.int64))
            for shape in self._table.shapes():
                for to_engine in (True, False):
                    part = RowRange(shape, 0, 0)
                    device.copy(stream, near, self._rows, part, nothing, to_engine=to_engine)


def _event_of(fence: Fence) -> Event | None:
    """The event that a stream can wait for; None for a fence of another kind, which has passed
    when this returns."""
    event = fence.event if isinstance(fence, TimedFence) else fence
    if isinstance(event, Event):
        return event
    fence.wait()
    return None

"""The CUDA mover: one kernel launch for many rows, on streams of its own, ordered by events.

**Not yet run on a GPU.** The kernel is tested with Triton's interpreter and by what it compiles
to; streams, events and pinning are written from the CUDA and torch documentation, and the tests
only check the order in which they are used.

Host memory is an ordinary mapping that is pinned afterwards with ``cudaHostRegister``, piece by
piece and in the background; memory that processes share is pinned by each of them. torch's own
pinned allocator would round a slab up to a power of two, and block the start of the server until
all of it is pinned. Slots are usable in the order in which they are pinned: a copy waits, on the
pipeline's thread, until the last slot that it touches is pinned.

A kernel, not the copy engines: pages are scattered on both sides, and the copy engines want one
descriptor per page. It takes few multiprocessors (see
:data:`~lamina_kv.data.movers.page_copy.LOAD_PROGRAMS`), and loads, which the model waits for, go
before everything else.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lamina_kv.data.movers.base import Fence, Mover, Pairs
from lamina_kv.data.movers.host_memory import HostMemory
from lamina_kv.data.movers.row_table import LONGEST_ACCESS, RowRange, RowTable
from lamina_kv.data.near import Indices, NearSlab
from lamina_kv.data.shared_memory import MemoryFile
from lamina_kv.data.threads import Threads
from lamina_kv.geometry import CacheGeometry

PIN_PIECE = 64 << 20
"""Bytes to pin by one call: what the engine launches meanwhile may have to wait for the driver."""

_LOAD_PRIORITY, _SAVE_PRIORITY = -1, 0
_RELAXED_CAPTURE = 2


class EventFence(Fence):
    """A point in a stream.

    Args:
        stream: passes when what is now in this stream has run.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        # Blocking: a thread that waits sleeps; it would spin on one of the engine's cores.
        self._event = torch.cuda.Event(blocking=True)
        self._event.record(stream)

    def wait(self) -> None:
        """See :class:`~lamina_kv.data.movers.base.Fence`."""
        self._event.synchronize()

    def passed(self) -> bool:
        """See :class:`~lamina_kv.data.movers.base.Fence`."""
        passed: bool = self._event.query()
        return passed

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Make what ``stream`` is given next run after this fence; the host does not wait."""
        stream.wait_event(self._event)


@dataclass(frozen=True, slots=True, eq=False)
class DevicePairs(Pairs):
    """Pairs that are uploaded once for each stream that copies them.

    Attributes:
        uploaded: by stream, int64 of shape ``(pages, 2)``: near pages and the engine's. They were
            uploaded on that stream and are its own: torch's allocator hands their memory out on it
            only, behind the copies that read them.
        lock: guards ``uploaded``.
    """

    uploaded: dict[torch.cuda.Stream, torch.Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def on(self, stream: torch.cuda.Stream, device: torch.device) -> torch.Tensor:
        """The pairs on the device, for copies on ``stream``, which is the current one."""
        with self.lock:
            if (pairs := self.uploaded.get(stream)) is None:
                # torch's pinned allocator waits for the upload before it uses the memory again.
                held = np.stack((self.near_pages, self.pages), axis=1)
                pairs = torch.from_numpy(held).pin_memory().to(device, non_blocking=True)
                self.uploaded[stream] = pairs
            return pairs


class CudaMover(Mover):
    """Copies with a Triton kernel on two streams, one for each direction.

    Args:
        geometry: where pages are.
        allocations: as :class:`~lamina_kv.data.movers.base.Mover` says, all on one CUDA device.

    Raises:
        ImportError: if Triton is not installed.
    """

    def __init__(self, geometry: CacheGeometry, allocations: Sequence[torch.Tensor]) -> None:
        super().__init__(geometry, allocations)
        from lamina_kv.data.movers.page_copy import copy_pages  # nobody else needs Triton

        self._copy_pages = copy_pages
        self._device = self._allocations[0].device
        bases = [tensor.data_ptr() for tensor in self._allocations]
        addresses = [bases[row.allocation] + row.offset for row in geometry.rows]
        self._table = RowTable(geometry, addresses)
        self._rows = torch.from_numpy(self._table.entries).to(self._device)
        self._runtime: Any = torch.cuda.cudart()
        self._load_stream = torch.cuda.Stream(self._device, priority=_LOAD_PRIORITY)
        self._save_stream = torch.cuda.Stream(self._device, priority=_SAVE_PRIORITY)
        self._host: list[HostMemory] = []
        self._pinned: list[int] = []
        self._compile()

    def enter_thread(self) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`. A thread that has chosen no device makes
        a context on the first one as soon as it waits for an event or leaves a stream, which takes
        half a GiB there for each process."""
        torch.cuda.set_device(self._device)

    def allocate_host(self, size: int, file: MemoryFile | None = None) -> torch.Tensor:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        memory = HostMemory(size, PIN_PIECE, self._pin, file, Threads(self.enter_thread))
        self._host.append(memory)
        return memory.tensor

    def await_near(self, near: NearSlab, near_pages: Indices) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        # A kernel that meets memory which is not pinned takes the engine's context down with it.
        for memory in self._host:
            if memory.holds(near.memory):
                memory.wait(near.end_of(near_pages))
                return
        raise ValueError("a near slab must be in memory that this mover's allocate_host returned")

    def pairs(self, near: NearSlab, near_pages: Indices, pages: Indices) -> Pairs:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        self._check(near, near_pages, pages)
        return DevicePairs(near, near_pages, pages)

    def load(self, rows: Sequence[int], pairs: Pairs, after: Fence) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        return self._copy(self._load_stream, rows, pairs, after, to_engine=True)

    def save(self, rows: Sequence[int], pairs: Pairs, after: Fence) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        return self._copy(self._save_stream, rows, pairs, after, to_engine=False)

    def fence_compute(self) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        return EventFence(torch.cuda.current_stream(self._device))

    def hold_compute(self, fence: Fence) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        _hold(torch.cuda.current_stream(self._device), fence)

    def close(self) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        self._load_stream.synchronize()
        self._save_stream.synchronize()
        while self._host:
            self._host.pop().close()
        with torch.cuda.device(self._device):
            while self._pinned:
                torch.cuda.check_error(int(self._runtime.cudaHostUnregister(self._pinned.pop())))

    def _copy(
        self,
        stream: torch.cuda.Stream,
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
        with torch.cuda.stream(stream):
            _hold(stream, after)
            indices = pairs.on(stream, self._device)
            for part in self._table.ranges(rows):
                self._copy_pages(pairs.near.memory, self._rows, part, indices, to_engine=to_engine)
            return EventFence(stream)

    def _pin(self, address: int, length: int) -> None:
        # An engine may be capturing graphs just now. A capture forbids this call to every thread,
        # or is spoilt by it, unless the thread says that it has nothing to do with the capture.
        mode = ctypes.c_int(_RELAXED_CAPTURE)
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        torch.cuda.check_error(int(self._runtime.cudaHostRegister(address, length, 0)))
        self._pinned.append(address)

    def _compile(self) -> None:
        """Compile the kernel for every shape of row, so that no copy has to wait for that."""
        near = torch.empty(LONGEST_ACCESS, dtype=torch.uint8).pin_memory()
        nothing = torch.empty((0, 2), dtype=torch.int64, device=self._device)
        with torch.cuda.stream(self._load_stream):
            for shape in self._table.shapes():
                for to_engine in (True, False):
                    part = RowRange(shape, 0, 0)
                    self._copy_pages(near, self._rows, part, nothing, to_engine=to_engine)


def _hold(stream: torch.cuda.Stream, fence: Fence) -> None:
    if isinstance(fence, EventFence):
        fence.hold(stream)
    else:
        fence.wait()

"""The CUDA mover: one kernel launch per copy, on streams of its own, ordered by events.

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
:data:`~lamina_kv.data.movers.page_copy.PROGRAMS`), and loads, which the model waits for, go before
everything else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lamina_kv.data.movers.base import Fence, Mover
from lamina_kv.data.movers.host_memory import HostMemory
from lamina_kv.data.near import Indices, NearSlab, near_unit
from lamina_kv.data.shared_memory import MemoryFile
from lamina_kv.data.threads import Threads
from lamina_kv.geometry import CacheGeometry

PIN_PIECE = 64 << 20
"""Bytes to pin by one call: what the engine launches meanwhile may have to wait for the driver."""

_LOAD_PRIORITY, _SAVE_PRIORITY = -1, 0
_RELAXED_CAPTURE = 2

_ALIGNMENT = 16
"""Bytes. Addresses that agree modulo this use the same compiled kernel."""


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
        self._rows = tuple(self._allocations[row.allocation][row.offset :] for row in geometry.rows)
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

    def load(
        self, row: int, near: NearSlab, near_pages: Indices, pages: Indices, after: Fence
    ) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        shape = self._check(row, near, near_pages, pages)
        self.await_near(near, near_pages)
        stream, place = self._load_stream, near.rows[row]
        with torch.cuda.stream(stream):
            _hold(stream, after)
            self._copy_pages(
                place.memory,
                place.unit,
                self._rows[row],
                shape.block_stride,
                self._pairs(place.begins(near_pages), pages),
                shape.page_bytes,
            )
            return EventFence(stream)

    def save(
        self, row: int, pages: Indices, near: NearSlab, near_pages: Indices, after: Fence
    ) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        shape = self._check(row, near, near_pages, pages)
        self.await_near(near, near_pages)
        stream, place = self._save_stream, near.rows[row]
        with torch.cuda.stream(stream):
            _hold(stream, after)
            self._copy_pages(
                self._rows[row],
                shape.block_stride,
                place.memory,
                place.unit,
                self._pairs(pages, place.begins(near_pages)),
                shape.page_bytes,
            )
            return EventFence(stream)

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

    def _pairs(self, sources: Indices, targets: Indices) -> torch.Tensor:
        # Neither side has to be kept alive: torch's pinned allocator waits for the copy before it
        # uses the memory again, and its device allocator hands it out on this stream only.
        pairs = torch.from_numpy(np.stack((sources, targets), axis=1)).pin_memory()
        return pairs.to(self._device, non_blocking=True)

    def _pin(self, address: int, length: int) -> None:
        # An engine may be capturing graphs just now. A capture forbids this call to every thread,
        # or is spoilt by it, unless the thread says that it has nothing to do with the capture.
        mode = ctypes.c_int(_RELAXED_CAPTURE)
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        torch.cuda.check_error(int(self._runtime.cudaHostRegister(address, length, 0)))
        self._pinned.append(address)

    def _compile(self) -> None:
        """Compile the kernel for every shape of row, so that no copy has to wait for that."""
        host = torch.empty(2 * _ALIGNMENT, dtype=torch.uint8).pin_memory()
        nothing = torch.empty((0, 2), dtype=torch.int64, device=self._device)
        geometry = self._geometry
        with torch.cuda.stream(self._load_stream):
            for row, offset, pages in zip(
                geometry.rows, geometry.extent_offsets, self._rows, strict=True
            ):
                near, unit = host[offset % _ALIGNMENT :], near_unit(geometry, row)
                engine, size = row.block_stride, row.page_bytes
                self._copy_pages(near, unit, pages, engine, nothing, size)
                self._copy_pages(pages, engine, near, unit, nothing, size)


def _hold(stream: torch.cuda.Stream, fence: Fence) -> None:
    if isinstance(fence, EventFence):
        fence.hold(stream)
    else:
        fence.wait()

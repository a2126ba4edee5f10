"""The device that a mover works on: the few calls that it makes there, and nothing else.

:class:`TorchDevice` makes them with torch. The tests have a simulated device that makes them in
memory, late and in any order that events allow; the mover on it is the same.

**TorchDevice has not yet run on a GPU.**
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch

from lamina_kv.data import numa
from lamina_kv.data.movers.batched_copy import Batch
from lamina_kv.data.movers.driver import Driver
from lamina_kv.data.movers.fences import Fence
from lamina_kv.data.movers.row_table import RowRange
from lamina_kv.data.near import Indices

Stream = TypeVar("Stream")

log = logging.getLogger("lamina_kv.data")


class Event(Fence):
    """A point in a stream: passes when what was in the stream before has run."""

    @abstractmethod
    def seconds_since(self, earlier: Event) -> float:
        """Device time from ``earlier`` to this event. Both are timed and have passed."""


class Device(ABC, Generic[Stream]):
    """Streams, events and copies. Work in one stream runs in order; streams are ordered by events
    only. All calls return at once, but those that say otherwise."""

    @abstractmethod
    def choose(self) -> None:
        """Make this the calling thread's device, and its context the thread's current one."""

    @abstractmethod
    def stream(self, priority: int) -> Stream:
        """A new stream; lower priorities run first where the device has such."""

    @abstractmethod
    def current_stream(self) -> Stream:
        """The stream on which the calling thread submits the engine's work."""

    @abstractmethod
    def record(self, stream: Stream, *, timed: bool = False) -> Event:
        """An event behind what is in ``stream`` now.

        Args:
            stream: where.
            timed: whether :meth:`Event.seconds_since` will be asked.
        """

    @abstractmethod
    def hold(self, stream: Stream, event: Event) -> None:
        """Make what ``stream`` is given next run after ``event``; the host does not wait."""

    @abstractmethod
    def upload(self, stream: Stream, values: Indices) -> torch.Tensor:
        """A copy of ``values`` in device memory, there for what ``stream``, which is the current
        one, is given next. Another stream needs an event. The memory may be dropped once everything
        that reads it is in ``stream``; if other streams read it, once they have."""

    @abstractmethod
    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """Inside, ``stream`` is the calling thread's current one."""

    @abstractmethod
    def copy(
        self,
        stream: Stream,
        near: torch.Tensor,
        rows: torch.Tensor,
        part: RowRange,
        pairs: torch.Tensor,
        *,
        to_engine: bool,
    ) -> None:
        """Copy pages by one launch in ``stream``, which is the current one; see
        :func:`~lamina_kv.data.movers.page_copy.copy_pages`."""

    @property
    @abstractmethod
    def has_copy_engines(self) -> bool:
        """Whether :meth:`copy_batch` can be called."""

    @abstractmethod
    def copy_batch(self, stream: Stream, batch: Batch) -> None:
        """Have the device's copy engines make copies in ``stream``.

        Raises:
            RuntimeError: if the driver refuses one. Some of the others may be in ``stream``.
        """

    @abstractmethod
    def pinned(self, size: int) -> torch.Tensor:
        """``size`` bytes of pinned host memory."""

    @property
    @abstractmethod
    def numa_node(self) -> int | None:
        """The node of host memory that is near; None if all is alike."""

    @abstractmethod
    def register(self, address: int, length: int) -> None:
        """Pin host memory; takes its time.

        Raises:
            RuntimeError: if it cannot be pinned, or the device could not use it then.
        """

    @abstractmethod
    def unregister(self, address: int) -> None:
        """Let go of what was pinned at ``address``; takes its time."""

    @abstractmethod
    def synchronize(self, stream: Stream) -> None:
        """Wait for what is in ``stream``."""


class TorchEvent(Event):
    """A :class:`torch.cuda.Event`."""

    def __init__(self, stream: torch.cuda.Stream, *, timed: bool) -> None:
        # Blocking: a thread that waits sleeps; it would spin on one of the engine's cores.
        self.event = torch.cuda.Event(enable_timing=timed, blocking=True)
        self.event.record(stream)

    def wait(self) -> None:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        self.event.synchronize()

    def passed(self) -> bool:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        passed: bool = self.event.query()
        return passed

    def seconds_since(self, earlier: Event) -> float:
        """See :class:`Event`."""
        assert isinstance(earlier, TorchEvent)
        milliseconds: float = earlier.event.elapsed_time(self.event)
        return milliseconds * 1e-3


class TorchDevice(Device[torch.cuda.Stream]):
    """A CUDA device.

    Args:
        device: which.

    Raises:
        ImportError: if Triton is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        from lamina_kv.data.movers.page_copy import copy_pages  # nobody else needs Triton

        self._copy_pages = copy_pages
        self._device = device
        self._runtime: Any = torch.cuda.cudart()
        self._driver = Driver(device.index or 0)
        self._batched_copy = self._driver.batched_copy()

    def choose(self) -> None:
        """See :class:`Device`."""
        torch.cuda.set_device(self._device)
        # On a new thread that does nothing for the first device, which counts as chosen there, and
        # the thread has no context: NIXL, UCX and Triton look for it (pytorch #155668, #195256).
        # A question to the driver gives it one, and touches neither memory nor a stream.
        torch.cuda.mem_get_info(self._device)

    def stream(self, priority: int) -> torch.cuda.Stream:
        """See :class:`Device`."""
        return torch.cuda.Stream(self._device, priority=priority)

    def current_stream(self) -> torch.cuda.Stream:
        """See :class:`Device`."""
        return torch.cuda.current_stream(self._device)

    def record(self, stream: torch.cuda.Stream, *, timed: bool = False) -> Event:
        """See :class:`Device`."""
        return TorchEvent(stream, timed=timed)

    def hold(self, stream: torch.cuda.Stream, event: Event) -> None:
        """See :class:`Device`."""
        assert isinstance(event, TorchEvent)
        stream.wait_event(event.event)

    def upload(self, stream: torch.cuda.Stream, values: Indices) -> torch.Tensor:
        """See :class:`Device`."""
        # The pinned side need not be kept alive: torch's allocator waits for the copy before it
        # uses the memory again. Its device allocator hands the other side out in stream order.
        host = torch.from_numpy(values).pin_memory()
        return host.to(self._device, non_blocking=True)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        """See :class:`Device`."""
        return torch.cuda.stream(stream)

    def copy(
        self,
        stream: torch.cuda.Stream,
        near: torch.Tensor,
        rows: torch.Tensor,
        part: RowRange,
        pairs: torch.Tensor,
        *,
        to_engine: bool,
    ) -> None:
        """See :class:`Device`."""
        self._copy_pages(near, rows, part, pairs, to_engine=to_engine)

    @property
    def has_copy_engines(self) -> bool:
        """See :class:`Device`."""
        return self._batched_copy is not None

    def copy_batch(self, stream: torch.cuda.Stream, batch: Batch) -> None:
        """See :class:`Device`."""
        assert self._batched_copy is not None, "the driver has no such function"
        self._batched_copy.submit(batch, stream.cuda_stream)

    def pinned(self, size: int) -> torch.Tensor:
        """See :class:`Device`."""
        return torch.empty(size, dtype=torch.uint8).pin_memory()

    @property
    def numa_node(self) -> int | None:
        """See :class:`Device`."""
        try:
            return numa.node_of(self._driver.pci_address)
        except RuntimeError as error:
            log.info("the NUMA node of %s is not known: %s", self._device, error)
            return None

    @cached_property
    def _shares_addresses(self) -> bool:
        return self._driver.shares_addresses

    def register(self, address: int, length: int) -> None:
        """See :class:`Device`."""
        if not self._shares_addresses:
            raise RuntimeError(
                "kernels cannot reach pinned memory at its address on the host, as under WSL"
            )
        self._driver.relax_capture()  # the engine may be capturing graphs just now
        torch.cuda.check_error(int(self._runtime.cudaHostRegister(address, length, 0)))

    def unregister(self, address: int) -> None:
        """See :class:`Device`."""
        with torch.cuda.device(self._device):
            torch.cuda.check_error(int(self._runtime.cudaHostUnregister(address)))

    def synchronize(self, stream: torch.cuda.Stream) -> None:
        """See :class:`Device`."""
        stream.synchronize()

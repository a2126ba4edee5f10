"""What sections need of an engine on a device: memory, a compute stream, and streams that lag.

:class:`CudaLab` is the real one. The tests have one on the simulated device, so that what looks for
faults there is known to find them.

**CudaLab has not yet run on a GPU.**
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch

from lamina_kv.data.movers import cuda
from lamina_kv.data.movers.crossover import Way
from lamina_kv.data.movers.cuda import CudaMover
from lamina_kv.data.movers.device import Device, Event, TorchDevice
from lamina_kv.geometry import CacheGeometry

CYCLES_PER_SECOND = 1.5e9
"""Of a kernel that spins: somewhat less than a card's clock, since delays need not be exact."""

Bytes = npt.NDArray[np.uint8]


class Engine(ABC):
    """An engine's cache on a device, and a mover for it.

    Attributes:
        mover: the mover.
        allocations: flat uint8 tensors, the cache.
    """

    mover: CudaMover
    allocations: Sequence[torch.Tensor]

    @property
    @abstractmethod
    def streams(self) -> Sequence[Any]:
        """The compute stream and all of the mover's."""

    @abstractmethod
    def computing(self) -> AbstractContextManager[object]:
        """Inside, the compute stream is the calling thread's current one."""

    @abstractmethod
    def delay(self, stream: Any, seconds: float) -> None:
        """Have a stream do nothing for that long, behind what is in it."""

    @abstractmethod
    def fill(self, memory: torch.Tensor, value: int) -> None:
        """Have the compute stream write ``value`` into every byte of a part of the cache."""

    @abstractmethod
    def total(self, memory: torch.Tensor) -> Callable[[], int]:
        """Have the compute stream add up the bytes of a part of the cache. Returns what waits for
        the sum."""

    @abstractmethod
    def read(self, allocation: int) -> Bytes:
        """A copy of an allocation, once every stream has come to its end."""

    @abstractmethod
    def write(self, allocation: int, content: Bytes) -> None:
        """Set an allocation, and wait for that."""

    def close(self) -> None:
        """Wait for copies, and give memory back."""
        self.mover.close()


class Lab(ABC):
    """Makes engines.

    Attributes:
        is_large: whether memory of many GiB may be used.
        device: where torch puts what the model computes with.
    """

    is_large: bool
    device: torch.device

    @abstractmethod
    def pinner(self) -> Device[Any]:
        """The device as a mover has it, for memory without an engine."""

    @abstractmethod
    def open(self, geometry: CacheGeometry, *, ordered: bool = True) -> Engine:
        """An engine with such a cache.

        Args:
            geometry: the cache.
            ordered: whether streams wait for events. A section that finds no fault where they do
                not would find none at all.
        """

    @abstractmethod
    def programs(self, count: int) -> AbstractContextManager[object]:
        """Inside, the mover's kernel runs as that many programs."""

    def way(self, way: Way) -> AbstractContextManager[object]:
        """Inside, pages of every size take that way, where the device has both."""
        return patch.object(cuda, "way_of", lambda page_bytes, *, to_engine: way)


class WatchedDevice(TorchDevice):
    """A CUDA device that knows its streams.

    Args:
        device: which.
        ordered: see :meth:`Lab.open`.
    """

    def __init__(self, device: torch.device, *, ordered: bool) -> None:
        super().__init__(device)
        self._ordered = ordered
        self.made: list[torch.cuda.Stream] = []

    def stream(self, priority: int) -> torch.cuda.Stream:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        stream = super().stream(priority)
        self.made.append(stream)
        return stream

    def hold(self, stream: torch.cuda.Stream, event: Event) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        if self._ordered:
            super().hold(stream, event)


class CudaEngine(Engine):
    """See :class:`Engine`.

    Args:
        device: the device.
        geometry: the cache.
        ordered: see :meth:`Lab.open`.
    """

    def __init__(self, device: torch.device, geometry: CacheGeometry, *, ordered: bool) -> None:
        self.allocations = [
            torch.zeros(size, dtype=torch.uint8, device=device)
            for size in geometry.allocation_bytes
        ]
        torch.cuda.synchronize(device)
        self._device = device
        watched = WatchedDevice(device, ordered=ordered)
        self.mover = CudaMover(geometry, self.allocations, watched)
        self._compute = torch.cuda.Stream(device)
        self._made = watched.made

    @property
    def streams(self) -> Sequence[torch.cuda.Stream]:
        """See :class:`Engine`."""
        return [self._compute, *self._made]

    def computing(self) -> AbstractContextManager[object]:
        """See :class:`Engine`."""
        return torch.cuda.stream(self._compute)

    def delay(self, stream: torch.cuda.Stream, seconds: float) -> None:
        """See :class:`Engine`."""
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))

    def fill(self, memory: torch.Tensor, value: int) -> None:
        """See :class:`Engine`."""
        with self.computing():
            memory.fill_(value)

    def total(self, memory: torch.Tensor) -> Callable[[], int]:
        """See :class:`Engine`."""
        with self.computing():
            total = memory.sum(dtype=torch.int64)

        def wait() -> int:
            with self.computing():
                return int(total.item())

        return wait

    def read(self, allocation: int) -> Bytes:
        """See :class:`Engine`."""
        torch.cuda.synchronize(self._device)
        content: Bytes = self.allocations[allocation].cpu().numpy()
        return content

    def write(self, allocation: int, content: Bytes) -> None:
        """See :class:`Engine`."""
        self.allocations[allocation].copy_(torch.from_numpy(content))
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """See :class:`Engine`."""
        super().close()
        self.allocations = ()


class CudaLab(Lab):
    """See :class:`Lab`.

    Args:
        device: the device.
    """

    is_large = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pinner(self) -> TorchDevice:
        """See :class:`Lab`."""
        return TorchDevice(self.device)

    def open(self, geometry: CacheGeometry, *, ordered: bool = True) -> Engine:
        """See :class:`Lab`."""
        return CudaEngine(self.device, geometry, ordered=ordered)

    def programs(self, count: int) -> AbstractContextManager[object]:
        """See :class:`Lab`."""
        from lamina_kv.data.movers import page_copy  # nobody else needs Triton

        return patch.multiple(page_copy, LOAD_PROGRAMS=count, SAVE_PROGRAMS=count)

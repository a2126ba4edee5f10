"""What a mover is: the only code that touches an engine's cache memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lamina.data.shared_memory import MemoryFile
from lamina.geometry import CacheGeometry, Row

Indices = npt.NDArray[np.int64]
"""Page indices: one-dimensional, int64."""


def pages_of(row: Row, group: int, blocks: Indices) -> Indices:
    """Which pages of ``row`` the blocks of one of its groups are."""
    if not row.places:
        return blocks
    place = row.places[row.groups.index(group)]
    return blocks * place.scale + place.shift


class Fence(ABC):
    """Proof that bytes are written. On a CPU it is always passed."""

    @abstractmethod
    def wait(self) -> None:
        """Block the calling thread until the fence has passed (releases the GIL)."""

    @abstractmethod
    def passed(self) -> bool:
        """Whether the fence has passed, without blocking."""


class Mover(ABC):
    """Copies pages of one row between the engine's blocks and host memory.

    ``load`` and ``save`` are called from pipeline threads, several at a time for different
    rows or disjoint pages; they are thread safe and release the GIL while copying. There is
    no per-block Python loop on this path.

    Host pages are given as a uint8 tensor of shape ``(pages, page_bytes)``, C-contiguous, in
    memory from :meth:`allocate_host`. The pages written by one call must be distinct; the
    pages read need not be.

    Args:
        geometry: where pages are.
        allocations: one flat uint8 tensor for each backing allocation, on the device.

    Raises:
        ValueError: if the allocations are not what the geometry says.
    """

    def __init__(self, geometry: CacheGeometry, allocations: Sequence[torch.Tensor]) -> None:
        if len(allocations) != len(geometry.allocation_bytes):
            raise ValueError(
                f"the geometry has {len(geometry.allocation_bytes)} allocations, "
                f"{len(allocations)} tensors were given"
            )
        for index, (tensor, size) in enumerate(
            zip(allocations, geometry.allocation_bytes, strict=True)
        ):
            if tensor.dtype != torch.uint8 or tensor.ndim != 1 or not tensor.is_contiguous():
                raise ValueError(f"allocation {index} is not a flat uint8 tensor")
            if tensor.numel() < size:
                raise ValueError(
                    f"allocation {index} has {tensor.numel()} bytes, the geometry says {size}"
                )
            if tensor.device != allocations[0].device:
                raise ValueError(
                    f"allocation {index} is on {tensor.device}, allocation 0 on "
                    f"{allocations[0].device}: one mover serves one device"
                )
        self._geometry = geometry
        self._allocations = tuple(allocations)

    @abstractmethod
    def enter_thread(self) -> None:
        """Make this mover's device the calling thread's own, on which nothing else was called
        before. Every thread that moves pages, waits for fences or commits host memory calls it
        first, see :class:`~lamina.data.threads.Threads`."""

    @abstractmethod
    def allocate_host(self, size: int, file: MemoryFile | None = None) -> torch.Tensor:
        """A flat uint8 host tensor of ``size`` bytes, page aligned, fit for fast copies.

        Returns at once whatever the size: the memory is reserved now and made resident (and
        pinned where the device wants that) in the background. It reads as zeros, unless it is
        shared and another process has written there.

        Args:
            size: bytes.
            file: memory to be shared with other processes; None for private memory.

        Raises:
            ValueError: if ``size`` is not positive, or not the size of ``file``.
            OSError: if the machine has no such amount of memory.
        """

    @abstractmethod
    def await_host(self) -> None:
        """Return when host memory is fit for copies. Until then a copy waits, and who has been
        admitted to engine memory must not."""

    @abstractmethod
    def load(
        self,
        row: int,
        source: torch.Tensor,
        source_pages: Indices,
        pages: Indices,
        after: Fence,
    ) -> Fence:
        """Copy ``source[source_pages[i]]`` into page ``pages[i]`` of ``row``.

        Args:
            row: the row.
            source: host pages.
            source_pages: which of them to read.
            pages: pages of the engine to fill, see :func:`pages_of`.
            after: a fence behind whatever the engine submitted before these blocks became the
                load's: a device that runs behind its host may still be writing into a block
                that was freed and given away.

        Returns:
            A fence that passes when the bytes are in the engine; ``source`` may be reused then.

        Raises:
            IndexError: for an id outside the cache or the host pages; nothing was copied.
            ValueError: for indices or host pages of the wrong form; nothing was copied.
        """

    @abstractmethod
    def save(
        self,
        row: int,
        pages: Indices,
        target: torch.Tensor,
        target_pages: Indices,
        after: Fence,
    ) -> Fence:
        """Copy page ``pages[i]`` of ``row`` into ``target[target_pages[i]]``.

        Args:
            row: the row.
            pages: pages of the engine to read, see :func:`pages_of`.
            target: host pages.
            target_pages: which of them to fill.
            after: the fence behind which the row's bytes are written; a save cannot be
                made without one.

        Returns:
            A fence that passes when the engine's blocks have been read and ``target`` is filled.

        Raises:
            IndexError: for an id outside the cache or the host pages; nothing was copied.
            ValueError: for indices or host pages of the wrong form; nothing was copied.
        """

    @abstractmethod
    def fence_compute(self) -> Fence:
        """A fence behind everything the engine has submitted so far on the calling thread."""

    @abstractmethod
    def hold_compute(self, fence: Fence) -> None:
        """Make what the engine submits next run after ``fence``, without stalling the host if
        the device can order it itself."""

    @abstractmethod
    def close(self) -> None:
        """Wait for copies in flight and stop what runs in the background. Idempotent; host
        tensors stay readable until they are dropped, but take part in no more copies."""

    def _check(self, row: int, host: torch.Tensor, host_pages: Indices, pages: Indices) -> Row:
        """The geometry of ``row``, once everything about a copy has been found in order.

        Raises:
            IndexError, ValueError: as :meth:`load` and :meth:`save` say.
        """
        if not 0 <= row < len(self._geometry.rows):
            raise IndexError(f"row {row} of a cache of {len(self._geometry.rows)} rows")
        shape = self._geometry.rows[row]
        if (
            host.dtype != torch.uint8
            or host.ndim != 2
            or host.shape[1] != shape.page_bytes
            or not host.is_contiguous()
            or host.device.type != "cpu"
        ):
            raise ValueError(
                f"host pages of row {row} are a contiguous uint8 CPU tensor of shape "
                f"(pages, {shape.page_bytes}), not {host.dtype} {tuple(host.shape)} on "
                f"{host.device}"
            )
        _check_ids("host page", host_pages, host.shape[0])
        _check_ids("page", pages, self._geometry.num_blocks)
        if len(host_pages) != len(pages):
            raise ValueError(f"{len(host_pages)} host pages for {len(pages)} pages")
        return shape


def _check_ids(what: str, ids: Indices, count: int) -> None:
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise ValueError(f"{what} ids are one-dimensional int64, not {ids.ndim}-d {ids.dtype}")
    if len(ids) and (ids.min() < 0 or ids.max() >= count):
        raise IndexError(f"{what} ids {ids.min()} .. {ids.max()} are not all in 0 .. {count - 1}")


def make_mover(geometry: CacheGeometry, allocations: Sequence[torch.Tensor]) -> Mover:
    """The mover for the device that holds ``allocations``.

    Raises:
        ValueError: if there is no mover for that device, or as :class:`Mover` says.
    """
    if not allocations:
        raise ValueError("a mover needs the tensors that back the engine's cache")
    device = allocations[0].device.type
    if device == "cpu":
        from lamina.data.movers.cpu import CpuMover

        return CpuMover(geometry, allocations)
    if device == "cuda":
        from lamina.data.movers.cuda import CudaMover

        return CudaMover(geometry, allocations)
    raise ValueError(f"no mover for device {device!r}: Lamina moves pages of 'cpu' and 'cuda'")

"""What a mover is: the only code that touches an engine's cache memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from lamina_kv.data.near import Indices, NearSlab
from lamina_kv.data.shared_memory import MemoryFile
from lamina_kv.geometry import CacheGeometry, Row


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
    """Copies pages of one row between the engine's blocks and the near tier.

    ``load`` and ``save`` are called from pipeline threads, several at a time for different
    rows or disjoint pages; they are thread safe and release the GIL while copying. There is
    no per-block Python loop on this path.

    The near slab is in memory from :meth:`allocate_host`. The pages written by one call must be
    distinct; the pages read need not be.

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
        first, see :class:`~lamina_kv.data.threads.Threads`."""

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
    def await_near(self, near: NearSlab, near_pages: Indices) -> None:
        """Return when near pages are fit for copies. A copy that comes earlier waits, and a thread
        that was admitted to engine memory must not.

        Raises:
            RuntimeError: if they never will be.
        """

    @abstractmethod
    def load(
        self, row: int, near: NearSlab, near_pages: Indices, pages: Indices, after: Fence
    ) -> Fence:
        """Copy near page ``near_pages[i]`` into page ``pages[i]`` of ``row``.

        Args:
            row: the row.
            near: the near tier.
            near_pages: which of its pages to read.
            pages: pages of the engine to fill, see :func:`pages_of`.
            after: a fence behind whatever the engine submitted before these blocks became the
                load's: a device that runs behind its host may still be writing into a block
                that was freed and given away.

        Returns:
            A fence that passes when the bytes are in the engine; the near pages may be reused then.

        Raises:
            IndexError: for an id outside the cache or the near tier; nothing was copied.
            ValueError: for indices of the wrong form or a slab of another cache; nothing was
                copied.
        """

    @abstractmethod
    def save(
        self, row: int, pages: Indices, near: NearSlab, near_pages: Indices, after: Fence
    ) -> Fence:
        """Copy page ``pages[i]`` of ``row`` into near page ``near_pages[i]``.

        Args:
            row: the row.
            pages: pages of the engine to read, see :func:`pages_of`.
            near: the near tier.
            near_pages: which of its pages to fill.
            after: the fence behind which the row's bytes are written; a save cannot be
                made without one.

        Returns:
            A fence that passes when the engine's blocks have been read and the near pages are
            filled.

        Raises:
            IndexError: for an id outside the cache or the near tier; nothing was copied.
            ValueError: for indices of the wrong form or a slab of another cache; nothing was
                copied.
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

    def _check(self, row: int, near: NearSlab, near_pages: Indices, pages: Indices) -> Row:
        """The geometry of ``row``, once everything about a copy has been found in order.

        Raises:
            IndexError, ValueError: as :meth:`load` and :meth:`save` say.
        """
        if not 0 <= row < len(self._geometry.rows):
            raise IndexError(f"row {row} of a cache of {len(self._geometry.rows)} rows")
        if near.geometry is not self._geometry and near.geometry != self._geometry:
            raise ValueError("the near slab was made for another cache")
        _check_ids("near page", near_pages, near.page_count)
        _check_ids("page", pages, self._geometry.num_blocks)
        if len(near_pages) != len(pages):
            raise ValueError(f"{len(near_pages)} near pages for {len(pages)} pages")
        return self._geometry.rows[row]


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
        from lamina_kv.data.movers.cpu import CpuMover

        return CpuMover(geometry, allocations)
    if device == "cuda":
        from lamina_kv.data.movers.cuda import CudaMover

        return CudaMover(geometry, allocations)
    raise ValueError(f"no mover for device {device!r}: Lamina moves pages of 'cpu' and 'cuda'")

"""What a mover is: the only code that touches an engine's cache memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from lamina_kv.data.movers.fences import Fence
from lamina_kv.data.near import Indices, NearSlab
from lamina_kv.data.shared_memory import MemoryFile
from lamina_kv.geometry import CacheGeometry, Place, Row
from lamina_kv.plan import NearSlots


def place_of(row: Row, group: int) -> Place | None:
    """Where the blocks of a group are in ``row``; None if every block is the page of its number."""
    return row.places[row.groups.index(group)] if row.places else None


def pages_of(row: Row, group: int, blocks: Indices) -> Indices:
    """Which pages of ``row`` the blocks of one of its groups are."""
    place = place_of(row, group)
    return blocks if place is None else blocks * place.scale + place.shift


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Which pages a copy moves: near page ``near_pages[i]`` and page ``pages[i]`` of the engine.

    :meth:`Mover.pairs` makes and checks them. They are the same for every row of a load or a save
    whose groups and places are alike, so one object serves all of these copies, on any thread.

    Attributes:
        near: the near tier.
        near_pages: pages of it.
        pages: pages of the engine, see :func:`pages_of`.
    """

    near: NearSlab
    near_pages: Indices
    pages: Indices


class Mover(ABC):
    """Copies pages of rows between the engine's blocks and the near tier.

    ``load`` and ``save`` are called from pipeline threads, several at a time for different
    rows or disjoint pages; they are thread safe and release the GIL while copying. There is
    no per-block Python loop on this path, and on a device no per-row one.

    The near slab is in memory from :meth:`allocate_host`. The pages written by one call must be
    distinct; the pages read need not be.

    Args:
        geometry: where pages are.
        allocations: one flat uint8 tensor for each backing allocation, on the device.

    Attributes:
        shares_cores: whether copies run on the cores that compute, and so never beside that.

    Raises:
        ValueError: if the allocations are not what the geometry says.
    """

    shares_cores: ClassVar[bool] = False

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

    def near_slots(self, near: NearSlab) -> NearSlots:
        """How many of the slots may be copied to and from. Control orders nothing beyond."""
        return NearSlots(near.slots, near.slots)

    @abstractmethod
    def await_near(self, near: NearSlab, near_pages: Indices) -> None:
        """Return when near pages are fit for copies. A copy that comes earlier waits, and a thread
        that was admitted to engine memory must not.

        Raises:
            RuntimeError: if they never will be.
        """

    @abstractmethod
    def pairs(self, near: NearSlab, near_pages: Indices, pages: Indices) -> Pairs:
        """Check which pages are to be copied, once for all rows.

        Args:
            near: the near tier.
            near_pages: pages of it; int64, one-dimensional.
            pages: pages of the engine, as many, see :func:`pages_of`.

        Returns:
            What :meth:`load` and :meth:`save` of this mover take.

        Raises:
            IndexError: for an id outside the cache or the near tier.
            ValueError: for indices of the wrong form or a slab of another cache.
        """

    @abstractmethod
    def load(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = True
    ) -> Fence:
        """Copy near pages into pages of the engine, in each of ``rows``.

        Args:
            rows: the rows; all of them have these pages, and no two share bytes.
            pairs: which pages, from this mover's :meth:`pairs`.
            after: a fence behind whatever the engine submitted before these blocks became the
                load's: a device that runs behind its host may still be writing into a block
                that was freed and given away.
            urgent: whether a step waits for them. What is not urgent neither holds up what is nor
                takes more of the device than is left.

        Returns:
            A fence that passes when the bytes of all rows are in the engine; the near pages may be
            reused then.

        Raises:
            IndexError: for a row outside the cache; nothing was copied.
            CopyFailed: if the device refuses a part of it.
        """

    @abstractmethod
    def save(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = False
    ) -> Fence:
        """Copy pages of the engine into near pages, in each of ``rows``.

        Args:
            rows: the rows; all of them have these pages, and no two share bytes.
            pairs: which pages, from this mover's :meth:`pairs`.
            after: the fence behind which the bytes of all rows are written; a save cannot be
                made without one.
            urgent: whether a step waits for it. What is urgent does not stand behind what is not.

        Returns:
            A fence that passes when the engine's blocks have been read and the near pages are
            filled, in all rows. Of saves that are urgent, and of those that are not, fences pass in
            the order of their calls.

        Raises:
            IndexError: for a row outside the cache; nothing was copied.
            CopyFailed: if the device refuses a part of it.
        """

    @abstractmethod
    def fence_compute(self, *, timed: bool = False) -> Fence:
        """A fence behind everything the engine has submitted so far on the calling thread.

        Args:
            timed: whether :meth:`Fence.span` will be asked.
        """

    @abstractmethod
    def hold_compute(self, fence: Fence) -> None:
        """Make what the engine submits next run after ``fence``, without stalling the host if
        the device can order it itself."""

    @abstractmethod
    def close(self, *, process_ends: bool = False, timeout: float | None = None) -> bool:
        """Wait for copies in flight and stop what runs in the background. Idempotent; host
        tensors stay readable until they are dropped, but take part in no more copies.

        Args:
            process_ends: leave to the end of the process what takes long and ends with it.
            timeout: seconds that this may take; None for as long as it takes.

        Returns:
            Whether all has ended. If not, host memory is kept as :meth:`keep_memory` does.
        """

    @abstractmethod
    def keep_memory(self) -> None:
        """Leave host memory to the end of the process, because something may use it until then.
        Instead of :meth:`close`."""

    def _check(self, near: NearSlab, near_pages: Indices, pages: Indices) -> None:
        """Raise what :meth:`pairs` says."""
        if near.geometry is not self._geometry and near.geometry != self._geometry:
            raise ValueError("the near slab was made for another cache")
        _check_ids("near page", near_pages, near.page_count)
        _check_ids("page", pages, self._geometry.num_blocks)
        if len(near_pages) != len(pages):
            raise ValueError(f"{len(near_pages)} near pages for {len(pages)} pages")

    def _check_rows(self, rows: Sequence[int]) -> None:
        """Raise what :meth:`load` and :meth:`save` say."""
        count = len(self._geometry.rows)
        if rows and (min(rows) < 0 or max(rows) >= count):
            raise IndexError(f"rows {min(rows)} .. {max(rows)} of a cache of {count} rows")


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

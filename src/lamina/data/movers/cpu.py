"""The CPU mover: engine memory and host memory are both memory of this process.

A copy runs on the thread that asks for it, in numpy: torch would start an OpenMP team of its own
beside the engine's, and numpy copies pages of an opaque type at the speed of one large copy,
without the GIL. numpy moves a page once if the pages on one side are neighbours (a slice there,
an index on the other side), and twice, through memory of its own, if both sides are scattered;
that is done in tiles which stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina.data.movers.base import Fence, Indices, Mover
from lamina.data.movers.host_memory import POPULATE_PIECE, HostMemory, populate
from lamina.data.shared_memory import MemoryFile
from lamina.data.threads import Threads
from lamina.geometry import CacheGeometry, Row

Pages = npt.NDArray[Any]
"""Shape ``(n, 1)``: one opaque item for each page. Two dimensions, because numpy keeps the GIL for
few items when it indexes one."""

TILE_BYTES = 2 << 20
"""Bytes copied at a time when both sides are scattered: small enough for a processor's cache, large
enough that few calls have to wait for the GIL."""


class PassedFence(Fence):
    """The fence of a device that runs on the calling thread."""

    def wait(self) -> None:
        """Return at once."""

    def passed(self) -> bool:
        """True."""
        return True


_PASSED = PassedFence()


class CpuMover(Mover):
    """Copies with numpy on the calling thread; every fence it returns has passed.

    Args:
        geometry: where pages are.
        allocations: as :class:`~lamina.data.movers.base.Mover` says.
    """

    def __init__(self, geometry: CacheGeometry, allocations: Sequence[torch.Tensor]) -> None:
        super().__init__(geometry, allocations)
        self._rows = tuple(
            _row_pages(self._allocations[row.allocation], row, geometry.num_blocks)
            for row in geometry.rows
        )
        self._host: list[HostMemory] = []

    def enter_thread(self) -> None:
        """See :class:`~lamina.data.movers.base.Mover`. There is one CPU."""

    def allocate_host(self, size: int, file: MemoryFile | None = None) -> torch.Tensor:
        """See :class:`~lamina.data.movers.base.Mover`."""
        memory = HostMemory(size, POPULATE_PIECE, populate, file, Threads(self.enter_thread))
        self._host.append(memory)
        return memory.tensor

    def await_host(self) -> None:
        """See :class:`~lamina.data.movers.base.Mover`. Memory that is not resident is slow, no
        more."""

    def load(
        self,
        row: int,
        source: torch.Tensor,
        source_pages: Indices,
        pages: Indices,
        after: Fence,
    ) -> Fence:
        """See :class:`~lamina.data.movers.base.Mover`."""
        self._check(row, source, source_pages, pages)
        after.wait()
        _copy(_host_pages(source), source_pages, self._rows[row], pages)
        return _PASSED

    def save(
        self,
        row: int,
        pages: Indices,
        target: torch.Tensor,
        target_pages: Indices,
        after: Fence,
    ) -> Fence:
        """See :class:`~lamina.data.movers.base.Mover`."""
        self._check(row, target, target_pages, pages)
        after.wait()
        _copy(self._rows[row], pages, _host_pages(target), target_pages)
        return _PASSED

    def fence_compute(self) -> Fence:
        """See :class:`~lamina.data.movers.base.Mover`."""
        return _PASSED

    def hold_compute(self, fence: Fence) -> None:
        """See :class:`~lamina.data.movers.base.Mover`."""
        fence.wait()

    def close(self) -> None:
        """See :class:`~lamina.data.movers.base.Mover`."""
        while self._host:
            self._host.pop().close()


def _row_pages(allocation: torch.Tensor, row: Row, num_blocks: int) -> Pages:
    pages = np.lib.stride_tricks.as_strided(
        allocation.numpy()[row.offset :],
        shape=(num_blocks, row.page_bytes),
        strides=(row.block_stride, 1),
    )
    return pages.view(f"V{row.page_bytes}")


def _host_pages(host: torch.Tensor) -> Pages:
    return host.numpy().view(f"V{host.shape[1]}")


def _copy(source: Pages, source_ids: Indices, target: Pages, target_ids: Indices) -> None:
    """``target[target_ids] = source[source_ids]`` with as little traffic as numpy allows."""
    tile = max(1, TILE_BYTES // source.dtype.itemsize)
    most = 2 * -(-len(source_ids) // tile)  # calls that tiles would take
    if (runs := _runs(source_ids, most)) is not None:
        order, bounds = runs
        for start, end in pairwise(bounds):
            first = source_ids[order[start]]
            target[target_ids[order[start:end]]] = source[first : first + end - start]
        return
    # numpy copies an array that is not contiguous before it takes from it.
    takes = source.flags.c_contiguous and target.flags.c_contiguous
    if takes and (runs := _runs(target_ids, most)) is not None:
        order, bounds = runs
        for start, end in pairwise(bounds):
            first = target_ids[order[start]]
            out = target[first : first + end - start]
            # Not "raise": numpy would take into memory of its own and copy that.
            np.take(source, source_ids[order[start:end]], axis=0, out=out, mode="clip")
        return
    for start in range(0, len(source_ids), tile):
        part = slice(start, start + tile)
        target[target_ids[part]] = source[source_ids[part]]


def _runs(ids: Indices, most: int) -> tuple[Indices, list[int]] | None:
    """Cut ``ids`` into runs of neighbours.

    Returns:
        The order that sorts ``ids``, and where in it each run starts, with the end last; None if
        there are more than ``most`` runs.
    """
    order = np.argsort(ids, kind="stable")
    breaks = np.flatnonzero(np.diff(ids[order]) != 1) + 1
    if len(breaks) >= most:
        return None
    return order, [0, *breaks.tolist(), len(ids)]

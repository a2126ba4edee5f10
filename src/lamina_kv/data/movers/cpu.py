"""The CPU mover: engine memory and near memory are both memory of this process.

A copy runs on the thread that asks for it, in numpy: torch would start an OpenMP team of its own
beside the engine's, and numpy copies pages of an opaque type at the speed of one large copy,
without the GIL. numpy moves a page once where the engine's pages are neighbours (a slice there, an
index on the near side), and where long stretches are neighbours on the near side. Else it moves a
page twice, through memory of its own, in tiles which stay in the processor's cache.

Engines hand out blocks in runs: a pool is fresh, or gets back the blocks of one request together.
Near pages are neighbours within a slot only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina_kv.data.movers.base import Fence, Mover, Pairs
from lamina_kv.data.movers.host_memory import HostMemory
from lamina_kv.data.near import Indices, NearRow, NearSlab
from lamina_kv.data.shared_memory import MemoryFile
from lamina_kv.geometry import CacheGeometry, Row

Pages = npt.NDArray[Any]
"""Shape ``(n, 1)``: one opaque item for each page. Two dimensions, because numpy keeps the GIL for
few items when it indexes one."""

TILE_BYTES = 2 << 20
"""Bytes copied at a time when both sides are scattered: small enough for a processor's cache, large
enough that few calls have to wait for the GIL."""

LEAST_UNIT = 128
"""Bytes of the smallest near unit by which pages are gathered: of smaller ones the indices cost
more than a second copy."""


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
        allocations: as :class:`~lamina_kv.data.movers.base.Mover` says.
    """

    def __init__(self, geometry: CacheGeometry, allocations: Sequence[torch.Tensor]) -> None:
        super().__init__(geometry, allocations)
        self._rows = tuple(
            _row_pages(self._allocations[row.allocation], row, geometry.num_blocks)
            for row in geometry.rows
        )
        self._host: list[HostMemory] = []

    def enter_thread(self) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`. There is one CPU."""

    def allocate_host(self, size: int, file: MemoryFile | None = None) -> torch.Tensor:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        memory = HostMemory(size, file=file, enter=self.enter_thread)
        self._host.append(memory)
        return memory.tensor

    def await_near(self, near: NearSlab, near_pages: Indices) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`. Memory that is not resident is slow, no
        more."""

    def pairs(self, near: NearSlab, near_pages: Indices, pages: Indices) -> Pairs:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        self._check(near, near_pages, pages)
        return Pairs(near, near_pages, pages)

    def load(self, rows: Sequence[int], pairs: Pairs, after: Fence) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        self._check_rows(rows)
        after.wait()
        for row in rows:
            _load(pairs.near.rows[row], pairs.near_pages, self._rows[row], pairs.pages)
        return _PASSED

    def save(self, rows: Sequence[int], pairs: Pairs, after: Fence) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        self._check_rows(rows)
        after.wait()
        for row in rows:
            _save(self._rows[row], pairs.pages, pairs.near.rows[row], pairs.near_pages)
        return _PASSED

    def fence_compute(self) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        return _PASSED

    def hold_compute(self, fence: Fence) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        fence.wait()

    def close(self, *, process_ends: bool = False) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        while self._host:
            self._host.pop().close(process_ends=process_ends)


def _row_pages(allocation: torch.Tensor, row: Row, num_blocks: int) -> Pages:
    pages = np.lib.stride_tricks.as_strided(
        allocation.numpy()[row.offset :],
        shape=(num_blocks, row.page_bytes),
        strides=(row.block_stride, 1),
    )
    return pages.view(f"V{row.page_bytes}")


def _load(near: NearRow, near_pages: Indices, engine: Pages, pages: Indices) -> None:
    """``engine[pages] = near[near_pages]`` with as little traffic as numpy allows."""
    tile = max(1, TILE_BYTES // engine.dtype.itemsize)
    most = 2 * -(-len(pages) // tile)  # calls that tiles would take
    # numpy copies an array that is not contiguous before it gathers into it.
    gathers = engine.flags.c_contiguous and near.unit >= LEAST_UNIT
    if gathers and (runs := _runs(pages, most)) is not None:
        order, bounds = runs
        target = engine.view(f"V{near.unit}").reshape(-1)
        units = near.units_of(near_pages[order])
        for start, end in pairwise(bounds):
            wanted = units[start:end].reshape(-1)
            first = pages[order[start]] * units.shape[1]
            # Not "raise": numpy would gather into memory of its own and copy that.
            np.take(near.units, wanted, out=target[first : first + len(wanted)], mode="clip")
    elif (stretches := near.stretches(near_pages, most)) is not None:
        for start, end in pairwise(stretches):
            engine[pages[start:end]] = near.stretch(near_pages[start], end - start)
    else:
        begins = near.begins(near_pages)
        for start in range(0, len(pages), tile):
            part = slice(start, start + tile)
            engine[pages[part]] = near.pages[begins[part]]


def _save(engine: Pages, pages: Indices, near: NearRow, near_pages: Indices) -> None:
    """``near[near_pages] = engine[pages]`` with as little traffic as numpy allows."""
    tile = max(1, TILE_BYTES // engine.dtype.itemsize)
    most = 2 * -(-len(pages) // tile)
    gathers = engine.flags.c_contiguous
    if (runs := _runs(pages, most)) is not None:
        order, bounds = runs
        begins = near.begins(near_pages[order])
        for start, end in pairwise(bounds):
            first = pages[order[start]]
            near.pages[begins[start:end]] = engine[first : first + end - start]
    elif gathers and (stretches := near.stretches(near_pages, most)) is not None:
        for start, end in pairwise(stretches):
            out = near.stretch(near_pages[start], end - start)
            np.take(engine, pages[start:end], axis=0, out=out, mode="clip")
    else:
        begins = near.begins(near_pages)
        for start in range(0, len(pages), tile):
            part = slice(start, start + tile)
            near.pages[begins[part]] = engine[pages[part]]


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

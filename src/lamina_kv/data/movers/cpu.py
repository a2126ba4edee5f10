"""The CPU mover: engine memory and near memory are both memory of this process.

A copy runs on the thread that asks for it, in numpy: torch would start an OpenMP team of its own
beside the engine's, and numpy copies pages of an opaque type at the speed of one large copy,
without the GIL. Of small copies, rows at equal distances are copied by the same calls of numpy,
because each call takes the GIL.

numpy moves a page once where, of one row, long stretches are neighbours on the near side, and where
the engine's pages are neighbours (a slice there, an index on the near side), loads of several rows
left out. Else it moves a page twice, through memory of its own, in tiles which stay in the
processor's cache.

Engines hand out blocks in runs: a pool is fresh, or gets back the blocks of one request together.
Near pages are neighbours within a slot only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina_kv.data.movers.base import Mover, Pairs
from lamina_kv.data.movers.fences import Fence
from lamina_kv.data.movers.host_memory import HostMemory, close_all
from lamina_kv.data.near import Indices, NearRows, NearSlab
from lamina_kv.data.shared_memory import MemoryFile
from lamina_kv.geometry import Band, CacheGeometry

Pages = npt.NDArray[Any]
"""Shape ``(n, rows)``: one opaque item for each page. Two dimensions also for one row, because
numpy keeps the GIL for few items when it indexes one."""

APART_BYTES = 512 << 10
"""Bytes of a row of the largest pages from which on rows are copied one by one. 16 pages of 64 KiB
of 64 rows take 2.8 ms then, and 3.6 ms together; 64 pages of 4 KiB 0.70 ms together, and 0.79 ms
one by one (AMD EPYC, one thread)."""

TILE_BYTES = 2 << 20
"""Bytes copied at a time when both sides are scattered: small enough for a processor's cache, large
enough that few calls have to wait for the GIL."""

STRETCH_BYTES = 256 << 10
"""Bytes of a near stretch, on average, that is copied by a call of its own. Such a call copies 22
GB/s where units of 4 KiB are gathered at 17 (AMD EPYC, one thread). Shorter stretches gain less,
and each call has to wait for the GIL."""

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

    def join(self, other: Fence) -> Fence:
        """The other one."""
        return other


_PASSED = PassedFence()


Step = Callable[[NearRows, Pages], None]
"""Some pages of a band are copied."""

Plan = Callable[[NearRows, Pages, Pairs], list[Step]]
"""Works out the steps of a copy, which are the same for bands of the same form."""


@dataclass(frozen=True, slots=True, eq=False)
class CpuPairs(Pairs):
    """Pairs that know how to be copied.

    Attributes:
        courses: the steps, by direction and form of the band. Threads may work them out twice.
    """

    courses: dict[tuple[object, ...], list[Step]] = field(default_factory=dict)

    def course(self, plan: Plan, near: NearRows, engine: Pages) -> list[Step]:
        """The steps for a band."""
        form = (plan, engine.dtype.itemsize, engine.shape[1], engine.flags.c_contiguous)
        if (course := self.courses.get(form)) is None:
            course = self.courses[form] = plan(near, engine, self)
        return course


class CpuMover(Mover):
    """Copies with numpy on the calling thread; every fence it returns has passed.

    Args:
        geometry: where pages are.
        allocations: as :class:`~lamina_kv.data.movers.base.Mover` says.
    """

    shares_cores = True

    def __init__(self, geometry: CacheGeometry, allocations: Sequence[torch.Tensor]) -> None:
        super().__init__(geometry, allocations)
        self._bands: dict[tuple[int, ...], list[tuple[Band, Pages]]] = {}
        self._largest_page = max(row.page_bytes for row in geometry.rows)
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
        return CpuPairs(near, near_pages, pages)

    def load(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = True
    ) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        return self._copy(_load_course, rows, pairs, after)

    def save(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = False
    ) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        return self._copy(_save_course, rows, pairs, after)

    def _copy(self, plan: Plan, rows: Sequence[int], pairs: Pairs, after: Fence) -> Fence:
        self._check_rows(rows)
        if not isinstance(pairs, CpuPairs):
            raise TypeError("these pairs are from another mover")
        after.wait()
        apart = len(pairs.pages) * self._largest_page >= APART_BYTES
        for chosen in [(row,) for row in rows] if apart else [tuple(rows)]:
            for band, engine in self._bands_of(chosen):
                near = pairs.near.rows(band)
                for step in pairs.course(plan, near, engine):
                    step(near, engine)
        return _PASSED

    def _bands_of(self, rows: tuple[int, ...]) -> list[tuple[Band, Pages]]:
        """Rows as bands, and their pages. Few sets of rows are ever copied."""
        if (bands := self._bands.get(rows)) is None:
            found = self._geometry.bands(rows)
            bands = self._bands[rows] = [(band, self._pages(band)) for band in found]
        return bands

    def _pages(self, band: Band) -> Pages:
        row = self._geometry.rows[band.first]
        shape = (self._geometry.num_blocks, band.rows)
        strides = (row.block_stride, band.spacing)
        memory = self._allocations[row.allocation].numpy()
        return np.ndarray(shape, f"V{row.page_bytes}", memory, row.offset, strides)

    def fence_compute(self, *, timed: bool = False) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        return _PASSED

    def hold_compute(self, fence: Fence) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        fence.wait()

    def close(self, *, process_ends: bool = False, timeout: float | None = None) -> bool:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        return close_all(self._host, process_ends=process_ends, timeout=timeout)

    def keep_memory(self) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        for memory in self._host:
            memory.keep()


def _load_course(near: NearRows, engine: Pages, pairs: Pairs) -> list[Step]:
    """``engine[pages] = near[near_pages]`` with as little traffic as numpy allows."""
    near_pages, pages = pairs.near_pages, pairs.pages
    size = engine.dtype.itemsize * engine.shape[1]
    tile = max(1, TILE_BYTES // size)
    long = max(2, len(pages) * size // STRETCH_BYTES)
    if (stretches := near.stretches(near_pages, long)) is not None:
        return [
            partial(_put_stretch, near_pages[start], pages[start:end])
            for start, end in pairwise(stretches)
        ]
    # numpy copies an array that is not contiguous before it gathers into it.
    gathers = engine.shape[1] == 1 and engine.flags.c_contiguous and near.unit >= LEAST_UNIT
    if gathers and (runs := _runs(pages, 2 * -(-len(pages) // tile))) is not None:
        order, bounds = runs
        units = near.units_of(near_pages[order])
        return [
            partial(_take_units, units[start:end].reshape(-1), pages[order[start]] * units.shape[1])
            for start, end in pairwise(bounds)
        ]
    begins = near.begins(near_pages)
    return [
        partial(_put_pages, begins[start : start + tile], pages[start : start + tile])
        for start in range(0, len(pages), tile)
    ]


def _take_units(wanted: Indices, first: int, near: NearRows, engine: Pages) -> None:
    """Gather units of the near side into neighbouring pages of the engine."""
    target = engine.view(f"V{near.unit}").reshape(-1)
    # Not "raise": numpy would gather into memory of its own and copy that.
    np.take(near.units, wanted, out=target[first : first + len(wanted)], mode="clip")


def _put_stretch(page: int, pages: Indices, near: NearRows, engine: Pages) -> None:
    """Scatter neighbours of the near side over pages of the engine."""
    engine[pages] = near.stretch(page, len(pages))


def _put_pages(begins: Indices, pages: Indices, near: NearRows, engine: Pages) -> None:
    """Scatter pages of the near side over pages of the engine."""
    engine[pages] = near.pages[begins]


def _save_course(near: NearRows, engine: Pages, pairs: Pairs) -> list[Step]:
    """``near[near_pages] = engine[pages]`` with as little traffic as numpy allows."""
    near_pages, pages = pairs.near_pages, pairs.pages
    tile = max(1, TILE_BYTES // (engine.dtype.itemsize * engine.shape[1]))
    most = 2 * -(-len(pages) // tile)
    if (runs := _runs(pages, most)) is not None:
        order, bounds = runs
        begins = near.begins(near_pages[order])
        return [
            partial(_store_run, begins[start:end], pages[order[start]])
            for start, end in pairwise(bounds)
        ]
    stretches = near.stretches(near_pages, most) if engine.flags.c_contiguous else None
    if stretches is not None:
        return [
            partial(_store_stretch, near_pages[start], pages[start:end])
            for start, end in pairwise(stretches)
        ]
    begins = near.begins(near_pages)
    return [
        partial(_store_pages, begins[start : start + tile], pages[start : start + tile])
        for start in range(0, len(pages), tile)
    ]


def _store_run(begins: Indices, first: int, near: NearRows, engine: Pages) -> None:
    """Scatter neighbouring pages of the engine over the near side."""
    near.pages[begins] = engine[first : first + len(begins)]


def _store_stretch(page: int, pages: Indices, near: NearRows, engine: Pages) -> None:
    """Gather pages of the engine into neighbours of the near side."""
    np.take(engine, pages, axis=0, out=near.stretch(page, len(pages)), mode="clip")


def _store_pages(begins: Indices, pages: Indices, near: NearRows, engine: Pages) -> None:
    """Scatter pages of the engine over the near side."""
    near.pages[begins] = engine[pages]


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

"""Copies of a whole cache in pieces, as sections of times make them, and what they took."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu.lab import Engine, Lab
from gpu.pages import PER_SLOT, Ids, layer_outermost
from lamina_kv.data.movers.base import Pairs
from lamina_kv.data.movers.crossover import Way
from lamina_kv.data.movers.fences import Fence
from lamina_kv.data.near import NearSlab


class Cache:
    """An engine, and a near slab that holds all of its cache once.

    Args:
        lab: where.
        page: bytes of a page.
        size: bytes of all pages of a row, about.
        rows: how many.

    Attributes:
        engine: the engine.
        near: the slab, fit for copies.
        ids: of all pages.
        size: bytes of all pages of a row.
    """

    def __init__(self, lab: Lab, page: int, size: int, rows: int = 1) -> None:
        slots = max(1, size // page // PER_SLOT)
        geometry = layer_outermost(page, slots * PER_SLOT, rows)
        self.engine: Engine = lab.open(geometry)
        mover = self.engine.mover
        self.near = NearSlab(geometry, slots * geometry.object_bytes, mover.allocate_host)
        self.ids: Ids = np.arange(slots * PER_SLOT, dtype=np.int64)
        self.size = page * len(self.ids)
        mover.await_near(self.near, self.ids)

    def pairs(self, pages: Ids, blocks: Ids) -> Pairs:
        """See :meth:`~lamina_kv.data.movers.base.Mover.pairs`."""
        return self.engine.mover.pairs(self.near, pages, blocks)

    def pieces(self, size: int, *, scattered: bool, seed: int = 0) -> list[Pairs]:
        """All pages, in pieces of about ``size`` bytes."""
        rng = np.random.default_rng(seed)
        page = self.size // len(self.ids)
        pages, blocks = (rng.permutation(self.ids) if scattered else self.ids for _ in range(2))
        each = max(1, size // page)
        starts = range(0, len(self.ids), each)
        return [self.pairs(pages[at : at + each], blocks[at : at + each]) for at in starts]

    @property
    def ways(self) -> list[Way]:
        """The ways that the device has."""
        return [*Way] if self.engine.mover.has_copy_engines else [Way.KERNEL]

    def move(
        self, pieces: Sequence[Pairs], *, to_engine: bool, rows: Sequence[int] = (0,)
    ) -> list[Fence]:
        """Launch copies of all pieces, one behind the other."""
        mover = self.engine.mover
        with self.engine.computing():
            after = mover.fence_compute()
        copy = mover.load if to_engine else mover.save
        return [copy(rows, pairs, after) for pairs in pieces]

    def close(self) -> None:
        """Give memory back."""
        self.engine.close()


def seconds(fences: Sequence[Fence]) -> float:
    """Device time from the first one's begin to the last one's end; waits for them.

    Raises:
        RuntimeError: if the mover tells no time.
    """
    for fence in fences:
        fence.wait()
    first, last = fences[0].span(), fences[-1].span()
    if first is None or last is None:
        raise RuntimeError("this mover's fences tell no time")
    return max(last[1] - first[0], 1e-9)

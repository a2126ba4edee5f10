"""Caches of many layouts, and a model of their bytes: what copies must leave, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lamina_kv.geometry import CacheGeometry, Row

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]

BLOCK_TOKENS, PER_SLOT = 16, 4
PAGE_BYTES = (1, 7, 24, 132 * 64, 584 * 64, 656 * 64, 18432, 20000, 32784, 65536, 1 << 20)
"""Odd ones, pages of attention's caches, of latent ones and of their indexers."""

PATTERN_BYTES = 1_048_573
"""A prime: a page that is read or written somewhere else does not look right by accident."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A cache and a near slab for it.

    Attributes:
        name: what is special of it.
        geometry: the cache.
        slots: near slots.
    """

    name: str
    geometry: CacheGeometry
    slots: int


def layer_outermost(page: int, blocks: int, rows: int = 3, start: int = 0) -> CacheGeometry:
    """All pages of a layer are neighbours (vLLM's LBNHC and LBHNC).

    Args:
        page: bytes of a page.
        blocks: pages of a row.
        rows: how many.
        start: bytes before the first one.
    """
    each = page * blocks
    held = tuple(Row((str(row),), 0, start + row * each, page, page) for row in range(rows))
    return _geometry(held, blocks, start + rows * each)


def block_outermost(page: int, blocks: int, stride: int, rows: int = 3) -> CacheGeometry:
    """All layers of a block are neighbours (BLNHC and BLHNC), blocks are ``stride`` bytes apart."""
    held = tuple(Row((str(row),), 0, row * page, stride, page) for row in range(rows))
    return _geometry(held, blocks, (blocks - 1) * stride + rows * page)


def aliased(page: int, blocks: int) -> CacheGeometry:
    """Layers of two groups use the same bytes."""
    geometry = layer_outermost(page, blocks)
    again = replace(geometry.rows[0], layers=("again",))
    return _geometry((*geometry.rows, again), blocks, geometry.allocation_bytes[0])


def layouts(*, large: bool) -> Iterator[Layout]:
    """All layouts.

    Args:
        large: also those that take many GiB.
    """
    for page in PAGE_BYTES:
        yield Layout(f"layer outermost, {page} B", layer_outermost(page, 12), 3)
        yield Layout(f"block outermost, {page} B", block_outermost(page, 6, 3 * page + 48), 3)
    yield Layout("not aligned, 20000 B", layer_outermost(20000, 8, start=13), 3)
    yield Layout("aliased, 18432 B", aliased(18432, 12), 3)
    if large:
        far = block_outermost(65536, 12, 4_500_000)
        yield Layout("block outermost, stride 4.5 MB", far, 3)
        yield Layout("several pinned ranges, 1 MiB", layer_outermost(1 << 20, 24), 30)
        beyond = block_outermost(65536, 5, 5 << 28)
        yield Layout("beyond 4 GiB, cache and slab", beyond, (9 << 29) // beyond.object_bytes)


def _geometry(rows: tuple[Row, ...], blocks: int, size: int) -> CacheGeometry:
    return CacheGeometry(rows, blocks, BLOCK_TOKENS, BLOCK_TOKENS * PER_SLOT, (size,))


def pattern(size: int, rng: np.random.Generator) -> Bytes:
    """``size`` bytes that repeat only after a prime number of them."""
    return np.resize(rng.integers(0, 256, PATTERN_BYTES, dtype=np.uint8), size)


class PageModel:
    """The bytes of one allocation and of the near slab, as copies must leave them.

    Args:
        geometry: the cache.
        engine: the allocation's bytes.
        near: the slab's.

    Attributes:
        engine: the allocation's bytes now.
        near: the slab's now.
    """

    def __init__(self, geometry: CacheGeometry, engine: Bytes, near: Bytes) -> None:
        self._geometry = geometry
        self.engine = engine.copy()
        self.near = near.copy()

    def copy(self, rows: Sequence[int], pages: Ids, blocks: Ids, *, to_engine: bool) -> None:
        """Copy pages, one after the other."""
        geometry = self._geometry
        for index in rows:
            row = geometry.rows[index]
            for page, block in zip(pages.tolist(), blocks.tolist(), strict=True):
                slot, place = divmod(page, geometry.blocks_per_chunk)
                held = slot * geometry.object_bytes + geometry.extent_offsets[index]
                held += place * row.page_bytes
                here = row.offset + block * row.block_stride
                near = self.near[held : held + row.page_bytes]
                engine = self.engine[here : here + row.page_bytes]
                if to_engine:
                    engine[:] = near
                else:
                    near[:] = engine

    def differing(self, engine: Bytes, near: Bytes) -> int:
        """How many bytes are not as they must be, padding and pages that were not named too."""
        wrong = np.count_nonzero(self.engine != engine) + np.count_nonzero(self.near != near)
        return int(wrong)

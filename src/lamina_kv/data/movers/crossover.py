"""Kernel or copy engine: which of the two moves pages of a size, in a direction.

A kernel takes multiprocessors from the model, and starts at once however many pages there are. A
copy engine takes none, and a while for each page: with small ones it does not fill the link.

The figures are those that an engine's own offloading rests on (``swap_blocks_triton.py``, measured
on an H100 with PCIe 5): into the GPU a kernel wins below 28 KiB a page; out of it the copy engine
does, at every size. **Nothing of this was measured with Lamina**: ``bench/gpu/acceptance.py`` does.
"""

from __future__ import annotations

from enum import StrEnum


class Way(StrEnum):
    """What moves the pages."""

    KERNEL = "kernel"
    COPY_ENGINE = "copy engine"


LOADS: tuple[tuple[int, Way], ...] = ((0, Way.KERNEL), (28 << 10, Way.COPY_ENGINE))
"""From so many bytes of a page on, which way to take into the GPU; increasing, from 0 on."""

SAVES: tuple[tuple[int, Way], ...] = ((0, Way.COPY_ENGINE),)
"""The same out of the GPU."""


def way_of(page_bytes: int, *, to_engine: bool) -> Way:
    """Which way pages of a size take, where a device has both.

    Args:
        page_bytes: bytes of a page.
        to_engine: the direction.
    """
    table = LOADS if to_engine else SAVES
    return next(way for least, way in reversed(table) if page_bytes >= least)

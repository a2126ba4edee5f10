"""The near tier: one slab of host memory, cut into slots.

::

    slot 0                                            slot 1
    header | row 0: page 0 page 1 … | row 1: … | pad | header | row 0: …

A slot holds one chunk's whole object, as far tiers do: a move is one read or write without a copy.
Near page ``slot * blocks_per_chunk + block`` of a row is a block of the chunk in that slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina_kv.geometry import Band, CacheGeometry, Row
from lamina_kv.quantities import size_of
from lamina_kv.values import format_size

Indices = npt.NDArray[np.int64]
"""Page indices: one-dimensional, int64."""


Items = npt.NDArray[Any]
"""Opaque items of some bytes each, views of the slab."""


def near_unit(geometry: CacheGeometry, row: Row) -> int:
    """The stride of a row's near pages in bytes. Pages of a slot are neighbours and slots are
    further apart; every page begins at a multiple of what divides both distances."""
    return math.gcd(row.page_bytes, geometry.object_bytes)


class NearRows:
    """Where the near pages of some rows are.

    Args:
        memory: the slab.
        geometry: the engine's cache.
        band: the rows.

    Attributes:
        memory: the slab from page 0 of the first row on; flat, uint8.
        unit: see :func:`near_unit`.
    """

    def __init__(self, memory: torch.Tensor, geometry: CacheGeometry, band: Band) -> None:
        shape = geometry.rows[band.first]
        self.memory = memory[geometry.extent_offsets[band.first] :]
        self._bytes: npt.NDArray[np.uint8] = self.memory.numpy()
        self._band = band
        self.unit = near_unit(geometry, shape)
        self._page_bytes = shape.page_bytes
        self._per_slot = geometry.blocks_per_chunk
        self._page_units = shape.page_bytes // self.unit
        self._slot_units = geometry.object_bytes // self.unit

    def begins(self, pages: Indices) -> Indices:
        """The unit at which each page begins."""
        slots, blocks = np.divmod(pages, self._per_slot)
        begins: Indices = slots * self._slot_units + blocks * self._page_units
        return begins

    def units_of(self, pages: Indices) -> Indices:
        """All units of each page; shape ``(n, page_bytes / unit)``."""
        return self.begins(pages)[:, None] + np.arange(self._page_units)

    def stretches(self, pages: Indices, most: int) -> list[int] | None:
        """Cut ``pages`` where the next one is not its neighbour in memory.

        Returns:
            Where each stretch starts, with the end last; None if there are more than ``most``, or
            several rows.
        """
        if self._band.rows > 1:
            return None
        apart = (np.diff(pages) != 1) | (pages[1:] % self._per_slot == 0)
        breaks = np.flatnonzero(apart) + 1
        if len(breaks) >= most:
            return None
        return [0, *breaks.tolist(), len(pages)] if len(pages) else [0]

    def stretch(self, page: int, count: int) -> Items:
        """``count`` pages of one slot from ``page`` on; shape ``(count, 1)``, contiguous."""
        slot, block = divmod(page, self._per_slot)
        start = slot * self._slot_units + block * self._page_units
        flat = self._bytes[start * self.unit :][: count * self._page_bytes]
        return flat.view(f"V{self._page_bytes}").reshape(-1, 1)

    @cached_property
    def units(self) -> Items:
        """Shape ``(n,)``: every unit, from page 0 on."""
        return self._bytes[: len(self._bytes) // self.unit * self.unit].view(f"V{self.unit}")

    @cached_property
    def pages(self) -> Items:
        """Shape ``(n, rows)``: the page that begins at each unit, whether or not one does."""
        count, size, spacing = self._band.rows, self._page_bytes, self._band.near_spacing
        units = (len(self._bytes) - (count - 1) * spacing - size) // self.unit + 1
        return np.ndarray((units, count), f"V{size}", self._bytes, 0, (self.unit, spacing))


class NearSlab:
    """The slots.

    Args:
        geometry: the engine's cache.
        capacity: bytes that the slab may take.
        allocate: gives host memory fit for fast copies, usually a mover's ``allocate_host``.

    Attributes:
        geometry: the engine's cache.
        slots: how many chunks fit.
        memory: shape ``(slots * object_bytes,)``, uint8.

    Raises:
        ValueError: if ``capacity`` is smaller than one chunk.
    """

    def __init__(
        self, geometry: CacheGeometry, capacity: int, allocate: Callable[[int], torch.Tensor]
    ) -> None:
        size = geometry.object_bytes
        self.slots = capacity // size
        if self.slots < 1:
            raise ValueError(
                f"host.capacity: {size_of(capacity)} for this rank is less than one chunk of "
                f"{geometry.chunk_tokens} tokens: use at least {format_size(size)}, or smaller "
                "chunks (chunk_tokens)"
            )
        self.geometry = geometry
        self.memory = allocate(self.slots * size)
        self._objects = self.memory.numpy().reshape(self.slots, size)
        self._rows: dict[Band, NearRows] = {}

    @property
    def page_count(self) -> int:
        """Near pages of each row."""
        return self.slots * self.geometry.blocks_per_chunk

    def rows(self, band: Band) -> NearRows:
        """The pages of some rows."""
        if (rows := self._rows.get(band)) is None:
            rows = self._rows[band] = NearRows(self.memory, self.geometry, band)
        return rows

    def object(self, slot: int) -> npt.NDArray[np.uint8]:
        """A slot's bytes as a view; shape ``(object_bytes,)``, as
        :mod:`lamina_kv.tiers.objects` describes them."""
        view: npt.NDArray[np.uint8] = self._objects[slot]
        return view

    def end_of(self, pages: Indices) -> int:
        """The byte at which the last of the slots of some pages ends; 0 if there are no pages."""
        if not len(pages):
            return 0
        slot = int(pages.max()) // self.geometry.blocks_per_chunk
        return (slot + 1) * self.geometry.object_bytes

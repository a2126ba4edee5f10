"""Where the rows of a cache are, as a kernel reads it: one table for a whole launch.

Rows that one launch can copy stand together: they have the same strides and page size, and their
blocks are cut alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lamina_kv.geometry import CacheGeometry

LONGEST_ACCESS = 16
"""Bytes that a kernel reads or writes at once at most."""


@dataclass(frozen=True, slots=True, order=True)
class RowShape:
    """What rows of one launch have in common; what a kernel is compiled for.

    Attributes:
        block_stride: bytes from one page of the engine to the next.
        page_bytes: bytes of a page.
        slot_bytes: bytes from one near slot to the next.
        slot_pages: pages of a near slot in a row.
        alignment: bytes that divide every address and ``page_bytes``; at most
            :data:`LONGEST_ACCESS`.
    """

    block_stride: int
    page_bytes: int
    slot_bytes: int
    slot_pages: int
    alignment: int


@dataclass(frozen=True, slots=True)
class RowRange:
    """Neighbours in the table.

    Attributes:
        shape: of all of them.
        first: the first one's entry.
        count: how many.
    """

    shape: RowShape
    first: int
    count: int


class RowTable:
    """See the module.

    Args:
        geometry: the engine's cache.
        addresses: of page 0 of each row, on the device.

    Attributes:
        entries: int64, shape ``(rows, 2)``: address of a row's page 0 of the engine, and the byte
            of the near slab at which its page 0 begins.
    """

    def __init__(self, geometry: CacheGeometry, addresses: Sequence[int]) -> None:
        shapes = [
            RowShape(
                row.block_stride,
                row.page_bytes,
                geometry.object_bytes,
                geometry.blocks_per_chunk,
                # The near slab begins at a page of memory.
                math.gcd(
                    LONGEST_ACCESS, address, row.block_stride, row.page_bytes,
                    offset, geometry.object_bytes,
                ),
            )
            for row, address, offset in zip(
                geometry.rows, addresses, geometry.extent_offsets, strict=True
            )
        ]  # fmt: skip
        cuts = [(row.groups, [(p.scale, p.shift) for p in row.places]) for row in geometry.rows]
        order = sorted(range(len(shapes)), key=lambda row: (shapes[row], cuts[row]))
        numbers = {shape: number for number, shape in enumerate(dict.fromkeys(shapes))}
        self._shapes = list(numbers)
        self._shape_of = [numbers[shapes[row]] for row in order]
        self._entry_of = {row: entry for entry, row in enumerate(order)}
        self.entries: npt.NDArray[np.int64] = np.array(
            [(addresses[row], geometry.extent_offsets[row]) for row in order], np.int64
        )

    def ranges(self, rows: Sequence[int]) -> list[RowRange]:
        """Cut ``rows``, which are distinct, into what one launch each can copy."""
        entries = sorted(map(self._entry_of.__getitem__, rows))
        shape_of, cuts = self._shape_of, [0]
        for index, (last, entry) in enumerate(pairwise(entries), 1):
            if entry != last + 1 or shape_of[entry] != shape_of[last]:
                cuts.append(index)
        return [
            RowRange(self._shapes[shape_of[entries[start]]], entries[start], end - start)
            for start, end in pairwise([*cuts, len(entries)])
            if start < end
        ]

    def shapes(self) -> tuple[RowShape, ...]:
        """The shapes of all rows, each once."""
        return tuple(self._shapes)

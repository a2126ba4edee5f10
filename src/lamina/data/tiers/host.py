"""The host tier: one slab of host memory, laid out ``[row][slot][page]``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from lamina.geometry import CacheGeometry, align_up


class HostTier:
    """Chunk-sized slots in host memory, so that one row of neighbouring slots is contiguous.

    Args:
        geometry: the engine's cache.
        capacity: bytes that the slab may take.
        allocate: gives host memory fit for fast copies, usually a mover's ``allocate_host``.

    Raises:
        ValueError: if ``capacity`` is smaller than one chunk.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        capacity: int,
        allocate: Callable[[int], torch.Tensor],
    ) -> None:
        slots = capacity // geometry.chunk_bytes
        if slots < 1:
            raise ValueError(
                f"host.capacity: {capacity} bytes for this rank is less than one chunk of "
                f"{geometry.chunk_bytes} bytes ({geometry.chunk_tokens} tokens): use at least "
                "that, or smaller chunks (chunk_tokens)"
            )
        self.slots = slots
        bases, end = [], 0
        for extent in geometry.extent_bytes:
            bases.append(end)
            end += align_up(extent * slots)
        self._slab = allocate(end)
        self._rows = tuple(
            self._slab[base : base + extent * slots].view(-1, row.page_bytes)
            for base, extent, row in zip(bases, geometry.extent_bytes, geometry.rows, strict=True)
        )
        self._extents = tuple(rows.numpy().reshape(slots, -1) for rows in self._rows)

    def pages(self, row: int) -> torch.Tensor:
        """All pages of one row, shape ``(slots * blocks_per_chunk, page_bytes)``, uint8."""
        return self._rows[row]

    def extent(self, row: int, slot: int) -> npt.NDArray[np.uint8]:
        """One chunk's bytes in one row, as a view."""
        view: npt.NDArray[np.uint8] = self._extents[row][slot]
        return view

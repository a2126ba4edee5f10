"""A slow link that any machine has: a tier behind a given bandwidth and latency."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from lamina.data.load_pipeline import Piece, RowSource
from lamina.data.movers.base import Fence
from lamina.geometry import CacheGeometry


class Link:
    """One pipe, shared by everything that comes through it: what is asked for later arrives later.

    Args:
        clock: monotonic seconds.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._bandwidth = float("inf")
        self._latency = 0.0
        self._free_at = 0.0
        self._carried = 0

    @property
    def carried(self) -> int:
        """Bytes asked for since the pace was set."""
        return self._carried

    def pace(self, bandwidth: float, latency: float) -> None:
        """Set the pace of everything that is asked for from now on.

        Args:
            bandwidth: bytes per second.
            latency: seconds from asking for something to the arrival of its first byte, if the
                pipe is empty.

        Raises:
            ValueError: if the bandwidth is not positive or the latency is negative.
        """
        if not bandwidth > 0 or not latency >= 0:
            raise ValueError(
                f"a link needs a positive bandwidth and no negative latency, "
                f"got {bandwidth} bytes/s and {latency} s"
            )
        with self._lock:
            self._bandwidth, self._latency = bandwidth, latency
            self._carried = 0

    def carry(self, size: int) -> None:
        """Return when ``size`` bytes, asked for now, have arrived."""
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now + self._latency) + size / self._bandwidth
            self._carried += size
            wait = self._free_at - now
        if wait > 0:
            self._sleep(wait)


class PacedSource:
    """A tier behind a link.

    Args:
        source: the tier.
        link: what its bytes come through.
        geometry: the engine's cache.
    """

    def __init__(self, source: RowSource, link: Link, geometry: CacheGeometry) -> None:
        self._source = source
        self._link = link
        self._page_bytes = tuple(row.page_bytes for row in geometry.rows)
        self._per_chunk = geometry.blocks_per_chunk

    def load_row(
        self, row: int, piece: Piece, after: Fence, admit: Callable[[], bool]
    ) -> Fence | None:
        """See :class:`~lamina.data.load_pipeline.RowSource`."""
        # A state goes to two blocks, but comes through the link once.
        chunk, block = np.divmod(piece.pages, self._per_chunk)
        pages = np.unique(piece.slots[chunk] * self._per_chunk + block)
        self._link.carry(len(pages) * self._page_bytes[row])
        return self._source.load_row(row, piece, after, admit)

"""A slow link that any machine has: host memory behind a given bandwidth and latency."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from lamina_kv.data.movers.base import Mover, Pairs
from lamina_kv.data.movers.fences import Fence
from lamina_kv.data.near import Indices, NearSlab
from lamina_kv.data.shared_memory import MemoryFile
from lamina_kv.geometry import CacheGeometry
from lamina_kv.plan import NearSlots


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

    def ask_for(self, size: int) -> float:
        """Seconds until ``size`` bytes, asked for now, have arrived."""
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now + self._latency) + size / self._bandwidth
            self._carried += size
            return self._free_at - now

    def carry(self, size: int) -> None:
        """Return when ``size`` bytes, asked for now, have arrived."""
        wait = self.ask_for(size)
        if wait > 0:
            self._sleep(wait)


class PacedMover(Mover):
    """A mover whose loads come through a link. Saves do not.

    Args:
        mover: makes the copies.
        link: what bytes from the near tier come through.
        geometry: the engine's cache.
    """

    def __init__(self, mover: Mover, link: Link, geometry: CacheGeometry) -> None:
        self._mover = mover
        self._link = link
        self._page_bytes = tuple(row.page_bytes for row in geometry.rows)

    def pairs(self, near: NearSlab, near_pages: Indices, pages: Indices) -> Pairs:
        """As the mover does."""
        return self._mover.pairs(near, near_pages, pages)

    def load(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = True
    ) -> Fence:
        """Wait for the link, then copy."""
        # A state goes to two blocks, but comes through the link once.
        pages = len(np.unique(pairs.near_pages))
        self._link.carry(pages * sum(self._page_bytes[row] for row in rows))
        return self._mover.load(rows, pairs, after, urgent=urgent)

    def save(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = False
    ) -> Fence:
        """As the mover does."""
        return self._mover.save(rows, pairs, after, urgent=urgent)

    def enter_thread(self) -> None:
        """As the mover does."""
        self._mover.enter_thread()

    def allocate_host(self, size: int, file: MemoryFile | None = None) -> torch.Tensor:
        """As the mover does."""
        return self._mover.allocate_host(size, file)

    def near_slots(self, near: NearSlab) -> NearSlots:
        """As the mover does."""
        return self._mover.near_slots(near)

    def await_near(self, near: NearSlab, near_pages: Indices) -> None:
        """As the mover does."""
        self._mover.await_near(near, near_pages)

    def fence_compute(self, *, timed: bool = False) -> Fence:
        """As the mover does."""
        return self._mover.fence_compute(timed=timed)

    def hold_compute(self, fence: Fence) -> None:
        """As the mover does."""
        self._mover.hold_compute(fence)

    def close(self, *, process_ends: bool = False, timeout: float | None = None) -> bool:
        """As the mover does."""
        return self._mover.close(process_ends=process_ends, timeout=timeout)

    def keep_memory(self) -> None:
        """As the mover does."""
        self._mover.keep_memory()

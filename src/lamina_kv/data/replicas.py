"""Ranks that hold the same KV cache: the first of them keeps it for all.

Under tensor parallelism every rank computes the whole cache of an MLA model. Of such *replicas* the
lowest rank is the *leader*. Its near tier is in memory that the others, its *followers*, read, too,
and its far tiers are its own. A follower saves, writes and reads nothing.

A leader's slot is under a lease in control until every rank has reported, so it is not refilled
while a follower reads it, just as it is not while the leader does.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Protocol, TypeVar

from lamina_kv.data.movers.base import Mover
from lamina_kv.data.near import NearSlab
from lamina_kv.data.shared_memory import MemoryFile
from lamina_kv.geometry import CacheGeometry

log = logging.getLogger("lamina_kv.data")

T = TypeVar("T")


class Gather(Protocol):
    """Gives every rank what each of them has to say, by rank; all ranks call it together."""

    def __call__(self, word: T, /) -> list[T]:
        """The words of all ranks."""


class Replicas:
    """Finds out who keeps what, and opens the near tier. All ranks make one together, and open
    their near tiers together.

    Where a follower cannot reach the memory of its leader, as on another machine, every rank of
    that group keeps a copy of its own.

    Args:
        rank: this rank.
        count: how many consecutive ranks hold the same cache, from a multiple of it on; 1: none.
        gather: how ranks speak.

    Attributes:
        leader: the rank that keeps what this rank reads; this rank if it keeps its own.
        count: how many ranks share what the leader keeps; 1 if this rank's is its own.
    """

    def __init__(self, rank: int, count: int, gather: Gather) -> None:
        self._rank = rank
        self._gather = gather
        self._shares = count > 1
        self.leader, self.count = rank - rank % count, count
        self._slab: MemoryFile | None = None
        if self._shares:
            self._meet()

    @property
    def follows(self) -> bool:
        """Whether this rank reads the near tier of another."""
        return self.leader != self._rank

    def open_near(self, geometry: CacheGeometry, mover: Mover, capacity: int) -> NearSlab:
        """Open the slab that this rank keeps, or its leader's.

        Args:
            geometry: the engine's cache.
            mover: gives host memory.
            capacity: bytes of host memory for each rank that keeps chunks.

        Raises:
            ValueError: if the capacity is less than a chunk.
            OSError: if there is no such amount of memory.
            RuntimeError: if the leader's slab could not be opened; the leader says why.
        """
        allocate = partial(mover.allocate_host, file=self._slab)
        try:
            if not self._shares:
                return NearSlab(geometry, capacity, allocate)
            near: NearSlab | None = None
            failure: Exception | None = None
            if not self.follows:
                try:
                    near = NearSlab(geometry, capacity, allocate)
                except Exception as error:  # the followers must not wait for what never comes
                    failure = error
            slots = self._gather(near.slots if near is not None else 0)[self.leader]
            if failure is not None:
                raise failure
            if not slots:
                raise RuntimeError(
                    f"rank {self.leader} could not open its near tier; see what it says"
                )
            return near or NearSlab(geometry, slots * geometry.object_bytes, allocate)
        finally:
            self._close()

    def _meet(self) -> None:
        """Share an empty memory file with the followers, or learn that it cannot be done."""
        obstacle = ""
        try:  # whatever happens, the others must not wait for what never comes
            if not self.follows:
                self._slab = MemoryFile.create()
        except OSError as error:
            obstacle = str(error)
        address = self._gather(self._slab.address if self._slab is not None else None)[self.leader]
        try:
            if self.follows and address is not None:
                self._slab = MemoryFile.open(address)
        except OSError as error:
            obstacle = str(error)
        obstacles = self._gather(obstacle)[self.leader : self.leader + self.count]
        if any(obstacles):
            if not self.follows:
                log.warning(
                    "ranks %d to %d hold the same cache and each keeps a copy of its own, because "
                    "they cannot share memory: %s",
                    self.leader,
                    self.leader + self.count - 1,
                    next(filter(None, obstacles)),
                )
            self._close()
            self.leader, self.count = self._rank, 1

    def _close(self) -> None:
        if self._slab is not None:
            self._slab.close()
        self._slab = None

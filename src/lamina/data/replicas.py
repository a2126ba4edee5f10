"""Ranks that hold the same KV cache: the first of them keeps it for all.

Under tensor parallelism every rank computes the whole cache of an MLA model. Of such *replicas* the
lowest rank is the *leader*: its tiers are in memory and files that the others, its *followers*,
read, too. A follower saves and writes nothing.

A leader's slot is under a lease in control until every rank has reported, so it is not refilled
while a follower reads it, just as it is not while the leader does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from lamina.config import DiskConfig
from lamina.data.movers.base import Mover
from lamina.data.shared_memory import MemoryFile
from lamina.data.tiers.disk import DiskReader, DiskTier, StoreNamespace
from lamina.data.tiers.host import HostTier
from lamina.geometry import CacheGeometry
from lamina.keys import Namespace

log = logging.getLogger("lamina.data")

T = TypeVar("T")


class Gather(Protocol):
    """Gives every rank what each of them has to say, by rank; all ranks call it together."""

    def __call__(self, word: T, /) -> list[T]:
        """The words of all ranks."""


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """Where a rank's disk tier is to be.

    Attributes:
        path: the store's directory.
        namespace: the model.
        first_shard: number of rank 0's shard; below it are those of other engines of one server.
        capacity: bytes of disk for each rank that keeps chunks.
        direct: bypass the page cache; None: where the file system can.
        shards: how many shards the server has, its engines' all together; None if that is not
            known.
    """

    path: Path
    namespace: StoreNamespace
    first_shard: int
    capacity: int
    direct: bool | None
    shards: int | None = None

    @classmethod
    def of(
        cls,
        config: DiskConfig | None,
        namespace: Namespace,
        first_shard: int = 0,
        shards: int | None = None,
    ) -> DiskPlace | None:
        """The place that a configuration asks for; None if it asks for none.

        Args:
            config: the ``disk`` section.
            namespace: the model.
            first_shard: see the class.
            shards: see the class.
        """
        if config is None:
            return None
        return cls(
            path=config.path,
            namespace=StoreNamespace(namespace.hex, namespace.describe()),
            first_shard=first_shard,
            capacity=config.capacity,
            direct=None if config.direct == "auto" else config.direct,
            shards=shards,
        )


@dataclass(frozen=True, slots=True)
class Tiers:
    """A rank's tiers.

    Attributes:
        host: in host memory.
        disk: on disk, if there is one; one that can be written if the rank follows nobody.
    """

    host: HostTier
    disk: DiskTier | DiskReader | None


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a leader has opened, for its followers."""

    host_slots: int
    disk_slots: int
    direct: bool


class Replicas:
    """Finds out who keeps what, and opens the tiers. All ranks make one together, and open their
    tiers together.

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
        self._table: MemoryFile | None = None
        if self._shares:
            self._meet()

    @property
    def follows(self) -> bool:
        """Whether this rank reads the tiers of another."""
        return self.leader != self._rank

    def open_tiers(
        self, geometry: CacheGeometry, mover: Mover, host_capacity: int, place: DiskPlace | None
    ) -> Tiers:
        """Open what this rank keeps, or what its leader keeps.

        Args:
            geometry: the engine's cache.
            mover: gives host memory.
            host_capacity: bytes of host memory for each rank that keeps chunks.
            place: of the disk tier, if there is one.

        Raises:
            ValueError: if a capacity is less than a chunk.
            StoreError: if the store cannot be used.
            OSError: if there is no such amount of memory.
            RuntimeError: if the leader's tiers could not be opened; the leader says why.
        """
        allocate = partial(mover.allocate_host, file=self._slab)

        def keep() -> Tiers:
            host = HostTier(geometry, host_capacity, allocate)
            if place is None:
                return Tiers(host, None)
            disk = DiskTier(
                path=place.path,
                namespace=place.namespace,
                rank=place.first_shard + self._rank,
                extent_bytes=geometry.extent_bytes,
                capacity=place.capacity,
                direct=place.direct,
                table=self._table,
                shards=place.shards,
            )
            return Tiers(host, disk)

        def follow(opened: _Opened) -> Tiers:
            host = HostTier(geometry, opened.host_slots * geometry.chunk_bytes, allocate)
            if place is None or self._table is None:
                return Tiers(host, None)
            disk = DiskReader(
                path=place.path,
                namespace=place.namespace,
                rank=place.first_shard + self.leader,
                extent_bytes=geometry.extent_bytes,
                slots=opened.disk_slots,
                direct=opened.direct,
                table=self._table,
            )
            return Tiers(host, disk)

        try:
            return self._after_leader(keep, follow) if self._shares else keep()
        finally:
            self._close()

    def _meet(self) -> None:
        """Share empty memory files with the followers, or learn that it cannot be done."""
        obstacle = ""
        try:  # whatever happens, the others must not wait for what never comes
            if not self.follows:
                self._slab = MemoryFile.create()
                self._table = MemoryFile.create()
        except OSError as error:
            obstacle = str(error)
        files = [file.address for file in (self._slab, self._table) if file is not None]
        addresses = self._gather(files)[self.leader]
        try:
            if self.follows and len(addresses) == 2:
                self._slab = MemoryFile.open(addresses[0])
                self._table = MemoryFile.open(addresses[1])
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

    def _after_leader(self, keep: Callable[[], Tiers], follow: Callable[[_Opened], Tiers]) -> Tiers:
        tiers: Tiers | None = None
        failure: Exception | None = None
        if not self.follows:
            try:
                tiers = keep()
            except Exception as error:  # the followers must not wait for what never comes
                failure = error
        opened = self._gather(_opened(tiers))[self.leader]
        if failure is not None:
            raise failure
        if opened is None:
            raise RuntimeError(f"rank {self.leader} could not open its tiers; see what it says")
        return tiers or follow(opened)

    def _close(self) -> None:
        for file in (self._slab, self._table):
            if file is not None:
                file.close()
        self._slab = self._table = None


def _opened(tiers: Tiers | None) -> _Opened | None:
    if tiers is None:
        return None
    disk = tiers.disk
    if disk is None:
        return _Opened(tiers.host.slots, 0, direct=False)
    return _Opened(tiers.host.slots, disk.slots, disk.direct)

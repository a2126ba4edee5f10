"""A look into a store from outside, by a person: what is there, and is all of it whole?

No engine is needed, only the place: a path or a URL. Where a store needs more to be reached, that
comes from the tier's entry in a configuration, or from the environment. Nothing is changed.

A kind of tier names a function in :attr:`~lamina_kv.tiers.Kind.auditor`, which takes the place and
that entry, or None, and returns an :class:`Audit`. A store by key has one for the price of a
:class:`Listing`::

    def open_audit(place: str, tier: TierConfig | None) -> Audit | None:
        return ListingAudit(ShelfListing(place))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.names import object_name
from lamina_kv.tiers.objects import is_whole


@dataclass(frozen=True, slots=True)
class Part:
    """What a store holds for one shard of one namespace.

    Attributes:
        namespace: its fingerprint, hexadecimal.
        description: what that stands for, for people; empty if nobody knows.
        shard: which part of every chunk it is.
        chunks: how many there are; None if that cannot be told.
        size: bytes of their objects: what a check reads.
        taken: bytes that they take in the store.
        oldest: when the chunk was used or written that this was done to longest ago, in seconds
            since the epoch; 0 if unknown.
        newest: when one was used or written last.
        row_bytes: bytes of KV cache in them; None if that cannot be told without reading them.
        slots: chunks that fit; 0 where the store decides that.
        user: which process uses it; empty if none is known.
        damage: what is wrong with it, a line each.
    """

    namespace: str
    description: Mapping[str, str]
    shard: int
    chunks: int | None
    size: int
    taken: int
    oldest: float = 0.0
    newest: float = 0.0
    row_bytes: int | None = None
    slots: int = 0
    user: str = ""
    damage: tuple[str, ...] = ()


class Audit(Protocol):
    """A store, looked into from outside. An error of it is a
    :class:`~lamina_kv.tiers.contract.StoreError` or an OSError.

    Attributes:
        place: where it is, as people may see it: no password.
        damage_means: what becomes of damaged chunks, and what to do: a sentence for the person who
            has just read of some.
        clearing: why ``lamina-kv clear`` leaves it alone, and what to do instead; empty if it does
            not.
    """

    place: str
    damage_means: str
    clearing: str

    def parts(self) -> list[Part]:
        """What is there, by namespace and shard."""

    def check(self) -> Iterator[tuple[int, list[str]]]:
        """Read everything back and verify it.

        Yields:
            Bytes that were read, and what was wrong with them, a line each.
        """

    def close(self) -> None:
        """Release everything. Idempotent."""


class Listed(NamedTuple):
    """One chunk in a store.

    Attributes:
        namespace: its namespace's fingerprint, hexadecimal.
        key: its key.
        shard: which part of the chunk it is.
        size: bytes of its object.
        used: when it was used or written last, in seconds since the epoch; 0 if unknown.
    """

    namespace: str
    key: ChunkKey
    shard: int
    size: int
    used: float = 0.0


class Listing(Protocol):
    """What a store by key has to be able to do to be looked into. Attributes as for
    :class:`Audit`."""

    place: str
    damage_means: str
    clearing: str

    def about(self, namespace: str) -> Mapping[str, str]:
        """What a namespace stands for; empty if nobody knows."""

    def chunks(self) -> Iterator[Listed]:
        """Every chunk, in any order. What comes or goes meanwhile may be among them or not."""

    def read(self, chunk: Listed) -> bytes | memoryview | None:
        """A chunk's object, whatever its length; None if it is gone by now."""

    def close(self) -> None:
        """Release everything. Idempotent."""


class ListingAudit:
    """An :class:`Audit` of a store that can list its chunks.

    Args:
        listing: the store.
    """

    def __init__(self, listing: Listing) -> None:
        self.place = listing.place
        self.damage_means = listing.damage_means
        self.clearing = listing.clearing
        self._listing = listing

    def parts(self) -> list[Part]:
        """See the protocol."""
        found: dict[tuple[str, int], list[float]] = {}  # chunks, bytes, oldest, newest
        for chunk in self._listing.chunks():
            sums = found.setdefault((chunk.namespace, chunk.shard), [0, 0, 0.0, 0.0])
            sums[0] += 1
            sums[1] += chunk.size
            if chunk.used:
                sums[2] = min(sums[2] or chunk.used, chunk.used)
                sums[3] = max(sums[3], chunk.used)
        about = {namespace: self._listing.about(namespace) for namespace, _ in found}
        return [
            Part(namespace, about[namespace], shard, int(count), int(size), int(size), first, last)
            for (namespace, shard), (count, size, first, last) in sorted(found.items())
        ]

    def check(self) -> Iterator[tuple[int, list[str]]]:
        """See the protocol."""
        for chunk in self._listing.chunks():
            content = self._listing.read(chunk)
            if content is None:
                yield 0, []
                continue
            there = np.frombuffer(content, np.uint8)
            damage = []
            if not is_whole(there, chunk.key, chunk.shard):
                name = object_name(chunk.key, chunk.shard)
                damage.append(
                    f"{self.place}: chunk {name} of namespace {chunk.namespace} is damaged"
                )
            yield len(there), damage

    def close(self) -> None:
        """See the protocol."""
        self._listing.close()

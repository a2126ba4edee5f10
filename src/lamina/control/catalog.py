"""Which key is in which slot of which tier, and in what condition.

The catalog has one writer, the scheduler. A chunk is *visible* only when all of its rows are
there on all ranks; until then its slot is *filling* and no lookup finds it. A slot that is
leased is neither evicted nor reused, even after its chunk was dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from lamina.control.eviction import SharedOutlivesSingle
from lamina.plan import ChunkKey, RankReport, StoredChunk, TierName

AGED = 256
"""Chunks whose age is brought up to date in one go: about half a millisecond with two tiers. A
prompt of 131,072 tokens takes some steps. Until then its beginning is older than its end, and is
given up first if many such prompts end at once in a tier that is full."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a visible chunk is."""

    key: ChunkKey
    tier: TierName
    slot: int


class TierCatalog:
    """The slots of one tier.

    Args:
        name: the tier.
        slots: how many slots it has on every rank.

    Attributes:
        evictions: chunks given up to make room, so far.
        losses: chunks lost for any reason, so far.
        arrivals: chunks that became visible, so far.
    """

    def __init__(self, name: TierName, slots: int) -> None:
        self.name = name
        self.slots = slots
        self.evictions = 0
        self.losses = 0
        self.arrivals = 0
        self._visible: dict[ChunkKey, int] = {}
        self._filling: dict[ChunkKey, int] = {}
        self._order = SharedOutlivesSingle()
        self._leases: dict[int, int] = {}
        self._orphans: set[int] = set()
        self._free: list[int] = list(range(slots - 1, -1, -1))

    @property
    def used(self) -> int:
        """Slots that are not free."""
        return self.slots - len(self._free)

    @property
    def leased(self) -> int:
        """Slots under at least one lease."""
        return len(self._leases)

    @property
    def visible(self) -> Mapping[ChunkKey, int]:
        """Visible chunks and their slots."""
        return self._visible

    def find(self, key: ChunkKey) -> int | None:
        """Slot of a visible chunk."""
        return self._visible.get(key)

    def holds(self, key: ChunkKey) -> bool:
        """Whether the chunk is visible or on its way."""
        return key in self._visible or key in self._filling

    def fills(self, key: ChunkKey) -> bool:
        """Whether the chunk is on its way."""
        return key in self._filling

    @property
    def has_room(self) -> bool:
        """Whether a slot is free, or a visible chunk could be given up for one."""
        # Leases are on visible chunks, and on orphans.
        leased = len(self._leases) - len(self._orphans)
        return bool(self._free) or leased < len(self._visible)

    def is_leased(self, slot: int) -> bool:
        """Whether there is a lease on ``slot``."""
        return slot in self._leases

    def reserve(self, key: ChunkKey) -> int | None:
        """A slot to fill with ``key``, evicting if need be; None when every slot is in use.

        Raises:
            ValueError: if the tier already holds the key.
        """
        if self.holds(key):
            raise ValueError(f"{self.name.value} already holds chunk {key.hex()}")
        if not self.has_room:
            return None
        if not self._free:
            victim = self._order.victim(lambda k: self._visible[k] not in self._leases)
            if victim is None:
                return None
            self.evictions += 1
            self.drop(victim)
        slot = self._free.pop()
        self._filling[key] = slot
        return slot

    def publish(self, key: ChunkKey, *, shared: bool = False, passed: bool = False) -> None:
        """Make a filled chunk visible.

        Args:
            key: its key.
            shared: whether several requests share it.
            passed: whether a request went on behind it.
        """
        self.arrivals += 1
        self._visible[key] = self._filling.pop(key)
        self._order.add(key, shared=shared, went_on=passed)

    def abandon(self, key: ChunkKey) -> None:
        """Give back the slot of a chunk that will not be filled."""
        self._retire(self._filling.pop(key))

    def drop(self, key: ChunkKey) -> int | None:
        """Forget a visible chunk; its slot is reused once no lease is on it.

        Returns:
            The slot it had, or None if it was not visible.
        """
        slot = self._visible.pop(key, None)
        if slot is not None:
            self.losses += 1
            self._order.forget(key)
            self._retire(slot)
        return slot

    def clear(self) -> list[int]:
        """Forget every visible chunk; returns the slots they had."""
        return [slot for key in list(self._order) if (slot := self.drop(key)) is not None]

    def lease(self, slot: int) -> None:
        """Hold ``slot`` until :meth:`release`."""
        self._leases[slot] = self._leases.get(slot, 0) + 1

    def release(self, slot: int) -> None:
        """Give up one lease on ``slot``."""
        left = self._leases[slot] - 1
        if left:
            self._leases[slot] = left
            return
        del self._leases[slot]
        if slot in self._orphans:
            self._orphans.remove(slot)
            self._free.append(slot)

    def touch(self, key: ChunkKey, *, passed: bool = False) -> None:
        """Note a use of a chunk, if it is visible.

        Args:
            key: its key.
            passed: whether the request that uses it went on behind it.
        """
        if key in self._visible:
            self._order.touch(key, went_on=passed)

    def share(self, key: ChunkKey) -> None:
        """As :meth:`touch`, of what several requests share: it is kept longer from now on."""
        if key in self._visible:
            self._order.share(key)

    def is_shared(self, key: ChunkKey) -> bool:
        """Whether several requests share a visible chunk."""
        return self._order.is_shared(key)

    def is_passed(self, key: ChunkKey) -> bool:
        """Whether a request went on behind a visible chunk."""
        return self._order.is_passed(key)

    def adopt(self, stored: Iterable[StoredChunk]) -> None:
        """Take over chunks that the tier already held when it was opened, oldest first."""
        taken: set[int] = set()
        for chunk in sorted(stored, key=lambda c: c.last_used):
            if chunk.slot in taken or self.holds(chunk.key):
                continue
            taken.add(chunk.slot)
            self._visible[chunk.key] = chunk.slot
            self._order.add(chunk.key)
        self._free = [slot for slot in self._free if slot not in taken]

    def _retire(self, slot: int) -> None:
        if slot in self._leases:
            self._orphans.add(slot)
        else:
            self._free.append(slot)


class Catalog:
    """Every tier, in the order in which a load prefers them.

    Args:
        host: the host tier.
        disk: the disk tier, if there is one.
        readable: whether a tier may be loaded from now; what is only elsewhere is not found.

    Attributes:
        forgotten: disk slots whose content the disk has yet to be told to forget.
    """

    def __init__(
        self,
        host: TierCatalog,
        disk: TierCatalog | None,
        readable: Callable[[TierName], bool] = lambda _: True,
    ) -> None:
        self._readable = readable
        self._uses: deque[Iterator[None]] = deque()
        self.forgotten: list[int] = []
        self.host = host
        self.disk = disk
        self.tiers: dict[TierName, TierCatalog] = {TierName.HOST: host}
        if disk is not None:
            self.tiers[TierName.DISK] = disk

    def locate(self, key: ChunkKey) -> Location | None:
        """The best place to load ``key`` from."""
        return self.finder()(key)

    def finder(self) -> Callable[[ChunkKey], Location | None]:
        """:meth:`locate` for many keys at one time."""
        tiers = self._readable_tiers()

        def find(key: ChunkKey) -> Location | None:
            for tier in tiers:
                slot = tier.find(key)
                if slot is not None:
                    return Location(key, tier.name, slot)
            return None

        return find

    def readable(self) -> tuple[TierName, ...]:
        """The tiers that may be loaded from now."""
        return tuple(tier.name for tier in self._readable_tiers())

    def keeps(self, key: ChunkKey) -> bool:
        """Whether the chunk can be loaded, or is on its way to where it can. What only a tier has
        that is out of use is as good as lost."""
        return self.locate(key) is not None or any(t.fills(key) for t in self.tiers.values())

    def publish(self, place: Location) -> None:
        """Make a chunk visible where it has been filled; what its requests have in common in
        another tier they have in common there, too."""
        tiers = self.tiers.values()
        self.tiers[place.tier].publish(
            place.key,
            shared=any(tier.is_shared(place.key) for tier in tiers),
            passed=any(tier.is_passed(place.key) for tier in tiers),
        )

    def note_use(self, groups: Sequence[Sequence[ChunkKey]]) -> None:
        """A request has used all of its chunks: none is older than those behind it.

        Args:
            groups: per group, the request's keys in prefix order. They must not change any more.
        """
        self._uses.append(self._touch(groups))
        self.bring_up_to_date()

    def note_reuse(
        self, groups: Sequence[Sequence[ChunkKey]], firsts: Sequence[int], end: int
    ) -> None:
        """A request has found what others use, too: that is kept longer from now on.

        Args:
            groups: per group, the request's keys in prefix order.
            firsts: per group, the first chunk of what it has found.
            end: the chunk behind the last one.
        """
        self._uses.append(self._share(groups, firsts, end))
        self.bring_up_to_date()

    def bring_up_to_date(self) -> None:
        """Let noted uses make chunks younger, :data:`AGED` of them; the rest by later calls."""
        left = AGED
        while self._uses and left:
            left -= sum(1 for _ in islice(self._uses[0], left))
            if left:
                self._uses.popleft()

    # In both, the first chunk becomes the most recently used one, because no chunk is of any use
    # without those before it.

    def _touch(self, groups: Sequence[Sequence[ChunkKey]]) -> Iterator[None]:
        tiers = self.tiers.values()
        last = len(groups[0]) - 1
        for index in range(last, -1, -1):
            for keys in reversed(groups):
                for tier in tiers:
                    tier.touch(keys[index], passed=index < last)
                yield

    def _share(
        self, groups: Sequence[Sequence[ChunkKey]], firsts: Sequence[int], end: int
    ) -> Iterator[None]:
        tiers = self.tiers.values()
        for index in range(end - 1, min(firsts) - 1, -1):
            for keys, first in zip(reversed(groups), reversed(firsts), strict=True):
                if index >= first:
                    for tier in tiers:
                        tier.share(keys[index])
                    yield

    def held(self, place: Location) -> bool:
        """Whether the chunk is still there."""
        return self.tiers[place.tier].find(place.key) == place.slot

    def give_back(self, target: Location, *, poisoned: bool) -> None:
        """Give back a slot that a transfer has not filled.

        Args:
            target: the slot, and the chunk that it was to hold.
            poisoned: whether the chunk was abandoned before, and only the slot is held.
        """
        tier = self.tiers[target.tier]
        if poisoned:
            tier.release(target.slot)
        else:
            tier.abandon(target.key)

    def drop_bad(self, places: Iterable[Location], bad: Collection[ChunkKey]) -> None:
        """Forget those of some chunks that cannot be delivered any more, unless they are kept anew
        elsewhere in their tier."""
        for place in places:
            if place.key in bad and self.held(place):
                self.tiers[place.tier].drop(place.key)
                if place.tier is TierName.DISK:
                    self.forgotten.append(place.slot)

    def prefix_end(self, groups: Sequence[Sequence[ChunkKey]], start: int, end: int) -> int:
        """Index, at most ``end``, after the last of the chunks from ``start`` on that can be loaded
        of every one of ``groups``."""
        tiers = [tier.visible for tier in self._readable_tiers()]
        for keys in groups:
            for index in range(start, end):
                key = keys[index]
                for visible in tiers:
                    if key in visible:
                        break
                else:
                    end = index
                    break
        return max(start, end)

    def runs(self, keys: Sequence[ChunkKey], start: int, end: int) -> list[tuple[TierName, int]]:
        """The chunks ``start..end``, all of which can be loaded, by the tier that each is best
        loaded from: neighbours together, with how many they are."""
        tiers = self._readable_tiers()
        if len(tiers) == 1:
            return [(tiers[0].name, end - start)] if end > start else []
        names = [
            next(tier.name for tier in tiers if key in tier.visible) for key in keys[start:end]
        ]
        return [(name, len(list(run))) for name, run in groupby(names)]

    def out_of_use(self, key: ChunkKey) -> bool:
        """Whether the chunk is visible, but only where nothing may be loaded from now."""
        return self.locate(key) is None and any(
            tier.find(key) is not None for tier in self.tiers.values()
        )

    def _readable_tiers(self) -> list[TierCatalog]:
        return [tier for name, tier in self.tiers.items() if self._readable(name)]

    @property
    def losses(self) -> int:
        """Changes whenever a visible chunk was lost; a memoised hit is stale then."""
        return sum(tier.losses for tier in self.tiers.values())

    @property
    def arrivals(self) -> int:
        """Changes whenever a chunk became visible; a memoised hit may be longer then."""
        return sum(tier.arrivals for tier in self.tiers.values())


def open_catalog(reports: Sequence[RankReport], readable: Callable[[TierName], bool]) -> Catalog:
    """A catalog of what every rank has. Disk slots that not every rank agrees on are forgotten.

    Args:
        reports: one from each rank.
        readable: see :class:`Catalog`.

    Raises:
        ValueError: if a rank's host tier is smaller than one chunk.
    """
    host_slots = min(report.host_slots for report in reports)
    disk_slots = min(report.disk_slots for report in reports)
    if host_slots < 1:
        raise ValueError(
            "host.capacity: too small for one chunk of "
            f"{max(report.chunk_bytes for report in reports)} bytes on each rank"
        )
    host = TierCatalog(TierName.HOST, host_slots)
    if not disk_slots:
        return Catalog(host, None, readable)
    disk = TierCatalog(TierName.DISK, disk_slots)
    first, *others = [{(c.key, c.slot) for c in report.stored} for report in reports]
    common = first.intersection(*others)
    stray = set().union(first, *others) - common
    disk.adopt(c for c in reports[0].stored if (c.key, c.slot) in common and c.slot < disk_slots)
    catalog = Catalog(host, disk, readable)
    catalog.forgotten += sorted({slot for _, slot in stray} - {s for _, s in common})
    return catalog

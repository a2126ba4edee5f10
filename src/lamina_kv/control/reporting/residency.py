"""Which chunks are in which tier, in words that the engine's routers understand, as it changes.

Tiers know chunks by their keys, which nobody outside of Lamina has. So the engine's adapter gives
each chunk of a request a *label*: what the engine itself calls these tokens. A chunk has a label
for as long as a request that has it lives, or a tier holds it. What a tier held before the start
gets one when a request comes whose prompt it is a part of; before that nobody can name it.

Labels know of no epoch, and of no adapter that was replaced under its name. Of several chunks with
one label only one can be found, and only that is told: of the present epoch, and of those the one
that a request has had last.

None of this exists where nobody listens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from lamina_kv.control.catalog import Catalog
from lamina_kv.control.requests import RequestView
from lamina_kv.keys import CHECKPOINT, ChunkChain, Epoch
from lamina_kv.plan import NEAR, ChunkKey, TierName
from lamina_kv.tiers.contract import Index

MOST_TOLD = 4096
"""Changes that one step tells, some 10 µs each in the scheduler's thread. A step seldom has as many
as a hundred; a reset may have as many as there are chunks."""


class Label(Protocol):
    """What the engine calls the content of a chunk."""

    @property
    def name(self) -> Hashable:
        """Equal for chunks that the engine cannot tell apart."""


Describe = Callable[[RequestView, int, int], Label | None]
"""The label of a request's chunk, by cache group and index; None if the engine has none for it."""


@dataclass(frozen=True, slots=True)
class Change:
    """A chunk can be found in a tier since, or cannot any more.

    Attributes:
        tier: the tier.
        label: what the engine calls the chunk.
        stored: whether it can be found.
    """

    tier: TierName
    label: Label
    stored: bool


@dataclass(slots=True)
class _Entry:
    """A chunk that has a label.

    Attributes:
        key: its key.
        label: what the engine calls it.
        epoch: which weights have computed it.
        tiers: the tiers that have it, a bit for each.
        users: requests that have it and are not over.
        told: whether its tiers are told.
    """

    key: ChunkKey
    label: Label
    epoch: Epoch
    tiers: int = 0
    users: int = 0
    told: bool = False


class Residency:
    """See the module. The scheduler's thread alone calls it.

    Args:
        catalog: where chunks are; its indexes tell of every change from now on.
        describe: gives chunks their labels.

    Attributes:
        behind: whether the last :meth:`take` has left changes that were there by then.
    """

    def __init__(self, catalog: Catalog, describe: Describe) -> None:
        self.behind = False
        self._describe = describe
        self._entries: dict[ChunkKey, _Entry] = {}
        self._told: dict[Hashable, _Entry] = {}  # by names
        self._changes: deque[Change] = deque()
        self._epoch = CHECKPOINT
        self._tiers: tuple[tuple[TierName, Index], ...] = (
            (NEAR, catalog.near),
            *((name, far.index) for name, far in catalog.far.items()),
        )
        for number, (_, index) in enumerate(self._tiers):
            index.on_change = partial(self._look, number)

    # -- requests ----------------------------------------------------------------------------

    def follow(self) -> RequestLabels:
        """A new request."""
        return RequestLabels(self)

    def use(
        self, key: ChunkKey, epoch: Epoch, view: RequestView, group: int, index: int
    ) -> _Entry | None:
        """A request has a chunk; None if the engine has no label for it. See :meth:`release`."""
        entry = self._entries.get(key)
        if entry is None:
            label = self._describe(view, group, index)
            if label is None:
                return None
            entry = self._entries[key] = _Entry(key, label, epoch)
            for number, (_, tier) in enumerate(self._tiers):
                entry.tiers |= tier.has(key) << number
        entry.users += 1
        if not entry.told:
            self._tell(entry)
        return entry

    def release(self, entry: _Entry) -> None:
        """A request that had a chunk is over."""
        entry.users -= 1
        self._forget_if_unused(entry)

    # -- tiers -------------------------------------------------------------------------------

    def _look(self, number: int, key: ChunkKey) -> None:
        """Something has become of a chunk in a tier."""
        entry = self._entries.get(key)
        if entry is None:
            return
        name, index = self._tiers[number]
        if index.has(key) != bool(entry.tiers >> number & 1):
            entry.tiers ^= 1 << number
            if entry.told:
                self._changes.append(Change(name, entry.label, bool(entry.tiers >> number & 1)))
        self._forget_if_unused(entry)

    def _forget_if_unused(self, entry: _Entry) -> None:
        if entry.users or entry.tiers or any(tier.holds(entry.key) for _, tier in self._tiers):
            return
        del self._entries[entry.key]
        if entry.told:
            del self._told[entry.label.name]

    # -- what is told ------------------------------------------------------------------------

    def begin(self, epoch: Epoch) -> None:
        """Other weights compute from now on: what the former ones have left is not found, and what
        these had left before is found again."""
        if epoch == self._epoch:
            return
        for entry in list(self._told.values()):
            self._withdraw(entry)
        self._epoch = epoch
        for entry in self._entries.values():
            self._tell(entry)

    def tell_again(self) -> None:
        """Listeners may have taken something else for the end of all that they had heard."""
        for stored in (False, True):
            for entry in self._told.values():
                self._say(entry, stored=stored)

    def take(self, most: int = MOST_TOLD) -> list[Change]:
        """Changes in the order in which they came; what is beyond ``most`` stays."""
        taken = [self._changes.popleft() for _ in range(min(most, len(self._changes)))]
        self.behind = bool(self._changes)
        return taken

    def _tell(self, entry: _Entry) -> None:
        """The tiers of a chunk are told from now on, if it can be found, and those of no other one
        of its name."""
        if entry.epoch != self._epoch:
            return
        name = entry.label.name
        if (other := self._told.get(name)) is not None:
            self._withdraw(other)
        self._told[name] = entry
        entry.told = True
        self._say(entry, stored=True)

    def _withdraw(self, entry: _Entry) -> None:
        """The tiers of a chunk are not told any more: they do not hold it, as far as is told."""
        self._say(entry, stored=False)
        entry.told = False
        del self._told[entry.label.name]

    def _say(self, entry: _Entry, *, stored: bool) -> None:
        for number, (name, _) in enumerate(self._tiers):
            if entry.tiers >> number & 1:
                self._changes.append(Change(name, entry.label, stored))


class RequestLabels:
    """The labels of one request's chunks; a :class:`~lamina_kv.control.requests.Follower`.

    Args:
        residency: what they are given to.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._entries: list[_Entry] = []
        self._chunks = 0
        self._last: ChunkKey | None = None
        self._is_over = False

    def keys_known(self, view: RequestView, chain: ChunkChain) -> None:
        """Label the chunks that were not known before; all of them, if they are others now."""
        keys = chain.keys
        if self._chunks and (len(keys) < self._chunks or keys[self._chunks - 1] != self._last):
            self._release()
        if len(keys) == self._chunks or self._is_over:
            return
        use = self._residency.use
        for index in range(self._chunks, len(keys)):
            for group, names in enumerate(chain.groups):
                entry = use(names[index], chain.epoch, view, group, index)
                if entry is not None:
                    self._entries.append(entry)
        self._chunks, self._last = len(keys), keys[-1]

    def over(self) -> None:
        """The request is over."""
        self._is_over = True
        self._release()

    def _release(self) -> None:
        entries, self._entries, self._chunks = self._entries, [], 0
        for entry in entries:
            self._residency.release(entry)

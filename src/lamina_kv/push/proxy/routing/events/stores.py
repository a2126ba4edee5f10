"""Blocks in stores that several engines share: whichever engine announces one, all of them find
it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count

from lamina_kv.push.proxy.routing.events.names import BlockName

MAX_BLOCKS = 1_000_000
"""Blocks of all stores that are remembered: some 300 MB. Those go first that were announced first.
"""


@dataclass(frozen=True, slots=True)
class _User:
    """A rank from when it first announced something until it is forgotten.

    Attributes:
        number: never used again, so that what it has announced need not be sought once it is gone.
        stores: that it uses.
    """

    number: int
    stores: set[str] = field(default_factory=set)


class SharedStores:
    """By store. An engine that has not said that it uses a store does not find what is there."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, BlockName], tuple[int, ...]] = OrderedDict()
        self._users: dict[Hashable, _User] = {}
        self._numbers = count()
        self._known: set[int] = set()

    def __len__(self) -> int:
        return len(self._held)

    def stored(self, store: str, name: BlockName, who: Hashable) -> None:
        """A rank says that a block is there."""
        if (user := self._users.get(who)) is None:
            user = self._users[who] = _User(next(self._numbers))
            self._known.add(user.number)
        user.stores.add(store)
        others = self._who_said((store, name)) - {user.number}
        self._held[store, name] = (*others, user.number)
        self._held.move_to_end((store, name))
        if len(self._held) > MAX_BLOCKS:
            self._held.popitem(last=False)

    def removed(self, store: str, name: BlockName) -> None:
        """A rank has not found a block there: it is gone for all of them."""
        self._held.pop((store, name), None)

    def has(self, name: BlockName, who: Hashable) -> bool:
        """Whether a rank finds a block in one of the stores that it uses."""
        user = self._users.get(who)
        return user is not None and any(self._who_said((store, name)) for store in user.stores)

    def forget(self, who: Hashable) -> None:
        """A rank is gone, or begins anew: what nobody else has announced is not known any more."""
        if (user := self._users.pop(who, None)) is not None:
            self._known.discard(user.number)

    def forget_block(self, name: BlockName, who: Hashable) -> None:
        """A rank does not know any more under which name it has announced a block, and so cannot
        say that it is gone."""
        if (user := self._users.get(who)) is None:
            return
        for place in [(store, name) for store in user.stores]:
            if others := self._who_said(place) - {user.number}:
                self._held[place] = (*others,)
            else:
                self._held.pop(place, None)

    def _who_said(self, place: tuple[str, BlockName]) -> set[int]:
        """The ranks, of those that are known, that have announced a block there."""
        return self._known.intersection(self._held.get(place, ()))

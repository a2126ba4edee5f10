"""Blocks in stores that several engines share: whichever engine announces one, all of them find
it."""

from __future__ import annotations

from collections.abc import Hashable

from lamina_kv.push.proxy.routing.events.names import BlockName


class SharedStores:
    """By store. An engine that has not said that it uses a store does not find what is there."""

    def __init__(self) -> None:
        self._held: dict[str, dict[BlockName, set[Hashable]]] = {}
        self._users: dict[Hashable, set[str]] = {}

    def stored(self, store: str, name: BlockName, who: Hashable) -> None:
        """A rank says that a block is there."""
        self._users.setdefault(who, set()).add(store)
        self._held.setdefault(store, {}).setdefault(name, set()).add(who)

    def removed(self, store: str, name: BlockName) -> None:
        """A rank has not found a block there: it is gone for all of them."""
        self._held.get(store, {}).pop(name, None)

    def has(self, name: BlockName, who: Hashable) -> bool:
        """Whether a rank finds a block in one of the stores that it uses."""
        return any(name in self._held[store] for store in self._users.get(who, ()))

    def forget(self, who: Hashable) -> None:
        """A rank is gone, or begins anew: what nobody else has announced is not known any more."""
        for store in self._users.pop(who, ()):
            held = self._held[store]
            for name in [name for name, users in held.items() if who in users]:
                held[name].discard(who)
                if not held[name]:
                    del held[name]

"""Which chunk a full tier gives up first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from lamina.plan import ChunkKey


class LeastRecentlyUsed:
    """Keys in order of use, the least recently used first.

    A key that is in use when a victim is sought is as good as just used, so it moves to the
    far end: the search is amortised constant however many leased keys stand at the front.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[ChunkKey]:
        return iter(self._order)

    def use(self, key: ChunkKey) -> None:
        """Note that ``key`` was used now; adds it if it is new."""
        self._order[key] = None
        self._order.move_to_end(key)

    def forget(self, key: ChunkKey) -> None:
        """Remove ``key`` if it is there."""
        self._order.pop(key, None)

    def victim(self, evictable: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        """The least recently used key for which ``evictable`` holds, or None. Not removed."""
        for _ in range(len(self._order)):
            key = next(iter(self._order))
            if evictable(key):
                return key
            self._order.move_to_end(key)
        return None

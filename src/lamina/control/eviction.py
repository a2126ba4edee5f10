"""Which chunk a full tier gives up first.

Most of what is saved is never asked for: questions, answers, prompts that nobody sends again. If
what was used longest ago always went first, they would push out the documents that everybody asks
about. So chunks that a later request found grow old more slowly than those that nobody came back
for: a *segmented least recently used* order, whose two segments are weighed by age instead of
having a size each. No chunk is safe for ever, so that what was popular once makes room, and none is
given up at once, so that what is new has time to become popular.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain

from lamina.plan import ChunkKey

REUSED_LIFE = 4
"""A key that was used again is given up at so many times the age of one that was not."""


class SegmentedLeastRecentlyUsed:
    """Keys by age, in two segments: those that were added and not used again, and the others.

    Age is counted in keys that were added since: time in which nothing is added drives nothing out.
    Every operation is constant, that of :meth:`victim` amortised: a key that is in use when one is
    sought is as good as just used, and is put at the far end of its segment.
    """

    def __init__(self) -> None:
        self._once: OrderedDict[ChunkKey, int] = OrderedDict()
        self._again: OrderedDict[ChunkKey, int] = OrderedDict()
        self._added = 0

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def __iter__(self) -> Iterator[ChunkKey]:
        return chain(self._once, self._again)

    def add(self, key: ChunkKey) -> None:
        """Note a key that is new."""
        self._added += 1
        self._once[key] = self._added

    def touch(self, key: ChunkKey) -> None:
        """Note that ``key``, which is there, was used by whoever had it added."""
        segment = self._again if key in self._again else self._once
        segment[key] = self._added
        segment.move_to_end(key)

    def reuse(self, key: ChunkKey) -> None:
        """Note that ``key``, which is there, was used by somebody else."""
        self._once.pop(key, None)
        self._again[key] = self._added
        self._again.move_to_end(key)

    def forget(self, key: ChunkKey) -> None:
        """Remove ``key`` if it is there."""
        self._once.pop(key, None)
        self._again.pop(key, None)

    def victim(self, evictable: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        """The oldest key, weighed, for which ``evictable`` holds, or None. Not removed."""
        once, again = len(self._once), len(self._again)
        while once or again:
            if once and (not again or self._older_is_once()):
                segment, once = self._once, once - 1
            else:
                segment, again = self._again, again - 1
            key = next(iter(segment))
            if evictable(key):
                return key
            segment[key] = self._added
            segment.move_to_end(key)
        return None

    def _older_is_once(self) -> bool:
        once, again = next(iter(self._once.values())), next(iter(self._again.values()))
        return (self._added - once) * REUSED_LIFE >= self._added - again

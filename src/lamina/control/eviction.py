"""Which chunk a full tier gives up first.

Most of what is saved is never asked for: questions, answers, prompts that nobody sends again. If
what was used longest ago always went first, they would push out the documents that everybody asks
about. So chunks that several requests have shared grow old more slowly than others. No chunk is
safe for ever, so that what was popular once makes room, and none is given up at once, so that what
is new has time to become popular.

A conversation that goes on shares nothing: each turn has all of the turn before it as its prefix,
and when it ends all of that is dead at once. Who counts as sharing is for the caller to say
(:meth:`lamina.control.hits.HitFinder.reuse`); keys know whether anybody went on behind them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain

from lamina.plan import ChunkKey

SHARED_LIFE = 4
"""A key that is shared is given up at so many times the age of one that is not."""


class SharedOutlivesSingle:
    """Keys by age, shared ones apart from others.

    Age is counted in keys that were added since: time in which nothing is added drives nothing out.
    Every operation is constant, and :meth:`victim` is but for keys that are in use: one of those is
    as good as just used, and is put at the far end.
    """

    def __init__(self) -> None:
        # Twice the number of keys that had been added when a key was used, and one more if somebody
        # went on behind it: of a million keys records would take as much memory again.
        self._single: OrderedDict[ChunkKey, int] = OrderedDict()
        self._shared: OrderedDict[ChunkKey, int] = OrderedDict()
        self._added = 0

    def __len__(self) -> int:
        return len(self._single) + len(self._shared)

    def __iter__(self) -> Iterator[ChunkKey]:
        return chain(self._single, self._shared)

    def add(self, key: ChunkKey, *, shared: bool = False, went_on: bool = False) -> None:
        """Note a key that is new here, and what is known of it from elsewhere: whether it is
        shared, and whether somebody went on behind it."""
        self._added += 1
        segment = self._shared if shared else self._single
        segment[key] = self._stamp(went_on)

    def touch(self, key: ChunkKey, *, went_on: bool = False) -> None:
        """Note that ``key``, which is there, was used, and whether whoever used it went on behind
        it."""
        segment = self._shared if key in self._shared else self._single
        segment[key] = self._stamp(segment[key] | went_on)
        segment.move_to_end(key)

    def share(self, key: ChunkKey) -> None:
        """Note that ``key``, which is there, is shared by somebody who uses it now."""
        before = self._single.pop(key, None)
        if before is None:
            before = self._shared[key]
        self._shared[key] = self._stamp(before)
        self._shared.move_to_end(key)

    def is_shared(self, key: ChunkKey) -> bool:
        """Whether several share ``key``; False if it is not there."""
        return key in self._shared

    def is_passed(self, key: ChunkKey) -> bool:
        """Whether somebody went on behind ``key``; False if it is not there."""
        return bool((self._single.get(key) or self._shared.get(key) or 0) & 1)

    def forget(self, key: ChunkKey) -> None:
        """Remove ``key`` if it is there."""
        self._single.pop(key, None)
        self._shared.pop(key, None)

    def victim(self, evictable: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        """The oldest key, weighed, for which ``evictable`` holds, or None. Not removed."""
        single, shared = len(self._single), len(self._shared)
        while single or shared:
            if single and (not shared or self._older_is_single()):
                segment, single = self._single, single - 1
            else:
                segment, shared = self._shared, shared - 1
            key = next(iter(segment))
            if evictable(key):
                return key
            segment[key] = self._stamp(segment[key])
            segment.move_to_end(key)
        return None

    def _stamp(self, before: int) -> int:
        """A key's stamp when it is used now, which keeps of the one before what others did."""
        return 2 * self._added + (before & 1)

    def _older_is_single(self) -> bool:
        single, shared = (next(iter(each.values())) // 2 for each in (self._single, self._shared))
        return (self._added - single) * SHARED_LIFE >= self._added - shared

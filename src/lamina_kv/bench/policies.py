"""Eviction policies from the literature, for comparison: one bounded set of blocks each.

All see the same: :meth:`Policy.find` when a request is looked up, :meth:`Policy.use` when all of
its blocks are there. A block is only found behind the blocks before it, so the policies that go
block by block take a request's last block first, but for plain LRU.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple, Protocol

Ids = Sequence[int]
"""Blocks of one request, in prefix order."""


class Event(NamedTuple):
    """What happened to one request.

    Attributes:
        lookup: whether it was looked up. Else all of its blocks have come to be there.
        ids: its blocks.
        had: of a lookup, how many of its first blocks the engine has itself.
    """

    lookup: bool
    ids: Ids
    had: int = 0


OPTIMUM = "Belady"
"""The name of the policy that knows the future."""


class Policy(Protocol):
    """What a bounded set of blocks keeps."""

    def find(self, ids: Ids, moment: int, had: int = 0) -> int:
        """A request is looked up: how many blocks are kept behind those that the engine has.

        Args:
            ids: its blocks.
            moment: the place of this event in the schedule.
            had: how many of its first blocks the engine has.
        """

    def use(self, ids: Ids, moment: int) -> None:
        """All blocks of a request are there, and each may be kept; as :meth:`find`."""


def prefix(ids: Ids, kept: Container[int]) -> int:
    """How many of the first blocks are in ``kept``."""
    for count, block in enumerate(ids):
        if block not in kept:
            return count
    return len(ids)


class Lru:
    """Gives up what was used longest ago.

    Args:
        capacity: blocks.
        leaf_first: whether of one request the last block counts as used longest ago. Without it a
            prompt loses its beginning first, and then all of it.
    """

    def __init__(self, capacity: int, *, leaf_first: bool) -> None:
        self._capacity = capacity
        self._leaf_first = leaf_first
        self._kept: OrderedDict[int, None] = OrderedDict()

    def find(self, ids: Ids, moment: int, had: int = 0) -> int:  # noqa: D102
        return prefix(ids[had:], self._kept)

    def use(self, ids: Ids, moment: int) -> None:  # noqa: D102
        for block in reversed(ids) if self._leaf_first else ids:
            self._kept[block] = None
            self._kept.move_to_end(block)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)


class Arc:
    """ARC (Megiddo and Modha, 2003): used once against used more often, with ghosts of both that
    move the border between them.

    Args:
        capacity: blocks.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._aim = 0.0  # blocks that those used once should have
        self._once: OrderedDict[int, None] = OrderedDict()
        self._often: OrderedDict[int, None] = OrderedDict()
        self._once_gone: OrderedDict[int, None] = OrderedDict()
        self._often_gone: OrderedDict[int, None] = OrderedDict()

    def find(self, ids: Ids, moment: int, had: int = 0) -> int:  # noqa: D102
        for count, block in enumerate(ids[had:]):
            if block not in self._once and block not in self._often:
                return count
        return len(ids) - had

    def use(self, ids: Ids, moment: int) -> None:  # noqa: D102
        for block in reversed(ids):
            self._use(block)

    def _use(self, block: int) -> None:
        once_gone, often_gone = len(self._once_gone), len(self._often_gone)
        if block in self._once:
            del self._once[block]
        elif block in self._often:
            del self._often[block]
        elif block in self._once_gone:
            self._aim = min(self._capacity, self._aim + max(1.0, often_gone / once_gone))
            self._make_room(returns=False)
            del self._once_gone[block]
        elif block in self._often_gone:
            self._aim = max(0.0, self._aim - max(1.0, once_gone / often_gone))
            self._make_room(returns=True)
            del self._often_gone[block]
        else:
            self._admit(block)
            return
        self._often[block] = None

    def _admit(self, block: int) -> None:
        seen_once = len(self._once) + len(self._once_gone)
        seen = seen_once + len(self._often) + len(self._often_gone)
        if seen_once >= self._capacity:
            if len(self._once) < self._capacity:
                self._once_gone.popitem(last=False)
                self._make_room(returns=False)
            else:
                self._once.popitem(last=False)
        elif seen >= self._capacity:
            if seen >= 2 * self._capacity:
                self._often_gone.popitem(last=False)
            self._make_room(returns=False)
        self._once[block] = None

    def _make_room(self, *, returns: bool) -> None:
        """Give one block up; ``returns`` if that is for one that was used often."""
        once = len(self._once)
        if once and (once > self._aim or (returns and once == self._aim)):
            block, _ = self._once.popitem(last=False)
            self._once_gone[block] = None
        else:
            block, _ = self._often.popitem(last=False)
            self._often_gone[block] = None


class S3Fifo:
    """S3-FIFO (Yang and others, 2023): a small queue for what is new, a main one for what was used
    again, and ghosts of the first, as many as the cache has blocks.

    Args:
        capacity: blocks, of which a tenth are for the small queue.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._small_size = max(1, capacity // 10)
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._uses: dict[int, int] = {}
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def find(self, ids: Ids, moment: int, had: int = 0) -> int:  # noqa: D102
        return prefix(ids[had:], self._uses)

    def use(self, ids: Ids, moment: int) -> None:  # noqa: D102
        for block in reversed(ids):
            if block in self._uses:
                self._uses[block] = min(3, self._uses[block] + 1)
                continue
            while len(self._uses) >= self._capacity:
                self._give_up()
            self._uses[block] = 0
            if block in self._ghosts:
                del self._ghosts[block]
                self._main.append(block)
            else:
                self._small.append(block)

    def _give_up(self) -> None:
        """Give one block up, or find the small queue to be of use and move all of it."""
        while self._small and (len(self._small) >= self._small_size or not self._main):
            block = self._small.popleft()
            if not self._uses[block]:
                del self._uses[block]
                self._ghosts[block] = None
                if len(self._ghosts) > self._capacity:
                    self._ghosts.popitem(last=False)
                return
            self._uses[block] = 0
            self._main.append(block)
        while True:
            block = self._main.popleft()
            if not self._uses[block]:
                del self._uses[block]
                return
            self._uses[block] -= 1
            self._main.append(block)


_DEPTH_BITS = 20
_DEPTH = (1 << _DEPTH_BITS) - 1  # of a block in its request, at most


class Belady:
    """Belady's optimum: knows the future, and gives up what is needed last; of blocks that the same
    request needs, the one that stands last in it, because none is of use without those before it.

    Args:
        capacity: blocks.
        schedule: all events.
    """

    def __init__(self, capacity: int, schedule: Sequence[Event]) -> None:
        self._capacity = capacity
        self._schedule = schedule
        self._lookups: dict[int, array[int]] = {}
        for moment, event in enumerate(schedule):
            if event.lookup:
                for block in event.ids[event.had :]:
                    self._lookups.setdefault(block, array("q")).append(moment)
        # Of each kept block when it is needed next: the moment of a lookup, and the block's place
        # in its request. That names the block, too.
        self._needs: dict[int, int] = {}
        self._heap: list[int] = []  # needs, negative; some are not a block's next any more

    def find(self, ids: Ids, moment: int, had: int = 0) -> int:  # noqa: D102
        count = prefix(ids[had:], self._needs)
        self._look_ahead(ids, moment, added=False)
        return count

    def use(self, ids: Ids, moment: int) -> None:  # noqa: D102
        self._look_ahead(ids, moment, added=True)
        needs = self._needs
        while len(needs) > self._capacity:
            need = -heapq.heappop(self._heap)
            block = self._schedule[need >> _DEPTH_BITS].ids[need & _DEPTH]
            if needs.get(block) == need:
                del needs[block]

    def _look_ahead(self, ids: Ids, moment: int, *, added: bool) -> None:
        """Keep blocks until the next lookup that needs them; all of them if they are ``added``."""
        for depth, block in enumerate(ids):
            if not added and block not in self._needs:
                continue
            lookups = self._lookups.get(block, ())
            place = bisect_right(lookups, moment)
            if place == len(lookups):  # not needed any more
                self._needs.pop(block, None)
                continue
            need = lookups[place] << _DEPTH_BITS | depth
            if self._needs.get(block) != need:
                self._needs[block] = need
                heapq.heappush(self._heap, -need)


def others(capacity: int, schedule: Sequence[Event]) -> dict[str, Callable[[], Policy]]:
    """Every policy by its name, to be made when it is its turn.

    Args:
        capacity: blocks that each may keep.
        schedule: all events, for the policy that knows the future.
    """
    return {
        "LRU": lambda: Lru(capacity, leaf_first=False),
        "LRU leaf first": lambda: Lru(capacity, leaf_first=True),
        "ARC": lambda: Arc(capacity),
        "S3-FIFO": lambda: S3Fifo(capacity),
        OPTIMUM: lambda: Belady(capacity, schedule),
    }


def blocks_found(policy: Policy, schedule: Sequence[Event]) -> int:
    """Blocks that a policy finds again, each behind all blocks before it, and behind those that the
    engine has.

    Args:
        policy: the policy, empty.
        schedule: all events.
    """
    found = 0
    for moment, event in enumerate(schedule):
        if event.lookup:
            found += policy.find(event.ids, moment, event.had)
        else:
            policy.use(event.ids, moment)
    return found

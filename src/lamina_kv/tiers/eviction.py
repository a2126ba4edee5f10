"""Which chunk a full tier gives up first.

The unit is a *run*: neighbouring chunks of one prefix that were used together last. Runs form
trees, because no chunk is of any use without those in front of it. A chunk goes only when none
stands behind it, so that a prompt loses its end and keeps its beginning. To use a prefix of
thousands of chunks touches a few runs; where windows or states stand behind its chunks, each of
these is a run.

Runs of one kind (:mod:`lamina_kv.tiers.reuse`) stand in the order of their use. Of the least
recently used run of each kind, the one that is worth least is given up: its last chunk, or if
others stand behind it, the last chunk of one of those.

If a kind is used again late, its youngest runs may be worth less than its oldest: these will be
used sooner. Then a young run goes. Documents that are asked for in turn, more than fit, are such a
kind: by the order of use each goes right before it is used again.

A request may say more (:mod:`lamina_kv.tiers.regard`). Runs of one kind and priority stand in an
order of their own, and a run's worth is multiplied by what its priority says. Pinned runs stand
apart, and are no victims until their time is over.

Time is counted in additions: while nothing is added nothing is driven out.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Callable, Iterator

import numpy as np

from lamina_kv.plan import ChunkKey, Int32s
from lamina_kv.tiers.regard import MOST_PRIORITY
from lamina_kv.tiers.reuse import (
    ALONE,
    KINDS,
    SAMPLE,
    Ghosts,
    Standing,
    Use,
    Worth,
    kind_of,
    uses_of,
)

_NONE = -1
_CLOCK = (1 << 32) - 1
"""The clock wraps here. A chunk that is older than this is taken for a younger one."""

LONGEST = (1 << 16) - 1
"""Chunks of a run: what two bytes hold."""

LESSON = 8
"""The tier learns whenever an eighth of it was added, but not before :data:`SHORTEST_LESSON`
chunks were: a lesson takes a millisecond."""

SHORTEST_LESSON = 8
"""A lesson takes the age that a chunk has by then for the one that it had since the last lesson.
Over more than a filling that is wrong. With 256 a tier of 105 chunks finds 72.5 % of all blocks of
the mixed load of ``bench/peers``, one request after the other; with this, all 73.4 % there are."""

YOUNG = 4
"""Runs of a kind that are looked at from its young end. The very youngest is often worth much for
a moment, or in front of others. With the youngest leaf alone, a loop of 400 documents behind a
common prompt, in a tier of 100, finds 39 % of all chunks instead of 47 %."""

PIN_SHARE = 4
"""Pins take a quarter of the tier at most. Those of longest ago are ordinary beyond it."""

PINS_LOOKED_AT = 4
"""Pins that are looked at, whether they are over, whenever a chunk has to go. So the last one that
is over is noticed before a sixteenth of the tier was added."""

FAVOUR, LIFE = 4.0, 2.6
"""What each step of priority multiplies worth by. Where nothing is known of a kind, that makes its
chunks live 2.6 times as long; where nothing was ever used again, and so nothing is worth anything,
age is weighed instead."""

_LEVELS = 2 * MOST_PRIORITY + 1
_SHELVES = KINDS * _LEVELS
_WEIGHTS = [FAVOUR ** (level - MOST_PRIORITY) for level in range(_LEVELS)]
_LIVES = [LIFE ** (level - MOST_PRIORITY) for level in range(_LEVELS)]


def _shelf(kind: int, priority: int) -> int:
    """Where runs of a kind and priority stand."""
    return kind + KINDS * (priority + MOST_PRIORITY)


def _level(shelf: int) -> int:
    """The priority of a shelf, from 0 on."""
    return shelf // KINDS


class Runs:
    """The chunks of one tier; see the module. Chunks are named by their slots, runs by the slot of
    their first chunk.

    Args:
        slots: how many slots there are.
        clock: monotonic seconds, for pins.
    """

    # Arrays, because a tier may have a million slots: 49 bytes a slot, ghosts not included.
    def __init__(self, slots: int, clock: Callable[[], float] = lambda: 0.0) -> None:
        def links() -> array[int]:
            return array("i", (_NONE,)) * slots

        self._front = links()  # the slot of the chunk in front
        self._run = links()  # the run of a chunk; none while the slot has no chunk
        # Of runs:
        self._tail = links()  # the last chunk
        self._length = array("H", bytes(2 * slots))  # chunks
        self._stamp = array("I", bytes(4 * slots))  # the clock at its last use
        self._used_at = array("f", bytes(4 * slots))  # seconds from the start to that use
        self._shelf = array("B", bytes(slots))  # kind and priority
        self._until = array("f", bytes(4 * slots))  # when its pin is over; 0 without one
        self._child = links()  # a run that stands behind it: the most recently used
        self._next, self._previous = links(), links()  # siblings, in a ring; younger before older
        # Runs of one shelf in a ring that begins and ends with its head, a slot of its own. Pinned
        # runs are in the last ring, in the order in which they were pinned.
        self._heads = range(slots, slots + _SHELVES + 1)
        heads = array("i", self._heads)
        self._older, self._younger = links() + heads, links() + heads
        self._shelves: list[int] = []  # that ever had a run, in order
        self._opened = bytearray(_SHELVES)
        self._pins = self._hand = self._heads[_SHELVES]
        self._pinned = 0
        self.limit_pins(slots)
        self._seconds, self._began = clock, clock() - 1  # so that no moment is 0
        self._runs = 0
        self._clock = 0
        self._ghosts = Ghosts(slots)
        self._worth = Worth(slots)
        self._learnt = 0  # the clock at the last lesson
        self._lesson = max(SHORTEST_LESSON, slots // LESSON)
        self._sampled = 0  # the first slot, and ghost, of the next sample

    def __len__(self) -> int:
        """How many runs there are."""
        return self._runs

    def __iter__(self) -> Iterator[int]:
        """All chunks, pinned ones last; of each kind the least recently used run first, of a run
        the last chunk."""
        for head in self._heads:
            run = self._younger[head]
            while run != head:
                slot = self._tail[run]
                for _ in range(self._length[run]):
                    yield slot
                    slot = self._front[slot]
                run = self._younger[run]

    def uses(self, slot: int) -> int:
        """How often a chunk was used, as far as it matters."""
        return uses_of(self._kind(self._run[slot]))

    def idle(self, slot: int) -> float:
        """Seconds since a chunk's run was used; of one that the tier had at the start and that was
        not used since, seconds since the start."""
        return self._moment() - self._used_at[self._run[slot]]

    @property
    def pinned(self) -> int:
        """Chunks that are pinned."""
        return self._pinned

    def limit_pins(self, slots: int) -> None:
        """Let pins take their share of so many slots, from the next pin on."""
        self._most_pinned = slots // PIN_SHARE

    # -- arrivals and losses -----------------------------------------------------------------

    def add(
        self, slot: int, key: ChunkKey, standing: Standing = ALONE, front: int = -1, uses: int = 0
    ) -> None:
        """A slot that had no chunk has one.

        Args:
            slot: the slot.
            key: the chunk's key.
            standing: where it stands.
            front: the slot of the chunk in front of it; -1 if there is none, or it is not here.
            uses: how often another tier says that it was used.
        """
        self._clock = self._clock + 1 & _CLOCK
        uses = max(uses, self._returned(key, needed=standing.needed))
        regard = standing.use.regard
        kind = kind_of(uses + 1, standing.use, last=standing.last, branches=False)
        shelf, pin = _shelf(kind, regard.priority), regard.pin_seconds > 0
        if front >= 0:
            run = self._run[front]
            pinned = self._until[run] > 0
            pin = pin and pinned
            grows = front == self._tail[run] and self._child[run] < 0
            alike = self._shelf[run] == shelf and pinned == pin
            if grows and alike and self._length[run] < LONGEST:
                self._front[slot], self._run[slot], self._tail[run] = front, run, slot
                self._length[run] += 1
                self._refresh(run)
                if pin:
                    self._pinned += 1
                    self._bound_pins()
                self._learn_if_due()
                return
        self._begin(slot, shelf)
        if front >= 0:
            self._hang(slot, front)
            if pin:
                self._pin(slot, self._until[self._run[front]], self._run[front])
        elif pin:
            self._pin(slot, self._moment() + regard.pin_seconds, self._pins)
        self._learn_if_due()

    def adopt(self, slots: Int32s) -> None:
        """Add many chunks, least recently used first, before any other. Nothing is known of what is
        in front of them: each is a run until a use says so."""
        assert not self._runs, "only a tier that was just opened adopts"
        if not len(slots):
            return
        kind = kind_of(1, Use(), last=False, branches=False)
        shelf = self._open(_shelf(kind, 0))
        head = self._heads[shelf]
        older, younger, run, tail = (
            np.frombuffer(each, np.int32)
            for each in (self._older, self._younger, self._run, self._tail)
        )
        younger[slots[:-1]], younger[slots[-1]], younger[head] = slots[1:], head, slots[0]
        older[slots[1:]], older[slots[0]], older[head] = slots[:-1], head, slots[-1]
        run[slots] = tail[slots] = slots
        np.frombuffer(self._shelf, np.uint8)[slots] = shelf
        np.frombuffer(self._length, np.uint16)[slots] = 1
        self._runs = len(slots)

    def forget(self, slot: int, key: ChunkKey | None = None) -> None:
        """A slot has no chunk any more. What stood behind it stands behind nothing.

        Args:
            slot: the slot.
            key: the chunk's key, if it is to be remembered because it made room for another.
        """
        run = self._run[slot]
        assert run >= 0, "a chunk that is forgotten is here"
        if slot != self._tail[run]:
            self._split(run, slot)
        while (child := self._child[run]) >= 0:
            self._cut(child)
        if key is not None:
            self._ghosts.add(key, self._kind(run), self._stamp[run])
        self._pinned -= self._is_pinned(run)
        if run != slot:
            self._tail[run] = self._front[slot]
            self._length[run] -= 1
        else:
            self._cut(run)
            self._unlink(run)
            self._until[run] = 0
            self._runs -= 1
        self._run[slot] = self._front[slot] = _NONE

    def missed(self, key: ChunkKey, standing: Standing) -> None:
        """A chunk that was used is not here, and is not taken in: the tier learns from it all the
        same."""
        self._clock = self._clock + 1 & _CLOCK
        uses = self._returned(key, needed=standing.needed) + 1
        kind = kind_of(uses, standing.use, last=standing.last, branches=False)
        self._ghosts.add(key, kind, self._clock)  # the next addition may bring a lesson

    def _returned(self, key: ChunkKey, *, needed: bool) -> int:
        """A chunk that is not here is used; returns how often it was before, as far as is known."""
        ghost = self._ghosts.take(key)
        if ghost is None:
            return 0
        kind, stamp = ghost
        if needed:
            self._worth.used(kind, self._clock - stamp & _CLOCK, 1)
        return uses_of(kind)

    # -- uses --------------------------------------------------------------------------------

    def used(self, slot: int, use: Use, needed: int | None, *, beyond: bool = False) -> int:
        """A prefix that ends with a chunk was used: the run of that chunk is the youngest.

        Args:
            slot: the chunk. What stands behind it in its run becomes a run of its own.
            use: the use.
            needed: how many chunks up to this one the engine had not itself; none, or more than its
                run has, are understood. None if the use was noted before, and goes on.
            beyond: whether the use goes on behind it, other than in one of the runs there.

        Returns:
            How many chunks of the prefix its run has.
        """
        run, regard = self._run[slot], use.regard
        assert run >= 0, "a chunk that is used is here"
        if slot != self._tail[run]:
            self._split(run, slot)
        if needed is not None:
            kind = self._kind(run)
            if needed > 0:
                self._worth.used(kind, self._age(run), min(needed, self._length[run]))
            child = self._child[run]
            branches = child >= 0 and (beyond or self._next[child] != child)
            kind = kind_of(uses_of(kind) + 1, use, last=False, branches=branches)
            self._shelf[run] = self._open(_shelf(kind, regard.priority))
        self._refresh(run)
        length = self._length[run]
        if regard.pin_seconds:
            self._pin(run, self._moment() + regard.pin_seconds, self._pins)
        elif regard.priority < 0:
            self._unpin(run)
        return length

    def expect(self, slot: int) -> int:
        """A prefix that ends with a chunk will be used: the run of that chunk goes after others of
        its kind. It grows no younger: how old it is at its use is yet to be learnt from.

        Returns:
            How many chunks of the prefix its run has.
        """
        run = self._run[slot]
        assert run >= 0, "a chunk that is expected is here"
        self._put_last(run)
        count, each = self._length[run], self._tail[run]
        while each != slot:
            count, each = count - 1, self._front[each]
        return count

    def head(self, slot: int) -> int:
        """The first chunk of a chunk's run."""
        return self._run[slot]

    def join(self, slot: int, front: int) -> None:
        """A chunk that begins a run stands behind another chunk, as is known by now."""
        if self._front[slot] < 0:
            self._hang(slot, front)

    def merge(self, slot: int) -> int:
        """Make a run and the one in front of it, behind which nothing else stands, one run, if
        they were used together.

        Args:
            slot: the first chunk of the run behind.

        Returns:
            How many chunks have changed their run.
        """
        front = self._front[slot]
        if front < 0:
            return 0
        run, length = self._run[front], self._length[slot]
        alone = self._child[run] == slot == self._next[slot]
        alike = self._shelf[run] == self._shelf[slot] and self._stamp[run] == self._stamp[slot]
        alike = alike and self._is_pinned(run) == self._is_pinned(slot)
        if not (alone and alike) or self._length[run] + length > LONGEST:
            return 0
        tail = each = self._tail[slot]
        for _ in range(length):
            self._run[each] = run
            each = self._front[each]
        self._unlink(slot)
        self._until[run], self._until[slot] = max(self._until[run], self._until[slot]), 0
        self._runs -= 1
        self._tail[run] = tail
        self._length[run] += length
        self._child[run] = self._child[slot]  # their parent is that of the tail
        return length

    # -- what goes ---------------------------------------------------------------------------

    def victim(
        self, may_go: Callable[[int], bool], most: int | None = None, front: int = _NONE
    ) -> int | None:
        """The chunk to give up: none stands behind it. None if there is none that may go, pinned
        ones left out.

        A run whose last chunk may not go is passed over, and others are looked at first from now
        on.

        Args:
            may_go: whether a chunk may go.
            most: how many runs are looked at; all if that is not said.
            front: the chunk in front of the one that needs room. Its run is not given up for being
                young: it always is.
        """
        self._release_pins()
        passed: set[int] = set()
        own = self._run[front] if front >= 0 else _NONE
        looked, young = 0, YOUNG
        while most is None or looked < most:
            run = leaf = self._worst(passed, own, young)
            if run < 0:
                return None
            while self._child[leaf] >= 0:
                leaf = self._previous[self._child[leaf]]
            goes_on = self._age(leaf) < self._age(run)
            if goes_on or _level(self._shelf[leaf]) > _level(self._shelf[run]):
                self._refresh_fronts(leaf)
                continue
            if may_go(self._tail[leaf]):
                return self._tail[leaf]
            passed.update((leaf, run))
            if run != self._younger[self._heads[self._shelf[run]]]:
                young -= 1  # it stays where it is
                continue
            looked += 1
            for each in {leaf, run}:
                self._make_youngest(each)
        return None

    def pinned_victim(self, may_go: Callable[[int], bool]) -> int | None:
        """The chunk to give up where nothing but pinned ones may go; None if of those that were
        pinned longest ago none may either."""
        run = self._younger[self._pins]
        for _ in range(PINS_LOOKED_AT):
            if run == self._pins:
                return None
            if self._child[run] < 0 and may_go(self._tail[run]):
                return self._tail[run]
            run = self._younger[run]
        return None

    def _worst(self, passed: set[int], own: int, most_young: int) -> int:
        """Of the least recently used run of each kind, and of young ones, the one that is worth
        least; of several, as where nothing was ever used again, the oldest; -1 if all were passed
        over.

        Args:
            passed: runs that may not go.
            own: a run that is not given up for being young.
            most_young: how many runs are looked at from each kind's young end.
        """
        worst, least, most = _NONE, 0.0, 0.0
        for shelf in self._shelves:
            head = self._heads[shelf]
            run = self._younger[head]
            if run == head or run in passed:
                continue
            level, age = _level(shelf), self._age(run)
            worth = self._worth.of(shelf % KINDS, age) * _WEIGHTS[level]
            weighed = age / _LIVES[level]
            if worst < 0 or worth < least or (worth == least and weighed > most):
                worst, least, most = run, worth, weighed
            if self._worth.least(shelf % KINDS, age) * _WEIGHTS[level] >= least:
                continue  # as mostly
            young = self._older[head]
            for _ in range(most_young):
                if young == run:
                    break
                if young != own and self._child[young] < 0 and young not in passed:
                    age = self._age(young)
                    worth = self._worth.of(shelf % KINDS, age) * _WEIGHTS[level]
                    if worth < least:
                        worst, least, most = young, worth, age / _LIVES[level]
                        break
                young = self._older[young]
        return worst

    def _kind(self, run: int) -> int:
        return self._shelf[run] % KINDS

    def _age(self, run: int) -> int:
        return self._clock - self._stamp[run] & _CLOCK

    def _learn_if_due(self) -> None:
        passed = self._clock - self._learnt & _CLOCK
        if passed < self._lesson:
            return
        self._learnt = self._clock
        slots = len(self._run)
        step = -(-slots // SAMPLE)
        begin = self._sampled % step
        runs = np.frombuffer(self._run, np.int32)[begin::step]
        runs = runs[runs >= 0]
        kinds = (np.frombuffer(self._shelf, np.uint8)[runs] % KINDS).astype(np.int8)
        here = kinds, np.frombuffer(self._stamp, np.uint32)[runs], step
        self._worth.learn(passed, self._clock, here, self._ghosts.sample(self._sampled))
        self._sampled += 1

    # -- pins --------------------------------------------------------------------------------

    # What is in front of a pinned run cannot go either. So it is pinned, too, for as long at least,
    # and younger in the ring: otherwise a few pins could hold on to a whole tier.

    def _is_pinned(self, run: int) -> bool:
        return self._until[run] > 0

    def _moment(self) -> float:
        return self._seconds() - self._began

    def _pin(self, run: int, until: float, younger: int) -> None:
        """Pin a run, at a place in the ring: just older than another one, or than the head."""
        self._unlink(run)
        self._link(run, younger)
        if not self._is_pinned(run):
            self._pinned += self._length[run]
        self._until[run] = max(self._until[run], until)
        self._bound_pins()

    def _unpin(self, run: int) -> None:
        """A request says that a run that it uses need not be pinned. It may stand in front of what
        others have pinned."""
        child = self._child[run]
        alone = child < 0 or (self._next[child] == child and not self._is_pinned(child))
        if alone and self._is_pinned(run):
            self._release_pin(run)

    def _bound_pins(self) -> None:
        """Make those pins ordinary that are too many, of the longest pinned run its end first."""
        while (excess := self._pinned - self._most_pinned) > 0:
            run = self._younger[self._pins]
            if self._length[run] > excess:
                last = self._tail[run]
                for _ in range(excess):
                    last = self._front[last]
                behind = self._tail[run]
                self._split(run, last)
                run = self._run[behind]
            self._release_pin(run)

    def _release_pin(self, run: int) -> None:
        """A run is ordinary again."""
        self._unlink(run)
        self._until[run] = 0
        self._pinned -= self._length[run]
        head = self._heads[self._shelf[run]]
        oldest = self._younger[head]
        is_oldest = oldest != head and self._age(run) >= self._age(oldest)
        self._link(run, oldest if is_oldest else head)

    def _release_pins(self) -> None:
        """Make those ordinary whose time is over; looks at some of them, at others next time."""
        if not self._pinned:
            return
        now = self._moment()
        for _ in range(PINS_LOOKED_AT):
            run = self._younger[self._hand]
            if run == self._pins:  # once around
                self._hand = run
            elif self._until[run] <= now:
                self._release_pin(run)
            else:
                self._hand = run

    # -- runs --------------------------------------------------------------------------------

    def _begin(self, slot: int, shelf: int) -> None:
        """A chunk becomes a run of its own, behind nothing."""
        self._run[slot] = self._tail[slot] = self._next[slot] = self._previous[slot] = slot
        self._front[slot] = self._child[slot] = _NONE
        self._length[slot] = 1
        self._stamp[slot] = self._clock
        self._used_at[slot] = self._moment()
        self._shelf[slot] = self._open(shelf)
        self._runs += 1
        self._link(slot, self._heads[shelf])

    def _split(self, run: int, slot: int) -> None:
        """What stands behind a chunk in its run becomes a run of its own, of the same age."""
        moved, each = [], self._tail[run]
        while each != slot:
            moved.append(each)
            each = self._front[each]
        rest = moved[-1]
        for each in moved:
            self._run[each] = rest
        self._tail[rest], self._tail[run] = self._tail[run], slot
        self._length[rest] = len(moved)
        self._length[run] -= len(moved)
        self._stamp[rest], self._shelf[rest] = self._stamp[run], self._shelf[run]
        self._used_at[rest] = self._used_at[run]
        self._until[rest] = self._until[run]
        self._child[rest], self._child[run] = self._child[run], rest
        self._next[rest] = self._previous[rest] = rest
        self._runs += 1
        self._link(rest, run)

    def _hang(self, run: int, front: int) -> None:
        """A run that stands behind nothing stands behind a chunk."""
        parent = self._run[front]
        if front != self._tail[parent]:
            self._split(parent, front)
        self._front[run] = front
        self._insert_child(parent, run)
        if until := self._until[run]:
            while self._front[run] >= 0:
                run = self._run[self._front[run]]
                self._pin(run, until, self._pins)

    def _cut(self, run: int) -> None:
        """A run stands behind nothing any more."""
        if self._front[run] < 0:
            return
        self._remove_child(self._run[self._front[run]], run)
        self._front[run] = _NONE

    def _insert_child(self, parent: int, run: int) -> None:
        first = self._child[parent]
        if first < 0:
            self._next[run] = self._previous[run] = run
        else:
            last = self._previous[first]
            self._next[run], self._previous[run] = first, last
            self._next[last] = self._previous[first] = run
        self._child[parent] = run

    def _remove_child(self, parent: int, run: int) -> None:
        following, previous = self._next[run], self._previous[run]
        if following == run:
            self._child[parent] = _NONE
            return
        self._next[previous], self._previous[following] = following, previous
        if self._child[parent] == run:
            self._child[parent] = following

    def _refresh(self, run: int) -> None:
        """A run was used now: it is the youngest of its kind, and of what stands where it does."""
        self._stamp[run] = self._clock
        self._used_at[run] = self._moment()
        self._put_last(run)

    def _put_last(self, run: int) -> None:
        """A run goes after others of its kind, and after what stands where it does."""
        self._make_youngest(run)
        if self._front[run] >= 0:
            parent = self._run[self._front[run]]
            if self._child[parent] != run:
                self._remove_child(parent, run)
                self._insert_child(parent, run)

    def _refresh_fronts(self, leaf: int) -> None:
        """Runs in front of a run are no older than it is, and of no lower priority."""
        run, level = leaf, _level(self._shelf[leaf])
        while (front := self._front[run]) >= 0:
            run = self._run[front]
            younger, above = self._age(leaf) < self._age(run), level - _level(self._shelf[run])
            if younger:
                self._stamp[run], self._used_at[run] = self._stamp[leaf], self._used_at[leaf]
            if above > 0:
                self._shelf[run] = self._open(self._shelf[run] + above * KINDS)
            if younger or above > 0:
                self._make_youngest(run)

    def _open(self, shelf: int) -> int:
        """A shelf may have runs from now on."""
        if not self._opened[shelf]:
            self._opened[shelf] = True
            insort(self._shelves, shelf)
        return shelf

    def _make_youngest(self, run: int) -> None:
        """The youngest of its shelf, unless it is pinned: others keep that order."""
        head = self._heads[self._shelf[run]]
        if not self._until[run] and self._older[head] != run:
            self._unlink(run)
            self._link(run, head)

    def _link(self, run: int, younger: int) -> None:
        """Put a run into a ring, just older than another one or than the ring's head."""
        older = self._older[younger]
        self._younger[older] = self._older[younger] = run
        self._older[run], self._younger[run] = older, younger

    def _unlink(self, run: int) -> None:
        older, younger = self._older[run], self._younger[run]
        self._younger[older], self._older[younger] = younger, older
        if self._hand == run:
            self._hand = older

"""Which chunk is in which slot: an index of slots that control assigns.

Near has one, and every far tier whose store keeps chunks by slot. A chunk is *visible* only when
all of its rows are there on all ranks. Until then its slot is *filling* and no lookup finds it. A
leased slot is neither evicted nor reused, even after its chunk was dropped.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from operator import itemgetter

import numpy as np

from lamina_kv.plan import ChunkKey, StoredChunks
from lamina_kv.tiers.agreed import agree
from lamina_kv.tiers.contract import Answer, End, NoRoom
from lamina_kv.tiers.eviction import Runs
from lamina_kv.tiers.reuse import ALONE, Standing, Use
from lamina_kv.tiers.touches import Touches

MOST_SPARED = 16
"""Runs that are passed over for one victim because they are to be spared: less than 0.1 ms. Those
are not looked at again before others, so that a search goes on with the next victim."""

MOST_PASSED = 256
"""Runs that are passed over for one victim because they are leased, or still being filled: 1 ms. If
none may go among them there is no room before a lease or a filling ends, and the next search goes
on behind them."""


class SlotIndex:
    """The slots of one tier; an :class:`~lamina_kv.tiers.contract.Index`.

    Args:
        slots: how many slots it has on every rank.
        stored: whether a store keeps the slots' content, and must be told what is void; near has
            none.
        clock: monotonic seconds, for what requests have pinned and for the age of what goes.
        ready: how many of them may be used by now, see :meth:`grow`; None for all.
        on_eviction: called with a chunk that makes room for another, and the seconds for which
            it was not used.

    Attributes:
        version: chunks lost for any reason, so far.
        arrivals: chunks that became visible, so far.
        lost_spared: called with every chunk that goes although it was to be spared.
        on_change: see :class:`~lamina_kv.tiers.contract.Index`.
    """

    def __init__(
        self,
        slots: int,
        *,
        stored: bool = True,
        clock: Callable[[], float] = lambda: 0.0,
        ready: int | None = None,
        on_eviction: Callable[[ChunkKey, float], None] = lambda key, idle: None,
    ) -> None:
        self.version = 0
        self.arrivals = 0
        self.lost_spared: Callable[[ChunkKey], None] = lambda key: None
        self.on_change: Callable[[ChunkKey], None] | None = None
        self._slots = slots
        self._visible: dict[ChunkKey, int] = {}
        self._filling: dict[ChunkKey, int] = {}
        self._keys: list[ChunkKey | None] = [None] * slots  # of visible chunks
        # Of visible chunks, and of filling ones: others stand behind those.
        self._runs = Runs(slots, clock)
        self._leases: dict[int, int] = {}
        self._pinned = 0  # visible chunks under lease
        self._orphans: set[int] = set()
        self._spared: dict[int, int] = {}  # slots of visible chunks; for how many they are spared
        self._in_vain = 0  # slots that were spared when no other could go; 0 if that was not so
        self._stuck = False  # nothing may go before a lease or a filling ends
        self._ready = slots if ready is None else ready
        self._free = array("i", range(self._ready - 1, -1, -1))
        self._stored = stored
        self._on_eviction = on_eviction
        self._void: set[int] = set()
        self._touches = Touches()

    @property
    def capacity(self) -> int:
        """Slots that may be used in the end."""
        return self._slots

    @property
    def used(self) -> int:
        """Slots that are not free."""
        return self._ready - len(self._free)

    @property
    def pinned(self) -> int:
        """Slots whose chunks requests have pinned; other than leased ones these may go, if nothing
        else may."""
        return self._runs.pinned

    @property
    def leased(self) -> int:
        """Slots under at least one lease."""
        return len(self._leases)

    @property
    def visible(self) -> Mapping[ChunkKey, int]:
        """Visible chunks and their slots."""
        return self._visible

    # -- lookups -----------------------------------------------------------------------------

    def find(self, key: ChunkKey) -> Answer:
        """Whether the chunk is visible; never unknown."""
        return Answer.HERE if key in self._visible else Answer.ABSENT

    def slot(self, key: ChunkKey) -> int | None:
        """Slot of a visible chunk."""
        return self._visible.get(key)

    def fills(self, key: ChunkKey) -> bool:
        """Whether the chunk is on its way."""
        return key in self._filling

    def has(self, key: ChunkKey) -> bool:
        """Whether the chunk is visible."""
        return key in self._visible

    def holds(self, key: ChunkKey) -> bool:
        """Whether the chunk is visible or on its way."""
        return key in self._visible or key in self._filling

    def leading(self, groups: Iterable[Sequence[ChunkKey]], start: int, end: int) -> int:
        """How many of the chunks ``start..end`` come before the first that is not visible of every
        one of ``groups``. A long prompt has thousands, and nothing else is asked about each."""
        visible = self._visible
        for keys in groups:
            end = start + len(list(takewhile(visible.__contains__, keys[start:end])))
        return end - start

    @property
    def has_room(self) -> bool:
        """Whether a slot is free, or a visible chunk could be given up for one. Costs nothing."""
        if self._free:
            return True
        # While it grows there is soon room for which nothing has to go.
        return not (self.grows or self._stuck) and self._pinned < len(self._visible)

    def spare(self, key: ChunkKey) -> None:
        """A visible chunk is not to be given up while others can go, because it is still to be
        copied elsewhere; once more, if it is already spared."""
        slot = self._visible[key]
        self._spared[slot] = self._spared.get(slot, 0) + 1

    def unspare(self, key: ChunkKey) -> None:
        """Take back one :meth:`spare`, if the chunk is still here."""
        slot = self._visible.get(key, -1)
        left = self._spared.pop(slot, 0) - 1
        if left > 0:
            self._spared[slot] = left

    @property
    def grows(self) -> bool:
        """Whether more slots may be used soon."""
        return self._ready < self._slots

    def grow(self, ready: int, most: int) -> None:
        """More slots may be used, or it has turned out that not all ever may.

        Args:
            ready: slots, from the first one on, that may be used by now; never fewer than before.
            most: slots that may be used in the end.
        """
        assert self._ready <= ready <= most <= self._slots, "no slot is taken back"
        self._free = array("i", range(ready - 1, self._ready - 1, -1)) + self._free
        self._ready = ready
        if most < self._slots:
            self._slots = most
            self._runs.limit_pins(most)

    # -- leases ------------------------------------------------------------------------------

    def hold(self, key: ChunkKey) -> int:
        """Lease the slot of a visible chunk; returns the slot."""
        slot = self._visible[key]
        self.lease(slot)
        return slot

    def lease(self, slot: int) -> None:
        """Pin ``slot`` until :meth:`release`."""
        count = self._leases.get(slot, 0)
        self._leases[slot] = count + 1
        if not count and self._keys[slot] is not None:
            self._pinned += 1

    def lease_all(self, slots: Sequence[int]) -> None:
        """Pin each of these slots once. A load takes thousands: a call for each would take longer
        than all else of its order."""
        leases, keys = self._leases, self._keys
        fresh = dict.fromkeys(slots, 1)
        if len(fresh) == len(slots) > 1 and leases.keys().isdisjoint(fresh):
            leases.update(fresh)
            self._pinned += len(slots) - itemgetter(*slots)(keys).count(None)
            return
        for slot in slots:
            self.lease(slot)

    def release(self, place: int) -> None:
        """Give up one lease on a slot."""
        left = self._leases[place] - 1
        if left:
            self._leases[place] = left
            return
        del self._leases[place]
        self._stuck = False
        if self._keys[place] is not None:
            self._pinned -= 1
        if place in self._orphans:
            self._orphans.remove(place)
            self._free.append(place)

    # -- arrivals ----------------------------------------------------------------------------

    def room(self, key: ChunkKey, standing: Standing = ALONE, *, uses: int = 0) -> int | NoRoom:
        """A slot to fill with ``key``, evicting if need be. The chunk in front of it is not given
        up for it.

        Args:
            key: the chunk.
            standing: where it stands.
            uses: how often another tier says that it was used.

        Raises:
            ValueError: if the tier already holds the key.
        """
        if self.holds(key):
            raise ValueError(f"the tier already holds chunk {key.hex()}")
        front = self._slot_of(standing.behind)
        if not self._free:
            victim = self._victim(front)
            if isinstance(victim, NoRoom):
                if self._stored:  # it is not tried again
                    self._runs.missed(key, standing)
                return victim
            self._on_eviction(victim, self._runs.idle(self._visible[victim]))
            self._lose(victim, remembered=True)
        slot = self._free.pop()
        self._void.discard(slot)  # what is written to a slot replaces its content in any case
        self._filling[key] = slot
        self._runs.add(slot, key, standing, front, uses)
        return slot

    def filled(self, key: ChunkKey) -> None:
        """Make a filled chunk visible."""
        slot = self._filling.pop(key)
        self._stuck = False
        self.arrivals += 1
        self._visible[key] = slot
        self._keys[slot] = key
        if slot in self._leases:
            self._pinned += 1
        if self.on_change is not None:
            self.on_change(key)

    def abandoned(self, key: ChunkKey) -> None:
        """Give back the slot of a chunk that will not be filled; what some ranks wrote is void."""
        slot = self._filling.pop(key)
        self._runs.forget(slot)
        self._forget_content(slot)
        self._retire(slot)
        if self.on_change is not None:
            self.on_change(key)

    def disowned(self, key: ChunkKey) -> None:
        """What a chunk's slot is filled with must not become visible, and may still be written: the
        key is free at once, the slot with :meth:`release`."""
        self.lease(self._filling[key])
        self.abandoned(key)

    # -- losses ------------------------------------------------------------------------------

    def drop(self, key: ChunkKey) -> int | None:
        """Forget a visible chunk; its slot is reused once no lease is on it.

        Returns:
            The slot it had, or None if it was not visible.
        """
        return self._lose(key) if key in self._visible else None

    def lost(self, key: ChunkKey, place: int) -> None:
        """A chunk cannot be delivered from a slot: forget it, unless it is in another one now."""
        if self._visible.get(key) == place:
            self.drop(key)
            self._forget_content(place)

    def drops(self) -> tuple[int, ...]:
        """Slots that the store has yet to forget, since the last call."""
        void, self._void = self._void, set()
        return tuple(sorted(void))

    @property
    def pending(self) -> bool:
        """Whether :meth:`drops` would return any."""
        return bool(self._void)

    # -- use ---------------------------------------------------------------------------------

    def use_prefix(
        self,
        chain: Sequence[ChunkKey],
        use: Use,
        ends: Sequence[End] = (),
        *,
        over: bool = False,
    ) -> Iterator[None]:
        """Note a use of a prefix; see :meth:`~lamina_kv.tiers.contract.Index.use_prefix`."""
        if self._stored and not over:
            self._touches.add(chain, ends)
        runs = self._runs
        # Keys, because a slot may have another chunk, or none, when this goes on.
        loose: dict[ChunkKey | None, list[ChunkKey]] = {}  # ends, by what is in front of them
        for key, behind in ends:
            slot = self._slot_of(key)
            if slot >= 0:
                self._join(slot, behind)
                loose.setdefault(behind, []).append(key)
                yield
        index, heads = len(chain) - 1, []
        beyond = use.total > len(chain)
        while index >= 0:
            slot = self._slot_of(chain[index])
            if slot < 0:
                if over and not self._stored:  # a store may yet be written to
                    last, lacked = index == use.total - 1, index >= use.had
                    runs.missed(chain[index], Standing(use=use, last=last, needed=lacked))
                    yield
                index -= 1
                continue
            for end in loose.pop(chain[index], ()):
                self._use_end(end, use, over=over)
            needed = None if over else index + 1 - use.had
            index -= runs.used(slot, use, needed, beyond=beyond)
            beyond = False
            if index >= 0:
                heads.append(chain[index + 1])
                self._join(runs.head(slot), chain[index])
            yield
        for alone in loose.values():  # behind nothing that is here
            for end in alone:
                self._use_end(end, use, over=over)
        # From the front, so that each chunk changes its run once. Some may have gone meanwhile.
        for key in reversed(heads):
            slot = self._slot_of(key)
            if slot >= 0 and runs.head(slot) == slot:
                for _ in range(runs.merge(slot)):
                    yield

    def expect(self, chain: Sequence[ChunkKey], ends: Sequence[End] = ()) -> Iterator[None]:
        """A prefix will be used; see :meth:`~lamina_kv.tiers.contract.Index.expect`."""
        for key, _ in ends:
            if (slot := self._slot_of(key)) >= 0:
                self._runs.expect(slot)
                yield
        index = len(chain) - 1
        while index >= 0:
            slot = self._slot_of(chain[index])
            if slot < 0:
                index -= 1
                continue
            index -= self._runs.expect(slot)
            yield

    def _use_end(self, key: ChunkKey, use: Use, *, over: bool) -> None:
        slot = self._slot_of(key)
        if slot >= 0:
            self._runs.used(slot, use, None if over else use.found - use.had)

    def _join(self, slot: int, behind: ChunkKey | None) -> None:
        """The chunk in front of a run is known by now."""
        front = self._slot_of(behind)
        if front >= 0:
            self._runs.join(slot, front)

    def uses(self, key: ChunkKey) -> int:
        """How often a chunk that is visible was used, as far as it matters; 0 for none."""
        slot = self._visible.get(key)
        return 0 if slot is None else self._runs.uses(slot)

    def touches(self) -> tuple[tuple[ChunkKey, int], ...]:
        """Uses that the store has yet to hear of. A chunk may have left its slot since."""
        return self._touches.take(self._visible.get)

    # -- questions ---------------------------------------------------------------------------

    def asks(self) -> tuple[ChunkKey, ...]:
        """None: nobody else knows more."""
        return ()

    def told(self, keys: Sequence[ChunkKey], present: Sequence[bool] | None) -> None:
        """Never called: nothing is asked."""

    # -- the start ---------------------------------------------------------------------------

    def adopt(self, ranks: Sequence[StoredChunks]) -> None:
        """Take over the chunks that the tier held when it was opened.

        A slot in which not every rank has the same chunk goes to :meth:`drops`, and so does the
        younger of two slots with one chunk.

        Args:
            ranks: what each rank that keeps chunks has; the first with keys.
        """
        assert not self.used, "only an empty index adopts"
        found = agree(ranks, self._slots)
        self._runs.adopt(found.slots)
        free = np.ones(self._slots, bool)
        free[found.slots] = False
        self._free = array("i", np.flatnonzero(free)[::-1].astype(np.int32).tobytes())
        self._void.update(found.strays.tolist())
        for key, slot in found.chunks():
            if self._visible.setdefault(key, slot) == slot:
                self._keys[slot] = key
            else:
                self._runs.forget(slot)
                self._forget_content(slot)
                self._free.append(slot)

    def _slot_of(self, key: ChunkKey | None) -> int:
        """Slot of a chunk that is visible or on its way; -1 if there is none."""
        if key is None:
            return -1
        slot = self._visible.get(key)
        return self._filling.get(key, -1) if slot is None else slot

    def _victim(self, front: int) -> ChunkKey | NoRoom:
        """A chunk to give up for one that stands behind slot ``front``."""
        if not self.has_room:
            return NoRoom.IN_USE

        def may_go(slot: int) -> bool:
            return slot not in self._leases and self._keys[slot] is not None

        slot = self._unspared(may_go, front)
        if slot is None:
            slot = self._runs.victim(may_go, MOST_PASSED, front)
        if slot is None:
            slot = self._runs.pinned_victim(may_go)
        # What others stand behind stays, although these may not go at the moment: they may be of
        # the very prompt that the new chunk belongs to.
        self._stuck = slot is None
        if slot == front:
            return NoRoom.WORTH_LESS  # what would be behind it is worth no more
        key = None if slot is None else self._keys[slot]
        return NoRoom.IN_USE if key is None else key

    def _unspared(self, may_go: Callable[[int], bool], front: int) -> int | None:
        """A chunk to give up that need not be spared; None if none is soon found."""
        if not self._spared or len(self._spared) >= self._in_vain > 0:
            return None
        spared = self._spared

        def is_unspared(slot: int) -> bool:
            return slot not in spared and may_go(slot)

        slot = self._runs.victim(is_unspared, MOST_SPARED, front)
        self._in_vain = len(spared) if slot is None else 0
        return slot

    def _lose(self, key: ChunkKey, *, remembered: bool = False) -> int:
        """A visible chunk goes; returns its slot."""
        slot = self._visible.pop(key)
        self.version += 1
        self._keys[slot] = None
        self._runs.forget(slot, key if remembered else None)
        if self._spared.pop(slot, 0):
            self.lost_spared(key)
        if slot in self._leases:
            self._pinned -= 1
        self._retire(slot)
        if self.on_change is not None:
            self.on_change(key)
        return slot

    def _retire(self, slot: int) -> None:
        self._stuck = False  # what it stood behind may go
        if slot in self._leases:
            self._orphans.add(slot)
        else:
            self._free.append(slot)

    def _forget_content(self, slot: int) -> None:
        if self._stored:
            self._void.add(slot)

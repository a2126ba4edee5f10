"""Which chunk is in which tier: the near one and all far ones, in order of preference.

The catalog has one writer, the scheduler. Loads come from near only; what is only far is moved
there first. Tiers forget chunks each by itself, so that every tier is told of every use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain as joined
from itertools import islice
from math import inf

from lamina_kv.plan import NEAR, ChunkKey, RankReport, StoredChunks, TierName
from lamina_kv.quantities import size_of
from lamina_kv.tiers.config import Keep, TierConfig
from lamina_kv.tiers.contract import Answer, End, Index, NoRoom
from lamina_kv.tiers.hints import HintIndex
from lamina_kv.tiers.reuse import Standing, Use
from lamina_kv.tiers.slots import SlotIndex

AGED = 256
"""Runs whose age is brought up to date in one go: about half a millisecond with two tiers. A prefix
has one for every way in which requests went on behind it; one of a thousand runs takes some steps.
"""

MOST_USES = 256
"""Uses that may wait to be noted: those of some hundred requests that end at once. Where requests
with long prompts end faster than that for good, the oldest uses are not noted."""


@dataclass(frozen=True, slots=True)
class Far:
    """A far tier.

    Attributes:
        name: its name.
        index: which chunks it has.
        bound: bytes that may be on their way to it, and as many from it, over all ranks that keep
            chunks.
        keep: what is written to it.
        longest_call: seconds that one call of its store takes at most.
    """

    name: TierName
    index: Index
    bound: int
    keep: Keep = "all"
    longest_call: float = inf


class Catalog:
    """See the module.

    Args:
        near: the near tier.
        far: far tiers, the preferred one first.
        readable: whether a far tier may be read now; what is only elsewhere is not found.

    Attributes:
        near: the near tier.
        far: far tiers by name, the preferred one first.
    """

    def __init__(
        self,
        near: SlotIndex,
        far: Sequence[Far] = (),
        readable: Callable[[TierName], bool] = lambda _: True,
    ) -> None:
        self.near = near
        self.far = {tier.name: tier for tier in far}
        self._readable = readable
        self._indexes: tuple[Index, ...] = (near, *(tier.index for tier in far))
        self._uses: deque[Iterator[None]] = deque(maxlen=MOST_USES)

    # -- lookups -----------------------------------------------------------------------------

    def readable_far(self) -> list[Far]:
        """Far tiers that may be read now, the preferred one first."""
        return [tier for name, tier in self.far.items() if self._readable(name)]

    def locate(self, key: ChunkKey) -> TierName | None:
        """The best tier to have a chunk from: near, else a far one that may be read and is thought
        to have it. A tier that does not know is asked."""
        if key in self.near.visible:
            return NEAR
        for name, tier in self.far.items():
            if self._readable(name) and tier.index.find(key) is Answer.HERE:
                return name
        return None

    def unknown(self, key: ChunkKey) -> bool:
        """Whether a chunk is not found, and a far tier has yet to say whether it has it."""
        if key in self.near.visible:
            return False
        answers = {tier.index.find(key) for tier in self.readable_far()}
        return Answer.UNKNOWN in answers and Answer.HERE not in answers

    def keeps(self, key: ChunkKey) -> bool:
        """Whether a chunk can be had, or is on its way to where it can. Asks nobody. What only a
        tier has that is out of use is as good as lost."""
        return self.near.holds(key) or any(tier.index.holds(key) for tier in self.readable_far())

    def lasts(self, key: ChunkKey) -> bool:
        """Whether a chunk is in a far tier, or on its way there, or may be: what a store of others
        has nobody knows for certain."""
        tiers = self.far.values()
        return any(not tier.index.capacity or tier.index.holds(key) for tier in tiers)

    def out_of_use(self, key: ChunkKey) -> bool:
        """Whether a chunk is kept, but only by far tiers that may not be read now."""
        return not self.keeps(key) and any(tier.index.holds(key) for tier in self.far.values())

    # -- arrivals ----------------------------------------------------------------------------

    def room(self, key: ChunkKey, tier: TierName, standing: Standing) -> int | NoRoom:
        """Reserve a place in a tier for a chunk that is not held there; what other tiers have seen
        of its uses counts there, too."""
        uses = 0
        for index in self._indexes:  # no list: it is asked for every chunk that is saved
            uses = max(uses, index.uses(key))
        return self._index(tier).room(key, standing, uses=uses)

    def publish(self, key: ChunkKey, tier: TierName = NEAR) -> None:
        """Show a chunk in a tier where it has been filled."""
        self._index(tier).filled(key)

    def _index(self, tier: TierName) -> Index:
        return self.near if tier == NEAR else self.far[tier].index

    @property
    def version(self) -> int:
        """Changes whenever a chunk was lost somewhere; a memoised hit may be too long then."""
        return sum(index.version for index in self._indexes)

    @property
    def arrivals(self) -> int:
        """Changes whenever a chunk arrived, or more became known; a memoised hit may be too short
        then."""
        return sum(index.arrivals for index in self._indexes)

    # -- age ---------------------------------------------------------------------------------

    def note_use(
        self,
        chain: Sequence[ChunkKey],
        use: Use,
        ends: Sequence[End] = (),
        *,
        over: bool = False,
    ) -> None:
        """A request has used a prefix: its beginning is the youngest in every tier. Arguments as
        those of :meth:`~lamina_kv.tiers.contract.Index.use_prefix`."""
        self._uses.append(
            joined.from_iterable(
                index.use_prefix(chain, use, ends, over=over) for index in self._indexes
            )
        )
        self.bring_up_to_date()

    def expect(self, chain: Sequence[ChunkKey], ends: Sequence[End] = ()) -> Iterator[None]:
        """A request that waits will use a prefix: see
        :meth:`~lamina_kv.tiers.contract.Index.expect`."""
        return joined.from_iterable(index.expect(chain, ends) for index in self._indexes)

    def bring_up_to_date(self) -> None:
        """Let noted uses make runs younger, :data:`AGED` of them; the rest by later calls."""
        left = AGED
        while self._uses and left:
            left -= sum(1 for _ in islice(self._uses[0], left))
            if left:
                self._uses.popleft()


def open_catalog(
    reports: Sequence[RankReport],
    tiers: Sequence[TierConfig],
    readable: Callable[[TierName], bool],
    clock: Callable[[], float],
    on_eviction: Callable[[TierName, ChunkKey, float], None] = lambda tier, key, idle: None,
) -> Catalog:
    """A catalog of what every rank has. Slots on whose chunk not all ranks agree are forgotten.

    Args:
        reports: one from each rank.
        tiers: the far tiers' configuration, in order of preference.
        readable: see :class:`Catalog`.
        clock: monotonic seconds, for the age of hints and of chunks, and for pins.
        on_eviction: called when a tier with slots evicts a chunk, with the tier's name, the chunk,
            and the seconds for which the chunk was not used.

    Raises:
        ValueError: if a tier of some rank is smaller than one chunk.
    """
    near = min(report.near_slots for report in reports)
    ready = min([near, *(report.near.ready for report in reports if report.near is not None)])
    if near < 1:
        raise ValueError(f"{NEAR}.capacity: too small for {_one_chunk(reports)}")
    keeping = [report for report in reports if not report.follows]
    far = [
        Far(
            TierName(tier.name),
            _open_index(keeping, number, tier, clock, partial(on_eviction, TierName(tier.name))),
            tier.max_inflight * len(keeping),
            tier.keep,
            tier.longest_call,
        )
        for number, tier in enumerate(tiers)
    ]
    evicted = partial(on_eviction, NEAR)
    index = SlotIndex(near, stored=False, clock=clock, ready=ready, on_eviction=evicted)
    return Catalog(index, far, readable)


def _open_index(
    keeping: Sequence[RankReport],
    number: int,
    tier: TierConfig,
    clock: Callable[[], float],
    on_eviction: Callable[[ChunkKey, float], None],
) -> Index:
    """The index of far tier ``number``, from the reports of ranks that keep chunks."""
    reports = [report.tiers[number] for report in keeping]
    assert all(report.name == tier.name for report in reports), "ranks report tiers in order"
    stored: list[StoredChunks] = [each.stored for each in reports if each.stored is not None]
    if not stored:
        return HintIndex(clock)
    assert len(stored) == len(reports), "a tier finds chunks in the same way on every rank"
    slots = min(report.slots for report in reports)
    if slots < 1:
        raise ValueError(f"tiers.{tier.name}: too small for {_one_chunk(keeping)}")
    index = SlotIndex(slots, clock=clock, on_eviction=on_eviction)
    index.adopt(stored)
    return index


def _one_chunk(reports: Sequence[RankReport]) -> str:
    size = max(report.chunk_bytes for report in reports)
    return f"one chunk, which takes {size_of(size)} on each rank"

"""Far tiers of the simulated engine, and the rain on any store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Annotated
from unittest.mock import patch

from pydantic import Field

from lamina_kv.bench.faulty_store import Bytes, FaultyStore, StoreFaults
from lamina_kv.plan import ChunkKey, TierName
from lamina_kv.tiers import KINDS, Kind
from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.contract import Fate, Piece, Store
from lamina_kv.tiers.objects import verify
from lamina_kv.values import NAME
from simulator.content import Stamps, Violation
from simulator.faults import Sky, Weather
from stores import MemoryStore, Shelf

_NONE = StoreFaults()
_UNREAD = (Fate.LATE, Fate.REFUSED, Fate.DOWN, Fate.GONE, Fate.CORRUPT)
_UNWRITTEN = (Fate.LATE, Fate.REFUSED, Fate.DOWN)


class SlotsConfig(TierConfig):
    """A tier in memory, with slots."""

    kind: Annotated[str, NAME] = Field(default="slots", description="See the class.")


class KeysConfig(TierConfig):
    """A tier in memory, by key."""

    kind: Annotated[str, NAME] = Field(default="keys", description="See the class.")


@contextmanager
def simulated_kinds() -> Iterator[None]:
    """A configuration may name the tiers of this module while the context is open."""
    kinds = {"slots": Kind(SlotsConfig, ""), "keys": Kind(KeysConfig, "")}
    with patch.dict(KINDS, kinds):
        yield


@dataclass
class Past:
    """What outlives an engine.

    Attributes:
        shelves: what is in tiers in memory, by tier and rank.
        chunks: the stamps of every chunk that any engine has known.
        damaged: tiers that may fail to deliver what they show.
        spoiled: chunks that tiers may fail to deliver.
        lives: engines so far.
        users: requests that needed a chunk of each key, once for each time that they got blocks.
    """

    shelves: dict[tuple[TierName, int], Shelf] = field(default_factory=dict)
    chunks: dict[ChunkKey, Stamps] = field(default_factory=dict)
    damaged: set[TierName] = field(default_factory=set)
    spoiled: set[tuple[TierName, ChunkKey]] = field(default_factory=set)
    lives: int = 0
    users: defaultdict[ChunkKey, set[str]] = field(default_factory=lambda: defaultdict(set))

    def spread(self, random: Random) -> None:
        """Leave each chunk in one of the tiers in memory only."""
        tiers = sorted({tier for tier, _ in self.shelves})
        chosen = {key: random.choice(tiers) for key in self.chunks} if tiers else {}
        for (tier, _), shelf in self.shelves.items():
            for place, (key, _) in list(shelf.held.items()):
                if chosen[key] != tier:
                    del shelf.held[place]


@lru_cache(maxsize=16)
def faults_of(weather: Weather) -> StoreFaults:
    """What the weather does to stores. How long they take is not said here."""
    return StoreFaults(
        raises=weather.raises,
        unanswered=weather.unanswered,
        lies=weather.lies,
        vanishes=weather.gone,
        unread=dict.fromkeys(_UNREAD, weather.unread / len(_UNREAD)),
        unwritten=dict.fromkeys(_UNWRITTEN, weather.refused / len(_UNWRITTEN)),
        unsure=weather.unsure,
        unkept=weather.unkept,
        wrong=weather.wrong,
    )


class RainyStore(FaultyStore):
    """A store that fails as the weather has it, in virtual time.

    Args:
        inner: the store.
        tier: its name.
        sky: decides.
        shard: which rank's part of a chunk it has.
        length: bytes of the rows of a chunk.
        objects: what was written last of a chunk, by which rank; of all ranks' stores.
        stall: called where a job may take its time.
        violations: where to put what must not happen.
    """

    def __init__(
        self,
        inner: Store,
        tier: TierName,
        sky: Sky,
        shard: int,
        length: int,
        objects: dict[ChunkKey, tuple[int, Bytes]],
        stall: Callable[..., None],
        violations: list[Violation],
    ) -> None:
        super().__init__(inner)
        self._tier = tier
        self._sky = sky
        self._shard = shard
        self._length = length
        self._objects = objects
        self._stall = stall
        self._violations = violations

    def find(self, keys: Sequence[ChunkKey], timeout: float) -> Sequence[bool] | None:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        self._look_up()
        self._stall()
        return super().find(keys, timeout)

    def probe(self, timeout: float) -> bool:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        self._look_up()
        self._stall()
        return super().probe(timeout)

    def read(self, pieces: Sequence[Piece], timeout: float) -> Sequence[Fate]:
        """See :class:`~lamina_kv.tiers.contract.Store`. It takes its time in the middle of them."""
        self._look_up()
        half = len(pieces) // 2
        before = super().read(pieces[:half], timeout) if half else ()
        self._stall()
        return [*before, *super().read(pieces[half:], timeout)]

    def write(self, pieces: Sequence[Piece], timeout: float) -> Sequence[Fate]:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        self._look_up()
        self._stall()
        for piece in pieces:
            if not verify(piece.buffer, piece.key, self._shard, self._length):
                what = f"what {self._tier} is to write of a chunk on rank {self._shard}"
                self._violations.append(Violation(f"{what} does not verify"))
            self._objects[piece.key] = self._shard, piece.buffer.copy()
        return super().write(pieces, timeout)

    def vanish(self, chosen: Callable[[ChunkKey], bool]) -> None:
        """Others remove chunks, if this is a store where they can."""
        if isinstance(self.inner, MemoryStore) and not self.inner.slots:
            held = self.inner.shelf.held
            for place in [place for place, (key, _) in held.items() if chosen(key)]:
                del held[place]

    def _vanish(self, key: ChunkKey) -> None:
        self.vanish(key.__eq__)

    def _mistakable(self, piece: Piece, whole: int) -> Sequence[Bytes]:
        """Another rank's part of the chunk, too."""
        others = super()._mistakable(piece, whole)
        shard, content = self._objects.get(piece.key, (self._shard, piece.buffer))
        return others if shard == self._shard or self._sky.strikes(0.5) else [content]

    def _look_up(self) -> None:
        dry = self._tier in self._sky.dry
        faults = _NONE if dry else faults_of(self._sky.weather)
        if faults is not self.faults:
            self.faults = faults

    def _chance(self, what: str, key: ChunkKey) -> float:
        return self._sky.random.random()

    def _pause(self, seconds: float) -> None:
        """Stores take their time by stalling."""

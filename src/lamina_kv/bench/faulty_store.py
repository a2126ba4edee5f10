"""A store that fails on purpose: around any other one, for tests and benches. Not for serving.

::

    data room ── find, read, write ──▶ FaultyStore ── what gets through ──▶ any store
                                       late, gone, wrong, refused, …

What becomes of a chunk is decided by the seed, the chunk and how often it was asked for, and not by
which thread came first: the same seed gives the same faults.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from lamina_kv.bench.pacing import Link
from lamina_kv.geometry import OBJECT_HEADER_BYTES
from lamina_kv.plan import ChunkKey, StoredChunks
from lamina_kv.tiers import KINDS, Kind
from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.contract import Fate, Piece, Store, Tenant, Traits
from lamina_kv.tiers.objects import row_bytes

Bytes = npt.NDArray[np.uint8]

_P99 = 2.3263
"""Standard deviations above the mean, below which 99 % of a normal distribution lie."""

_RAREST = 1e-6
"""The tail ends here: a distribution without an end would have calls that never return."""

_MOST_REMEMBERED = 4
"""Objects that are kept, to be delivered in place of others."""

_UNSURE = (Fate.LATE, Fate.DOWN, Fate.REFUSED)
"""What a store may say of a chunk that it has written all the same."""

_NO_KEY = ChunkKey(b"")
"""What the faults of a probe are drawn for."""

_SCRIBBLE = 0x99
"""What a failed read leaves in a buffer."""


class InjectedError(OSError):
    """What a faulty store raises."""


@dataclass(frozen=True, slots=True)
class StoreFaults:
    """What goes wrong with a store: nothing, unless it is said.

    Attributes:
        latency: seconds that half of the calls take longer.
        tail: seconds that 1 in 100 calls takes longer at least; 0: all take ``latency``.
        bandwidth: bytes per second each way, of all calls together.
        hangs: probability of a call that it takes ``hang`` seconds, whatever its timeout.
        hang: those seconds.
        raises: of a call, that it raises :class:`InjectedError`.
        unanswered: of a question, that it has no answer.
        lies: of the answer about one chunk, that it is the wrong one.
        vanishes: of a chunk that is to be read, that it is gone by then, until it is written again.
        unread: of a chunk that is to be read, that it ends so instead.
        unwritten: of a chunk that is to be written, that it ends so instead.
        unsure: of a chunk that was written, that the store says it was not.
        unkept: of a chunk that was written, that it is gone at once.
        wrong: of a chunk that was read, that its bytes are others, without a word.
        overruns: of a chunk that is to be read, that the call says LATE and its bytes come
            ``overrun`` seconds after that. No store may do this.
        overrun: those seconds.

    Raises:
        ValueError: if a figure makes no sense; the message names it.
    """

    latency: float = 0.0
    tail: float = 0.0
    bandwidth: float = math.inf
    hangs: float = 0.0
    hang: float = 0.0
    raises: float = 0.0
    unanswered: float = 0.0
    lies: float = 0.0
    vanishes: float = 0.0
    unread: Mapping[Fate, float] = field(default_factory=dict, hash=False)
    unwritten: Mapping[Fate, float] = field(default_factory=dict, hash=False)
    unsure: float = 0.0
    unkept: float = 0.0
    wrong: float = 0.0
    overruns: float = 0.0
    overrun: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or not self.latency >= 0:
            raise ValueError(
                "a store needs a positive bandwidth and no negative latency, "
                f"got {self.bandwidth} bytes/s and {self.latency} s"
            )
        if self.tail and not self.tail >= self.latency > 0:
            raise ValueError(
                f"a tail of {self.tail} s needs a median latency above 0 and not above it, "
                f"got {self.latency} s"
            )

    def seconds(self, chance: float) -> float:
        """How much longer a call takes: log-normal, with this median and 99th percentile.

        Args:
            chance: where in the distribution, between 0 and 1.
        """
        if not self.tail or not self.latency:
            return self.latency
        sigma = math.log(self.tail / self.latency) / _P99
        deviation = NormalDist().inv_cdf(min(max(chance, _RAREST), 1 - _RAREST))
        return self.latency * math.exp(sigma * deviation)


class FaultyStore:
    """A :class:`~lamina_kv.tiers.contract.Store` around another one.

    It keeps the contract of stores, but where ``hangs`` and ``overruns`` say otherwise: what does
    not come within a call's timeout is LATE, and no byte of it comes.

    Args:
        inner: the store.
        faults: what goes wrong.
        seed: other seeds have other chunks fail.
        sleep: waits for some seconds.

    Attributes:
        inner: as given.
        struck: faults so far, by name.
    """

    def __init__(
        self,
        inner: Store,
        faults: StoreFaults | None = None,
        *,
        seed: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.inner = inner
        self.struck: Counter[str] = Counter()
        self._seed = seed
        self._sleep = sleep
        self._links = {verb: Link(sleep=sleep) for verb in ("read", "write")}
        self._lock = threading.Lock()
        self._throws: Counter[tuple[str, ChunkKey]] = Counter()
        self._gone: set[ChunkKey] = set()
        self._others: deque[Bytes] = deque(maxlen=_MOST_REMEMBERED)
        self._overruns: list[threading.Timer] = []
        self.faults = faults or StoreFaults()

    @property
    def faults(self) -> StoreFaults:
        """What goes wrong from now on."""
        return self._faults

    @faults.setter
    def faults(self, faults: StoreFaults) -> None:
        self._faults = faults
        for link in self._links.values():
            link.pace(faults.bandwidth, 0.0)

    @property
    def traits(self) -> Traits:
        """As the store's."""
        return self.inner.traits

    @property
    def slots(self) -> int:
        """As the store's."""
        return self.inner.slots

    def stored(self, *, keys: bool) -> StoredChunks | None:
        """As the store's."""
        return self.inner.stored(keys=keys)

    def drop(self, slots: Sequence[int]) -> None:
        """As the store's."""
        self.inner.drop(slots)

    def touch(self, uses: Sequence[tuple[ChunkKey, int]]) -> None:
        """As the store's."""
        self.inner.touch(uses)

    def close(self) -> None:
        """As the store's; nothing overruns any more."""
        for timer in self._overruns:
            timer.cancel()
            timer.join()
        self.inner.close()

    # -- calls -------------------------------------------------------------------------------

    def find(self, keys: Sequence[ChunkKey], timeout: float) -> Sequence[bool] | None:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        delay = self._begin("find", keys[0]) if keys else 0.0
        self._pause(min(delay, timeout))
        if delay > timeout or (keys and self._strikes("unanswered", keys[0])):
            return None
        found = self.inner.find(keys, timeout - delay)
        if found is None:
            return None
        return [
            (bool(here) and key not in self._gone) != self._strikes("lies", key)
            for key, here in zip(keys, found, strict=True)
        ]

    def probe(self, timeout: float) -> bool:
        """See :class:`~lamina_kv.tiers.contract.Store`. Fails as questions and reads do."""
        delay = self._begin("probe", _NO_KEY)
        self._pause(min(delay, timeout))
        if delay > timeout or self._strikes("unanswered", _NO_KEY):
            return False
        if self._one_of("unread", self.faults.unread, _NO_KEY) is not None:
            return False
        return self.inner.probe(timeout - delay)

    def read(self, pieces: Sequence[Piece], timeout: float) -> Sequence[Fate]:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        fates, through, left = self._admit("read", pieces, timeout, self._unread)
        found = self.inner.read([pieces[index] for index in through], left) if through else ()
        for index, fate in zip(through, found, strict=True):
            piece, fates[index] = pieces[index], fate
            if fate is not Fate.DONE:
                continue
            copy = piece.buffer.copy()
            if self._strikes("overruns", piece.key):
                fates[index] = self._overrun(piece, copy)
            elif self._strikes("wrong", piece.key):
                self._spoil(piece)
            self._others.append(copy)
        return [fates[index] for index in range(len(pieces))]

    def write(self, pieces: Sequence[Piece], timeout: float) -> Sequence[Fate]:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        fates, through, left = self._admit("write", pieces, timeout, self._unwritten)
        if self.slots and fates:  # what a slot held before is gone in any case
            self.inner.drop([pieces[index].place for index in fates])
        kept = self.inner.write([pieces[index] for index in through], left) if through else ()
        for index, fate in zip(through, kept, strict=True):
            fates[index] = self._written(pieces[index]) if fate is Fate.DONE else fate
        return [fates[index] for index in range(len(pieces))]

    def _admit(
        self,
        verb: str,
        pieces: Sequence[Piece],
        timeout: float,
        fate_of: Callable[[Piece], Fate | None],
    ) -> tuple[dict[int, Fate], list[int], float]:
        """Take the time that a call takes.

        Returns:
            The fates of the pieces that do not get through, by index; the indices of the others;
            the seconds that are left of the timeout.
        """
        delay = self._begin(verb, pieces[0].key) if pieces else 0.0
        fates: dict[int, Fate] = {}
        through: list[int] = []
        needed = delay
        for index, piece in enumerate(pieces):
            fate = fate_of(piece)
            if fate is None and delay <= timeout:
                needed = max(needed, delay + self._links[verb].ask_for(len(piece.buffer)))
            if fate is None and needed > timeout:
                fate = Fate.LATE
            if fate is None:
                through.append(index)
            else:
                fates[index] = fate
        self._pause(min(needed, timeout))
        return fates, through, max(0.0, timeout - needed)

    def _begin(self, verb: str, key: ChunkKey) -> float:
        """Seconds that a call takes longer; one that hangs has hung already."""
        if self._strikes("hangs", key):
            self._pause(self.faults.hang)
        if self._strikes("raises", key):
            raise InjectedError(f"{verb} was made to raise")
        return self.faults.seconds(self._chance("latency", key)) if self.faults.latency else 0.0

    # -- chunks ------------------------------------------------------------------------------

    def _unread(self, piece: Piece) -> Fate | None:
        if piece.key in self._gone:
            return Fate.GONE
        if self._strikes("vanishes", piece.key):
            self._vanish(piece.key)
            return Fate.GONE
        fate = self._one_of("unread", self.faults.unread, piece.key)
        if fate is not None:
            piece.buffer[: len(piece.buffer) // 2] = _SCRIBBLE
        return fate

    def _unwritten(self, piece: Piece) -> Fate | None:
        self._others.append(piece.buffer.copy())
        return self._one_of("unwritten", self.faults.unwritten, piece.key)

    def _written(self, piece: Piece) -> Fate:
        self._gone.discard(piece.key)
        if self._strikes("unkept", piece.key):
            self._vanish(piece.key)
        if not self._strikes("unsure", piece.key):
            return Fate.DONE
        return _UNSURE[int(self._chance("said", piece.key) * len(_UNSURE))]

    def _vanish(self, key: ChunkKey) -> None:
        """A chunk is gone. Stores cannot delete: this one forgets on their behalf."""
        self._gone.add(key)

    def _overrun(self, piece: Piece, content: Bytes) -> Fate:
        def arrive() -> None:
            piece.buffer[:] = content

        timer = threading.Timer(self.faults.overrun, arrive)
        self._overruns.append(timer)
        piece.buffer[:] = _SCRIBBLE
        timer.start()
        return Fate.LATE

    def _spoil(self, piece: Piece) -> None:
        """Other bytes than those that were asked for, in one of the ways in which stores do it."""
        buffer, key = piece.buffer, piece.key
        whole = OBJECT_HEADER_BYTES + row_bytes(buffer)
        others = self._mistakable(piece, whole)
        way = int(self._chance("way", key) * 3)
        place = int(self._chance("place", key) * (whole - OBJECT_HEADER_BYTES))
        if way == 0 and others:
            buffer[:whole] = others[0][:whole]
        elif way == 1 and buffer[OBJECT_HEADER_BYTES + place : whole].any():
            buffer[OBJECT_HEADER_BYTES + place : whole] = 0  # it is too short
        else:
            buffer[place] ^= 1 << int(self._chance("bit", key) * 8)

    def _mistakable(self, piece: Piece, whole: int) -> Sequence[Bytes]:
        """Objects that could be delivered instead of a piece's first ``whole`` bytes."""
        mine = piece.buffer[:whole]
        return [other for other in tuple(self._others) if (other[:whole] != mine).any()]

    # -- dice --------------------------------------------------------------------------------

    def _strikes(self, fault: str, key: ChunkKey) -> bool:
        """Whether the fault of that name happens to a chunk now."""
        probability: float = getattr(self.faults, fault)
        struck = probability > 0 and self._chance(fault, key) < probability
        self.struck[fault] += struck
        return struck

    def _one_of(self, fault: str, fates: Mapping[Fate, float], key: ChunkKey) -> Fate | None:
        """Which fate befalls a chunk, each with its probability; None: none of them."""
        chance = self._chance(fault, key) if fates else 1.0
        for fate, probability in fates.items():
            if chance < probability:
                self.struck[f"{fault} {fate}"] += 1
                return fate
            chance -= probability
        return None

    def _chance(self, what: str, key: ChunkKey) -> float:
        """A number between 0 and 1: by seed, chunk and how often it was asked for."""
        with self._lock:
            self._throws[what, key] += 1
            throw = self._throws[what, key]
        name = f"{self._seed} {what} {throw} ".encode() + key
        return int.from_bytes(blake2b(name, digest_size=7).digest()) / (1 << 56)

    def _pause(self, seconds: float) -> None:
        if seconds > 0:
            self._sleep(seconds)


@dataclass(frozen=True)
class FaultyKind(Kind):
    """A kind of tier whose stores fail.

    Attributes:
        faults: what goes wrong.
    """

    faults: StoreFaults = field(default_factory=StoreFaults)

    def open(self, config: TierConfig, tenant: Tenant) -> Store:
        """See :class:`~lamina_kv.tiers.Kind`."""
        return FaultyStore(super().open(config, tenant), self.faults)


def make_tiers_fail(faults: StoreFaults) -> None:
    """Every far tier that this process opens from now on fails so."""
    for name, kind in KINDS.items():
        given = {each.name: getattr(kind, each.name) for each in fields(Kind)}
        KINDS[name] = FaultyKind(**given, faults=faults)

"""How likely chunks are used again: learnt by the tier itself, for chunks of a kind and of an age.

A chunk's *kind* is what was seen at its last use: how often it had been used, and by what sort of
request. Its *age* is the number of chunks that the tier took in since. For each kind and age the
tier counts uses, and how many chunks were that old for how long. The quotient is the *hazard*.

Where the engine had a chunk itself, no tier was needed, and the use says nothing about when one is.
So a tier that is no larger than the engine's own cache learns that chunks are needed when they are
old enough for the engine to have given them up, and keeps others than the engine does.

From the hazards follows what a chunk is *worth*: the most uses per slot and time that keeping it
from now on can bring, over every moment at which it might be given up (a Gittins index). A kind
that is used again soon or never is worth much while it is young. A kind that is used again at any
age keeps its worth. Without evidence worth falls with age and rises with uses: a chunk that was
used three times lives three times as long as one that was used once.

Chunks that were given up are remembered for a while (:class:`Ghosts`). Otherwise a tier would never
learn what it loses, and a chunk that comes back would be a stranger.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from math import log2
from typing import NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.regard import USUAL, Regard

_SORTS = 13
KINDS = 2 * _SORTS
"""See :func:`kind_of`."""

AGES = 50
"""Ages that are told apart, two for each doubling: up to 32 million additions."""

SAMPLE = 8192
"""Slots, and ghosts, that are looked at to learn: with them a lesson takes a millisecond in a tier
of a million slots. Of a kind that a hundredth of the tier is of, it meets some eighty."""

GHOSTS_PER_SLOT = 8
"""What a chunk was that comes back after eight fillings of the tier is still known. With four, a
tier of a hundredth of the conversation trace finds 8 % less."""

GHOSTS = 1 << 18
"""Ghosts at most: 2.4 MB."""

WAYS = 8
"""Ghosts of one set. With one, ghosts push each other out long before they are old, and a tier of
3 % of the conversation trace finds .152 of all blocks instead of .178."""

_MEMORY = 0.9
"""What evidence counts after four fillings of the tier. With .97 a tier of 1 % of the conversation
trace finds .098 of all blocks instead of .101."""

_LEAST_TRUST, _TRUST = 32.0, 0.001
"""A kind's own evidence weighs as much as that of all kinds, once so many of its chunks, and this
share of the tier, have been of an age. With 8 chunks alone a tier of 30 % of the conversation
trace finds less than the order of use does. Chunks of a prompt come and go together, so that a few
are one event: with 8, a tier of 10 % of that trace finds .292 of all blocks instead of .297."""

_FALL = 0.7
"""Where nothing was seen the hazard falls to this from one age to the next: without evidence that
is the order of use. The conversation trace does not tell .6, .7 and .75 apart."""

_STEPS = 2.0 ** (np.arange(AGES + 1) / 2) - 1
_WIDTHS = np.diff(_STEPS)
_PASSED = np.triu(np.ones((AGES, AGES), bool))  # [from an age, to an age]

Floats = npt.NDArray[np.float64]

Sample = tuple[npt.NDArray[np.int8], npt.NDArray[np.uint32], int]
"""Kinds and stamps of some chunks, and how many each of them stands for."""


@dataclass(frozen=True, slots=True)
class Use:
    """One request's use of its prefix, in chunks of its first group.

    Attributes:
        found: chunks that it found kept.
        total: whole chunks of its prompt.
        regard: what the request says of chunks that it uses.
        had: of those that it found, how many the engine had itself: it needed no tier for them.
    """

    found: int = 0
    total: int = 0
    regard: Regard = USUAL
    had: int = 0


class Standing(NamedTuple):
    """Where a new chunk stands.

    Attributes:
        behind: the chunk in front of it, without which it is of no use; None if there is none, or
            nobody knows.
        use: the request that brings it.
        last: whether it is the last chunk of that request's prompt.
        needed: whether that request lacked it. If not, the engine had it itself.
    """

    behind: ChunkKey | None = None
    use: Use = Use()
    last: bool = False
    needed: bool = True


ALONE = Standing()
"""That of a chunk of which nothing is known."""


def kind_of(uses: int, use: Use, *, last: bool, branches: bool) -> int:
    """The kind of a chunk. What a session uses is of kinds of its own: more is to come of it.

    Args:
        uses: how often it has been used, this use included.
        use: the use.
        last: whether it is the last chunk of the prompt: if new, nobody has gone on behind it.
        branches: whether requests went on behind it in several ways.
    """
    first = _SORTS * use.regard.session
    if last and uses == 1:
        return first
    if uses > 1:
        return first + 7 + 2 * min(uses - 2, 2) + branches
    new = use.total - use.found
    return first + 1 + 3 * (use.found > 1) + (new >= 4) + (new >= 16)


def uses_of(kind: int) -> int:
    """How often a chunk of a kind has been used, as far as its kind says."""
    sort = kind % _SORTS
    return 1 if sort < 7 else 2 + (sort - 7) // 2


_ODDS = np.array([0.5 if kind % _SORTS == 0 else uses_of(kind) for kind in range(KINDS)])
"""How likely a chunk of each kind is used again, beside one that was used once, as long as nothing
else is known. In proportion to how often it was used. The last chunk of a prompt half as likely as
those in front of it: of the requests that use these, not all go on behind it."""


class Ghosts:
    """Chunks that were given up: kind, and moment of last use. The oldest are forgotten first, of
    :data:`WAYS` that a table of this size cannot tell apart.

    Args:
        slots: the tier's.
    """

    def __init__(self, slots: int) -> None:
        size = WAYS << (max(1, min(GHOSTS_PER_SLOT * slots, GHOSTS) // WAYS) - 1).bit_length()
        self._mask = size // WAYS - 1
        self._names = array("I", bytes(4 * size))
        self._stamps = array("I", bytes(4 * size))
        self._kinds = array("b", (-1,)) * size

    def add(self, key: ChunkKey, kind: int, stamp: int) -> None:
        """A chunk is given up."""
        name = crc32(key)
        begin = (name & self._mask) * WAYS
        kinds = self._kinds[begin : begin + WAYS]
        last = begin + (kinds.index(-1) if -1 in kinds else WAYS - 1)
        for values in self._names, self._stamps, self._kinds:
            values[begin + 1 : last + 1] = values[begin:last]
        self._names[begin], self._stamps[begin], self._kinds[begin] = name, stamp, kind

    def take(self, key: ChunkKey) -> tuple[int, int] | None:
        """A chunk comes back: its kind and stamp, if it is remembered. Forgets it."""
        name = crc32(key)
        begin = (name & self._mask) * WAYS
        names = self._names[begin : begin + WAYS]
        if name not in names:
            return None
        place = begin + names.index(name)
        kind, self._kinds[place] = self._kinds[place], -1
        self._names[place] = 0
        return (kind, self._stamps[place]) if kind >= 0 else None

    def sample(self, turn: int) -> Sample:
        """Some ghosts, others in the next turn; see :meth:`Worth.learn`."""
        step = -(-len(self._kinds) // SAMPLE)
        kinds = np.frombuffer(self._kinds, np.int8)[turn % step :: step]
        there = kinds >= 0
        stamps = np.frombuffer(self._stamps, np.uint32)[turn % step :: step]
        return kinds[there], stamps[there], step


class Worth:
    """See the module.

    Args:
        slots: the tier's.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._events = [[0.0] * AGES for _ in range(KINDS)]  # since the last lesson
        self._uses = np.zeros((KINDS, AGES))
        self._waits = np.zeros((KINDS, AGES))
        self._trust = max(_LEAST_TRUST, _TRUST * slots)
        self._set()

    def _set(self) -> None:
        worth = _worth(self._uses, self._waits, self._trust)
        self._worth = worth.tolist()
        self._least = np.minimum.accumulate(worth, axis=1).tolist()

    def of(self, kind: int, age: int) -> float:
        """What a chunk of a kind and age is worth: uses per slot and addition."""
        return float(self._worth[kind][age_class(age)])

    def least(self, kind: int, age: int) -> float:
        """What the chunk of a kind is worth that is worth least of all that are no older."""
        return float(self._least[kind][age_class(age)])

    def used(self, kind: int, age: int, chunks: int) -> None:
        """Chunks of a kind and age were used again."""
        self._events[kind][age_class(age)] += chunks

    def learn(self, passed: int, now: int, *samples: Sample) -> None:
        """Bring worths up to date.

        Args:
            passed: additions since the last lesson.
            now: the tier's clock.
            samples: of the chunks that are here, and of ghosts.
        """
        fade = _MEMORY ** (passed / (4 * self._slots))
        self._uses = (self._uses + self._events) * fade
        self._waits *= fade
        self._events = [[0.0] * AGES for _ in range(KINDS)]
        for kinds, stamps, share in samples:
            ages = np.uint32(now) - stamps
            places = kinds.astype(np.intp) * AGES
            places += np.minimum(2 * np.log2(ages + 1.0), AGES - 1).astype(np.intp)
            waits = np.bincount(places, np.minimum(ages, passed) * share, KINDS * AGES)
            self._waits += waits.reshape(KINDS, AGES)
        if not self._uses.any():
            return  # how long chunks waited in vain tells none from another
        self._set()


def age_class(age: int) -> int:
    """Which of :data:`AGES` an age belongs to."""
    return min(int(2 * log2(age + 1)), AGES - 1)


def _worth(uses: Floats, waits: Floats, trust: float) -> Floats:
    """Worth by kind and age, from uses, from chunks times additions, and from how many chunks of a
    kind count as much as all others."""
    all_uses, all_waits = uses.sum(axis=0).tolist(), (_ODDS @ waits).tolist()
    common, total = [], sum(all_waits)
    hazard = sum(all_uses) / total if total and any(all_uses) else 1e-9
    for used, waited, width in zip(all_uses, all_waits, _WIDTHS.tolist(), strict=True):
        hazard = (used + _FALL * hazard * width) / (waited + width)
        common.append(hazard)
    # Kinds of which nothing was seen are alike if their odds are: one row for each odds, the last.
    seen = np.flatnonzero((uses + waits).any(axis=1))
    all_odds, which = np.unique(_ODDS, return_inverse=True)
    nothing = np.zeros((len(all_odds), AGES))
    uses, waits = (np.vstack((each[seen], nothing)) for each in (uses, waits))
    odds = np.concatenate((_ODDS[seen], all_odds))[:, None]
    hazards = (uses + odds * np.array(common) * _WIDTHS * trust) / (waits + _WIDTHS * trust)
    steps = hazards * _WIDTHS
    rooms = -np.expm1(-steps) / hazards  # slots and additions of a chunk until it is used, or older
    ends = np.cumsum(steps, axis=1)
    begins = ends - steps
    kept = np.exp(-np.maximum(begins[:, None, :] - begins[:, :, None], 0.0)) * _PASSED
    costs = np.cumsum(kept * rooms[:, None, :], axis=2)
    gains = -np.expm1(-np.maximum(ends[:, None, :] - begins[:, :, None], 0.0))
    best = np.max(gains * _PASSED / np.where(_PASSED, costs, 1.0), axis=2)
    worth: Floats = best[len(seen) + which]
    worth[seen] = best[: len(seen)]
    return worth

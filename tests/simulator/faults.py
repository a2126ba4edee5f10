"""What goes wrong: the weather, and the copies and the transport that it rains on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from lamina_kv.data.movers.base import Mover, Pairs
from lamina_kv.data.movers.fences import CopyFailed, Fence
from lamina_kv.data.near import Indices, NearSlab
from lamina_kv.plan import NearSlots, Receipt, TransferReceipt
from simulator.content import Violation

GROWS = 0.05
"""Of a look at host memory that grows, how probable it is that there is more."""

WRITE_TIME = 0.5
"""Deadlines that the write of a stalled load into the engine takes at most."""


class InjectedError(OSError):
    """The weather's own."""


@dataclass(frozen=True)
class Weather:
    """Probabilities of what can go wrong.

    Attributes:
        error: of a row of a load between steps, and of a save, that its copy raises; half of them
            when the device has been given all of it.
        slow: of a load or save, that it takes up to a few deadlines.
        hang: of a save, that it takes for ever.
        far_slow: of a call of a far tier, that it takes up to a few deadlines.
        far_hang: of a call of a far tier, that it takes for ever.
        late: of a rank's receipts, that they are held back for a step.
        twice: of a receipt, that it is delivered again.
        stale: of a step, that a receipt of long ago is delivered again.
        shuffled: of a delivery, that the receipts in it change places.
        overtaken: of a receipt, that it is held back and later ones are not.
        gone: of a chunk that a far tier is to read, that it vanished a moment before.
        wrong: of a chunk that a far tier has read, that its bytes are others, without a word.
        unread: of a chunk that a far tier is to read, that it is not, and the store says so.
        refused: of a chunk that a far tier is to write, that it is not, and the store says so.
        unsure: of a chunk that a far tier has written, that the store says it was not.
        unkept: of a chunk that a store without slots has written, that it is gone at once.
        raises: of a call of a store, that it raises.
        unanswered: of a question, that there is no answer.
        lies: of each answer, that it is the wrong one.
        vanishes: of a step, that a store without slots gives up some chunks.
    """

    error: float = 0.0
    slow: float = 0.0
    hang: float = 0.0
    far_slow: float = 0.0
    far_hang: float = 0.0
    late: float = 0.0
    twice: float = 0.0
    stale: float = 0.0
    shuffled: float = 0.0
    overtaken: float = 0.0
    gone: float = 0.0
    wrong: float = 0.0
    unread: float = 0.0
    refused: float = 0.0
    unsure: float = 0.0
    unkept: float = 0.0
    raises: float = 0.0
    unanswered: float = 0.0
    lies: float = 0.0
    vanishes: float = 0.0

    @classmethod
    def draw(cls, random: Random) -> Weather:
        """Any weather; fair more often than not."""

        def chance(rain: float) -> float:
            return rain * random.random() if random.random() < 0.3 else 0.0

        return cls(
            error=chance(0.2),
            slow=chance(0.3),
            hang=chance(0.05),
            far_slow=chance(0.5),
            far_hang=chance(0.1),
            late=chance(0.5),
            twice=chance(0.5),
            stale=chance(0.5),
            shuffled=chance(1.0),
            overtaken=chance(0.5),
            gone=chance(0.4),
            wrong=chance(0.4),
            unread=chance(0.4),
            refused=chance(0.5),
            unsure=chance(0.3),
            unkept=chance(0.5),
            raises=chance(0.2),
            unanswered=chance(0.5),
            lies=chance(0.5),
            vanishes=chance(0.2),
        )


class Sky:
    """The present weather, and the dice.

    Args:
        random: the dice.
        deadline: the unit of slowness, in seconds.

    Attributes:
        weather: may be changed at any time.
        random: the dice.
        deadline: the unit of slowness, in seconds.
        dry: tiers on which it does not rain.
    """

    def __init__(self, random: Random, deadline: float) -> None:
        self.weather = Weather()
        self.random = random
        self.deadline = deadline
        self.dry: set[str] = set()

    def strikes(self, probability: float) -> bool:
        """Whether something of that probability happens now."""
        return probability > 0 and self.random.random() < probability

    def delay(self, pool: str) -> float:
        """How long a job takes, in seconds. A copy between near and engine never hangs: an engine
        stops then."""
        kind, _, tier = pool.partition("-")
        slow, hang = self.weather.slow, self.weather.hang if kind == "save" else 0.0
        if kind in ("read", "write"):
            slow, hang = self.weather.far_slow, self.weather.far_hang
            if tier in self.dry:
                return 0.0
        if self.strikes(hang):
            return math.inf
        return self.random.random() * 3 * self.deadline if self.strikes(slow) else 0.0


class Growth:
    """Host memory that can be used bit by bit, and perhaps never all of it.

    Args:
        random: decides.
        violations: where copies of what cannot be used are noted.
    """

    def __init__(self, random: Random, violations: list[Violation]) -> None:
        self._random = random
        self._violations = violations
        self._slots: NearSlots | None = None
        self._end = 0

    def next(self, slots: int) -> NearSlots:
        """What may be used by now of so many slots."""
        random, now = self._random, self._slots
        if now is None:
            self._end = random.choice((slots, random.randint(0, slots)))
            now = NearSlots(random.choice((0, 0, min(1, self._end))), slots)
        elif now.ready < self._end and random.random() < GROWS:
            now = NearSlots(min(self._end, now.ready + random.randint(1, 4)), slots)
        elif now.ready == self._end and random.random() < GROWS:
            now = NearSlots(self._end, self._end)
        self._slots = now
        return now

    def check(self, near: NearSlab, pages: Indices) -> None:
        """See that a copy is within what may be used."""
        ready = near.slots if self._slots is None else self._slots.ready
        if len(pages) and int(pages.max()) >= ready * near.geometry.blocks_per_chunk:
            violation = Violation("a copy is ordered of host memory that cannot be used yet")
            self._violations.append(violation)


class RainyMover:
    """A mover whose copies raise, and are slow into the engine.

    Args:
        inner: the mover; whatever is not defined here is its own.
        sky: decides.
        check: called in the middle of each copy with its near pages and engine pages; returns
            whether all of it is for loads between steps, whose copies may raise.
        stall: called where a job may take its time: without an argument where there is no telling
            how long, else with seconds.
        growth: how much of host memory can be used; None for all.
    """

    def __init__(
        self,
        inner: Mover,
        sky: Sky,
        check: Callable[[Indices, Indices], bool],
        stall: Callable[..., None],
        growth: Growth | None = None,
    ) -> None:
        self._inner = inner
        self._growth = growth
        self._sky = sky
        self._check = check
        self._stall = stall
        # Of saves alone: with the others' dice no seed would be the history that it was.
        self._dice = Random()
        self._dice.setstate(sky.random.getstate())

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def near_slots(self, near: NearSlab) -> NearSlots:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        return (
            self._inner.near_slots(near) if self._growth is None else self._growth.next(near.slots)
        )

    def await_near(self, near: NearSlab, near_pages: Indices) -> None:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        self._stall()
        self._inner.await_near(near, near_pages)

    def load(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = True
    ) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        self._see(pairs)
        sky = self._sky
        self._stall(sky.random.random() * sky.deadline * WRITE_TIME)
        fails = self._check(pairs.near_pages, pairs.pages) and sky.strikes(sky.weather.error)
        copy = partial(self._inner.load, rows, pairs, after, urgent=urgent)
        return self._fail_or(fails, copy, sky.random)

    def save(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = False
    ) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Mover`."""
        self._see(pairs)
        fails = self._dice.random() < self._sky.weather.error
        copy = partial(self._inner.save, rows, pairs, after, urgent=urgent)
        return self._fail_or(fails, copy, self._dice)

    @staticmethod
    def _fail_or(fails: bool, copy: Callable[[], Fence], dice: Random) -> Fence:
        if not fails:
            return copy()
        error = InjectedError("the copy has failed")
        if dice.random() < 0.5:
            raise error
        raise CopyFailed(copy()) from error

    def _see(self, pairs: Pairs) -> None:
        if self._growth is not None:
            self._growth.check(pairs.near, pairs.near_pages)


class Mail:
    """Carries one rank's receipts to control: late, twice, out of order, years later.

    Args:
        sky: decides.
    """

    def __init__(self, sky: Sky) -> None:
        self._sky = sky
        self._queue: list[TransferReceipt] = []
        self._old: deque[TransferReceipt] = deque(maxlen=200)

    @property
    def is_empty(self) -> bool:
        """Whether everything was delivered."""
        return not self._queue

    def exchange(self, receipt: Receipt) -> Receipt:
        """Take in what the rank has to say now; returns what control is told now."""
        sky, weather = self._sky, self._sky.weather
        self._queue += receipt.transfers
        now, self._queue = self._queue, []
        if sky.strikes(weather.late):
            cut = sky.random.randint(0, len(now))
            now, self._queue = now[:cut], now[cut:]
        if weather.overtaken:
            held = [item for item in now if sky.strikes(weather.overtaken)]
            now = [item for item in now if item not in held]
            self._queue = held + self._queue
        self._old.extend(now)
        now += [item for item in now if sky.strikes(weather.twice)]
        if self._old and sky.strikes(weather.stale):
            now.append(sky.random.choice(self._old))
        if sky.strikes(weather.shuffled):
            sky.random.shuffle(now)
        return replace(receipt, transfers=tuple(now))

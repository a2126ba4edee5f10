"""What loading and computing cost, as measured while the engine runs.

Every figure is a mean, weighted by bytes or tokens, in which older measurements count for less. A
stall counts with all of its seconds, as whoever waits for a tier pays for it. Where nothing was
measured nothing is known, and nobody guesses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lamina_kv.plan import TierName

HALF_LIFE = 30.0
"""Seconds after which a measurement counts for half, and after which a tier that was not measured
again is hoped to be twice as fast. A tier that is slower than computing is left alone until it is
hoped to be faster: one that is ten times slower for 100 s. By ``tests/unit/test_never_slower.py``
that is often enough to find out in five minutes that it has recovered, and seldom enough to cost
2 % at most."""

LEAST_PAUSE = 1.0
"""Seconds after which a tier that somebody has waited for in vain is hoped to be as fast as before:
most stalls are short. The pause doubles each time that this was wrong."""

AS_BEFORE = 2.0
"""A tier that takes up to so many times as long is as fast as before. Single chunks differ."""

RARE = 20
"""A tier that stalls has gone well for long if that was so many times as long as somebody has
waited for it in vain: such stalls cost 5 % at most."""


@dataclass(slots=True)
class Rate:
    """Seconds per byte or token.

    Attributes:
        seconds: of all measurements, each faded by its age.
        amount: bytes or tokens of them, faded alike.
        at: when the last measurement was made, control's clock.
    """

    seconds: float = 0.0
    amount: float = 0.0
    at: float = 0.0

    @property
    def rate(self) -> float:
        """The mean."""
        return self.seconds / self.amount

    def add(self, seconds: float, amount: float, now: float) -> None:
        """Take in a measurement."""
        kept = _faded(now - self.at)
        self.seconds, self.amount = self.seconds * kept + seconds, self.amount * kept + amount
        self.at = now

    def hoped(self, now: float) -> float:
        """What it may be by now, seen that it was not measured since."""
        age = now - self.at
        return self.rate * (_faded(age) if age >= HALF_LIFE else 1.0)


@dataclass(slots=True)
class Stall:
    """What is remembered of a tier that was waited for in vain.

    Attributes:
        before: what was known before that; None if nothing was.
        at: when it was waited for in vain last, control's clock.
        longest: seconds that anybody has waited in vain.
        pause: seconds from ``at`` until it is hoped to be over, and is tried.
        tried: when it was first tried, or may have been.
        brought: whether the tier has brought anything since ``at``.
        over: whether it has brought something that tells how fast it is now.
    """

    before: Rate | None
    at: float
    longest: float
    pause: float = LEAST_PAUSE
    tried: float = field(init=False)
    brought: bool = False
    over: bool = False

    def __post_init__(self) -> None:
        self.tried = self.at + self.pause

    def may_be_over(self, now: float) -> bool:
        """Whether it is hoped to be over, and nobody knows."""
        return not self.over and now >= self.at + self.pause

    def again(self, known: Rate, now: float, seconds: float) -> None:
        """The tier was waited for in vain again, after the pause. The pause doubles, and fades for
        as long as the tier has gone well since.

        Args:
            known: what was known until now.
            now: control's clock.
            seconds: how long it was waited for.
        """
        self.longest = max(self.longest, seconds)
        well = max(0.0, now - self.at - self.pause)
        faded = math.exp2(-well / max(RARE * self.longest, LEAST_PAUSE))
        self.pause = max(LEAST_PAUSE, 2 * self.pause * faded)
        self.at, self.brought = now, False
        if self.over:
            if self.before is None or known.rate < self.before.rate:
                self.before = replace(known)
            self.tried, self.over = now + self.pause, False

    def tells(self, size: int, seconds: float, ordered: float, now: float) -> Rate | None:
        """The tier has brought something. Returns what it is to be added to, if that tells how fast
        the tier is now. It may have been ordered by a try which was too short for it.

        Args:
            size: bytes.
            seconds: how long the tier has worked on them alone.
            ordered: when they were ordered.
            now: control's clock.
        """
        self.brought = True
        if self.over or ordered < self.tried or not seconds:  # it came with what was charged
            return None
        before = self.before
        if before is not None and seconds <= AS_BEFORE * size * before.rate:
            self.over = True
            return replace(before, at=now)
        if before is not None and ordered < self.at + self.pause:
            return None
        self.over = True  # how long it was waited for in vain says nothing of now
        return Rate()


class Costs:
    """See the module.

    Args:
        clock: control's clock, seconds.
        least: tokens. A prefill of fewer says what a step takes, not what a token does.

    Attributes:
        loads: seconds per byte of each tier.
        prefills: seconds per token, by the power of two of the context in the middle of a prefill.
    """

    def __init__(self, clock: Callable[[], float] = lambda: 0.0, *, least: int = 1) -> None:
        self.loads: dict[TierName, Rate] = {}
        self.prefills: dict[int, Rate] = {}
        self._clock = clock
        self._least = least
        self._fullest = 0.0
        self._stalls: dict[TierName, Stall] = {}

    def knows(self, tier: TierName) -> bool:
        """Whether a tier was ever measured."""
        return tier in self.loads

    def load_seconds(self, tier: TierName, size: int, *, hoped: bool = False) -> float | None:
        """Seconds to bring ``size`` bytes from a tier; None if it was never measured.

        Args:
            tier: the tier.
            size: bytes.
            hoped: whether the tier may have become faster since it was measured.
        """
        known = self.loads.get(tier)
        if known is None or size <= 0:
            return None if size > 0 else 0.0
        return size * (self._hoped(tier, known) if hoped else known.rate)

    def _hoped(self, tier: TierName, known: Rate) -> float:
        now, stall = self._clock(), self._stalls.get(tier)
        hoped = known.hoped(now)
        if stall is None or not stall.may_be_over(now):
            return hoped
        return min(hoped, stall.before.rate if stall.before is not None else 0.0)

    def prefill_seconds(self, start: int, end: int) -> float | None:
        """Seconds to compute tokens ``start..end`` of a prompt; None if nothing is known. Each
        token counts with what is known of its own context: to compute more never takes less."""
        if end <= start:
            return 0.0
        if not self.prefills:
            return None
        seconds, known = 0.0, sorted(self.prefills)
        for where, above in zip(known, [*known[1:], None], strict=True):
            stop = end if above is None else min(end, 1 << (where + above + 1) // 2)
            if stop > start:
                seconds += self.prefills[where].rate * (stop - start)
                start = stop
        return seconds

    def loaded(
        self, tier: TierName, size: int, seconds: float, *, ordered: float | None = None
    ) -> None:
        """A tier has brought something.

        Args:
            tier: the tier.
            size: bytes.
            seconds: how long it has worked on them alone.
            ordered: when they were ordered, control's clock; None for so many seconds ago.
        """
        if size <= 0:
            return
        now, stall = self._clock(), self._stalls.get(tier)
        if stall is not None:
            known = stall.tells(size, seconds, now - seconds if ordered is None else ordered, now)
            if known is not None:
                self.loads[tier] = known
        self.loads.setdefault(tier, Rate()).add(seconds, size, now)

    def given_up(self, tier: TierName, moved: int, seconds: float, *, least: int = 1) -> None:
        """Somebody has waited in vain for a tier. If that is slower than the tier was thought to
        be, it is believed at once: the next request is not to wait in vain as well.

        Args:
            tier: the tier.
            moved: bytes that it has brought meanwhile.
            seconds: how long it was waited for.
            least: bytes that come at a time. Where none came, so many take longer than that.
        """
        known, now = self.loads.get(tier), self._clock()
        stall = self._stalls.get(tier)
        # What was a wait in vain says nothing of now, where that has brought something.
        told = moved > 0 and stall is not None and stall.may_be_over(now)
        if stall is None:
            self._stalls[tier] = Stall(None if known is None else replace(known), now, seconds)
        elif known is not None and (stall.over or stall.may_be_over(now)):  # else it is the same
            stall.again(known, now, seconds)
        if known is None or told or seconds / max(moved, least) > known.rate:
            self.loads[tier] = Rate(seconds, max(moved, least), now)
        elif moved:
            known.add(seconds, moved, now)
        else:
            known.at = now

    def recovered(self, tier: TierName) -> None:
        """A tier has failed, and works again. It is thought to be as fast as it was before somebody
        waited for it in vain: how long that was says nothing of now."""
        stall = self._stalls.get(tier)
        if stall is None or stall.brought:
            return
        del self._stalls[tier]
        if stall.before is None:
            self.loads.pop(tier, None)
        else:
            self.loads[tier] = replace(stall.before, at=self._clock())

    def computed(self, start: int, end: int, seconds: float, fill: float | None = None) -> None:
        """Tokens ``start..end`` of a prompt were computed.

        Args:
            start: the first token.
            end: behind the last one.
            seconds: how long the engine has worked on them.
            fill: tokens that each step meanwhile has computed, for whomever; None if all were
                computed in one step. A step takes its time however few they are, so that only steps
                count that are half as full as the fullest so far.
        """
        fill = float(end - start) if fill is None else fill
        if end - start < self._least or seconds <= 0 or 2 * fill < self._fullest:
            return
        if fill > 2 * self._fullest:
            self.prefills.clear()
        self._fullest = max(self._fullest, fill)
        where = int(math.log2(max(1, (start + end) // 2)))
        self.prefills.setdefault(where, Rate()).add(seconds, end - start, self._clock())


def _faded(age: float) -> float:
    return math.exp2(-max(0.0, age) / HALF_LIFE)

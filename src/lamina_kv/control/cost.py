"""What loading and computing cost, as measured while the engine runs.

Every figure is a mean, weighted by bytes or tokens, in which older measurements count for less. A
stall counts with all of its seconds, as whoever waits for a tier pays for it. Where nothing was
measured nothing is known, and nobody guesses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lamina_kv.plan import TierName

HALF_LIFE = 30.0
"""Seconds after which a measurement counts for half, and after which a tier that was not measured
again is hoped to be twice as fast. A tier that is slower than computing is left alone until it is
hoped to be faster: one that is ten times slower for 100 s. By ``tests/unit/test_never_slower.py``
that is often enough to find out in five minutes that it has recovered, and seldom enough to cost
2 % at most."""


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
        # Of tiers that were given up: what was known before that; None if nothing was.
        self._before: dict[TierName, Rate | None] = {}

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
        return size * (known.hoped(self._clock()) if hoped else known.rate)

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

    def loaded(self, tier: TierName, size: int, seconds: float) -> None:
        """A tier has brought ``size`` bytes, and has worked on them for so long."""
        if size > 0:
            self._before.pop(tier, None)
            self.loads.setdefault(tier, Rate()).add(seconds, size, self._clock())

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
        if known is None or seconds / max(moved, least) > known.rate:
            if tier not in self._before:
                self._before[tier] = known
            self.loads[tier] = Rate(seconds, max(moved, least), now)
        else:
            known.add(seconds if moved else 0.0, moved, now)

    def recovered(self, tier: TierName) -> None:
        """A tier has failed, and works again. It is thought to be as fast as it was before somebody
        waited for it in vain: how long that was says nothing of now."""
        if tier in self._before:
            known = self._before.pop(tier)
            if known is None:
                del self.loads[tier]
            else:
                self.loads[tier] = known

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

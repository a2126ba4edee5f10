"""Taking a tier out of use while it keeps failing, and trying it again now and then.

::

    CLOSED ── failures in a row ──▶ OPEN ── pause ──▶ one try ── it works ──▶ CLOSED
                                     ▲                   │
                                     └─ it fails: twice ─┘
                                        the pause

A far tier has two, by its name in the configuration: one for reads and one for writes. So a tier
that is full still serves what it holds, and one that cannot be read is still written to. Near has
one, for saves: a load from near says nothing about any tier.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from enum import Enum
from math import inf

from lamina_kv.config import BreakerConfig
from lamina_kv.control.transfers import Kind, State, Transfer
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import LOAD_FAILED, NEAR, TierName
from lamina_kv.tiers.contract import Fate

log = logging.getLogger("lamina_kv.control")

MAX_PAUSE = 300.0
"""Seconds that the doubled pause does not exceed, unless ``breaker.pause`` itself does."""

_READS = (Kind.MOVE_IN, Kind.ASK)
_FILLS = (Kind.SAVE, Kind.MOVE_OUT)


class BreakerState(Enum):
    """What a breaker lets pass."""

    CLOSED = "closed"
    """Everything."""
    OPEN = "open"
    """Nothing until the pause is over, and then one try."""
    TRYING = "trying"
    """Nothing: a try is on its way."""


class CircuitBreaker:
    """One direction of one tier.

    Args:
        name: for messages.
        config: how many failures, how long a pause.
        clock: monotonic seconds.

    Attributes:
        refusals: how often it began to refuse; what was found before may be out of reach since.
    """

    def __init__(self, name: str, config: BreakerConfig, clock: Callable[[], float]) -> None:
        self.refusals = 0
        self._name = name
        self._config = config
        self._clock = clock
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._pause = config.pause
        self._until = 0.0

    @property
    def closed(self) -> bool:
        """Whether the tier is in use as usual."""
        return self._state is BreakerState.CLOSED

    @property
    def allows(self) -> bool:
        """Whether something may be ordered now."""
        if self._state is BreakerState.CLOSED:
            return True
        return self._state is BreakerState.OPEN and self._clock() >= self._until

    @property
    def pause_left(self) -> float:
        """Seconds until a try is allowed; infinite while it is no pause that is waited for."""
        if self._state is not BreakerState.OPEN:
            return inf
        return max(0.0, self._until - self._clock())

    def cut_short(self) -> None:
        """Allow the one try now, because there will be no later."""
        self._until = min(self._until, self._clock())

    def ordered(self) -> bool:
        """Something is ordered. Returns whether it is the one try, which must be judged as such."""
        if not (self._state is BreakerState.OPEN and self.allows):
            return False
        self._state = BreakerState.TRYING
        self.refusals += 1
        return True

    def judge(self, good: bool, reason: str = "", *, trying: bool = False) -> None:
        """Something that was ordered has worked, or failed, or not ended in time.

        Args:
            good: whether it has worked.
            reason: why not.
            trying: whether it was the one try. While the tier is out of use nothing else counts:
                it was ordered before.
        """
        if self._state is BreakerState.CLOSED:
            self._failures = 0 if good else self._failures + 1
            if self._failures >= self._config.failures:
                self.refusals += 1
                self._open()
                log.warning(
                    "%s are stopped after %d failures in a row, the last one: %s. Serving goes on "
                    "without; one will be tried in %.0f s, and then at growing intervals",
                    self._name,
                    self._failures,
                    reason,
                    self._pause,
                )
        elif trying and good:
            self._state, self._failures, self._pause = BreakerState.CLOSED, 0, self._config.pause
            log.warning("%s work again", self._name)
        elif trying:
            self._pause = min(2 * self._pause, max(MAX_PAUSE, self._config.pause))
            self._open()
            log.info("%s still fail (%s)", self._name, reason)

    def try_again(self) -> None:
        """The one try has ended without saying anything about the tier."""
        self._state = BreakerState.OPEN

    def _open(self) -> None:
        self._state = BreakerState.OPEN
        self._until = self._clock() + self._pause


class Breakers:
    """The breakers of every tier.

    Args:
        config: how many failures, how long a pause.
        clock: monotonic seconds.
        far: names of the far tiers.
    """

    def __init__(
        self, config: BreakerConfig, clock: Callable[[], float], far: Iterable[TierName]
    ) -> None:
        names = tuple(far)
        self._reads = {
            tier: CircuitBreaker(f"reads from tier {tier}", config, clock) for tier in names
        }
        self._fills = {
            NEAR: CircuitBreaker(f"saves to tier {NEAR}", config, clock),
            **{tier: CircuitBreaker(f"writes to tier {tier}", config, clock) for tier in names},
        }

    def reads(self, tier: TierName) -> CircuitBreaker:
        """For chunks that are read from a far tier, and for questions to it."""
        return self._reads[tier]

    def fills(self, tier: TierName) -> CircuitBreaker:
        """For what is saved to near, or written to a far tier."""
        return self._fills[tier]

    def order(self, kind: Kind, tier: TierName) -> bool:
        """A save, move or question is ordered. Returns whether it is the one try of its tier."""
        breaker = self._of(kind, tier)
        return breaker is not None and breaker.ordered()

    def readable(self, tier: TierName) -> bool:
        """Whether a read from a far tier may be ordered now."""
        return self._reads[tier].allows

    def judge(self, ended: Iterable[Transfer]) -> None:
        """Draw conclusions from transfers that have ended, or are overdue, at the same time. What
        failed together is one failure, and none where something else worked."""
        failures: dict[CircuitBreaker, str] = {}
        successes: set[CircuitBreaker] = set()
        for transfer in ended:
            breaker = self._of(transfer.kind, transfer.tier)
            if breaker is None:
                continue
            verdict, reason = _verdict(transfer), transfer.reason or "overdue"
            if transfer.trying:
                if verdict is None:
                    breaker.try_again()
                else:
                    breaker.judge(verdict, reason, trying=True)
            elif verdict:
                successes.add(breaker)
            elif verdict is False:
                failures.setdefault(breaker, reason)
        for breaker in successes:
            breaker.judge(good=True)
        for breaker, reason in failures.items():
            if breaker not in successes:
                breaker.judge(good=False, reason=reason)

    def _of(self, kind: Kind, tier: TierName) -> CircuitBreaker | None:
        if kind in _READS:
            return self._reads[tier]
        return self._fills[tier] if kind in _FILLS else None

    @property
    def refusals(self) -> int:
        """Changes whenever chunks that were found may be out of reach since."""
        return sum(breaker.refusals for breaker in self._reads.values())

    def gauges(self, meter: Meter, tier: TierName) -> None:
        """Write to the meter whether a tier is in use, each way."""
        fill = Kind.SAVE if tier == NEAR else Kind.MOVE_OUT
        for kind, breaker in ((Kind.MOVE_IN, self._reads.get(tier)), (fill, self._fills[tier])):
            if breaker is not None:
                meter.gauge("tier_in_use", int(breaker.closed), tier=tier, direction=kind.value)


def _verdict(transfer: Transfer) -> bool | None:
    """Whether a tier has worked in a transfer; None if that cannot be told."""
    if transfer.state is State.PLANNED:  # overdue
        return False
    if not transfer.failed:
        return True
    # A load that failed is no fault of the tier that is saved to. A tier that says that a chunk is
    # gone answers, and may still be unable to read.
    return None if transfer.reason in (LOAD_FAILED, Fate.GONE) else False

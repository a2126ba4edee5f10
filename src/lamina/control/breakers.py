"""Taking a tier out of use while it keeps failing, and trying it again now and then.

::

    CLOSED ── failures in a row ──▶ OPEN ── pause ──▶ one try ── it works ──▶ CLOSED
                                     ▲                   │
                                     └─ it fails: twice ─┘
                                        the pause

Each tier has two: one for loads out of it and one for saves and writes into it. So a full disk
still serves what it holds, and one that cannot be read is still written to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from enum import Enum

from lamina.config import BreakerConfig
from lamina.control.catalog import Location
from lamina.control.transfers import Kind, State, Transfer
from lamina.observe.metrics import Meter
from lamina.plan import LOAD_FAILED, TierName

log = logging.getLogger("lamina.control")

MAX_PAUSE = 300.0
"""Seconds that the doubled pause does not exceed, unless ``breaker.pause`` itself does."""

_FILLS = {TierName.HOST: Kind.SAVE, TierName.DISK: Kind.WRITE}
_READS = (Kind.LOAD, Kind.FETCH)


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
    """

    def __init__(self, config: BreakerConfig, clock: Callable[[], float]) -> None:
        self._loads = {
            tier: CircuitBreaker(f"loads from the {tier.value} tier", config, clock)
            for tier in TierName
        }
        self._fills = {
            tier: CircuitBreaker(f"{kind.value}s to the {tier.value} tier", config, clock)
            for tier, kind in _FILLS.items()
        }

    def loads(self, tier: TierName) -> CircuitBreaker:
        """For loads from ``tier``."""
        return self._loads[tier]

    def fills(self, tier: TierName) -> CircuitBreaker:
        """For what is saved or written to ``tier``."""
        return self._fills[tier]

    def order(self, kind: Kind, tiers: Iterable[TierName]) -> frozenset[TierName]:
        """A transfer is ordered. Returns those of its tiers that it is the one try of."""
        return frozenset(tier for tier in tiers if self._of(kind, tier).ordered())

    def readable(self, tier: TierName) -> bool:
        """Whether a load from ``tier`` may be ordered now."""
        return self._loads[tier].allows

    def judge(self, ended: Iterable[Transfer], held: Callable[[Location], bool]) -> None:
        """Draw conclusions from transfers that have ended, or are overdue, at the same time. What
        failed together is one failure, and none where something else worked.

        Args:
            ended: the transfers.
            held: whether a chunk is still where it was found. That one could not be loaded which
                was dropped meanwhile says nothing.
        """
        failures: dict[CircuitBreaker, str] = {}
        successes: set[CircuitBreaker] = set()
        for transfer in ended:
            for tier in transfer.tiers:
                breaker = self._of(transfer.kind, tier)
                verdict, trying = _verdict(transfer, tier, held), tier in transfer.tries
                if verdict is None:
                    if trying:
                        breaker.try_again()
                elif trying:
                    breaker.judge(verdict, transfer.reason or "overdue", trying=True)
                elif verdict:
                    successes.add(breaker)
                else:
                    failures.setdefault(breaker, transfer.reason or "overdue")
        for breaker in successes:
            breaker.judge(good=True)
        for breaker, reason in failures.items():
            if breaker not in successes:
                breaker.judge(good=False, reason=reason)

    def _of(self, kind: Kind, tier: TierName) -> CircuitBreaker:
        return self._loads[tier] if kind in _READS else self._fills[tier]

    @property
    def refusals(self) -> int:
        """Changes whenever chunks that were found may be out of reach since."""
        return sum(breaker.refusals for breaker in self._loads.values())

    def gauges(self, meter: Meter, tier: TierName) -> None:
        """Write to the meter whether a tier is in use, each way."""
        for kind, breaker in ((Kind.LOAD, self._loads[tier]), (_FILLS[tier], self._fills[tier])):
            meter.gauge("tier_in_use", int(breaker.closed), tier=tier.value, direction=kind.value)


def _verdict(transfer: Transfer, tier: TierName, held: Callable[[Location], bool]) -> bool | None:
    """Whether a tier has worked in a transfer; None if that cannot be told."""
    if transfer.state is State.PLANNED:  # overdue, if it did not have to let others go first
        return None if transfer.kind is Kind.FETCH else False
    if not transfer.failed:
        return True
    if transfer.reason == LOAD_FAILED:
        return None
    if transfer.kind not in _READS:
        return False
    if transfer.bad_chunks:
        bad = [place for place in transfer.chunks if place.key in transfer.bad_chunks]
        return False if any(place.tier is tier and held(place) for place in bad) else None
    if tier in transfer.tries and transfer.moved_bytes:
        return True  # slow, but not dead
    # Of two tiers it is not the memory that was late.
    return None if tier is TierName.HOST and len(transfer.tiers) > 1 else False

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
from collections.abc import Callable
from enum import Enum

from lamina.config import BreakerConfig
from lamina.control.transfers import Kind
from lamina.observe.metrics import Meter
from lamina.plan import TierName

log = logging.getLogger("lamina.control")

MAX_PAUSE = 300.0
"""Seconds that the doubled pause does not exceed, unless ``breaker.pause`` itself does."""


_FILLS = {TierName.HOST: Kind.SAVE, TierName.DISK: Kind.WRITE}


class State(Enum):
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
        self._state = State.CLOSED
        self._failures = 0
        self._pause = config.pause
        self._until = 0.0

    @property
    def closed(self) -> bool:
        """Whether the tier is in use as usual."""
        return self._state is State.CLOSED

    @property
    def allows(self) -> bool:
        """Whether something may be ordered now."""
        if self._state is State.CLOSED:
            return True
        return self._state is State.OPEN and self._clock() >= self._until

    def ordered(self) -> bool:
        """Something is ordered. Returns whether it is the one try."""
        if not (self._state is State.OPEN and self.allows):
            return False
        self._state = State.TRYING
        self.refusals += 1
        return True

    def succeeded(self) -> None:
        """Something that was ordered has worked."""
        if self._state is not State.CLOSED:
            log.warning("%s work again", self._name)
        self._state, self._failures, self._pause = State.CLOSED, 0, self._config.pause

    def undecided(self) -> None:
        """Something that was ordered has ended without saying anything about the tier."""
        if self._state is State.TRYING:
            self._state = State.OPEN

    def failed(self, reason: str) -> None:
        """Something that was ordered has failed, or has not ended in time."""
        self._failures += 1
        if self._state is State.TRYING:
            longest = max(MAX_PAUSE, self._config.pause)
            self._pause = min(2 * self._pause, longest)
            log.info("%s still fail (%s)", self._name, reason)
        elif self._state is State.CLOSED and self._failures >= self._config.failures:
            self.refusals += 1
            log.warning(
                "%s are stopped after %d failures in a row, the last one: %s. Serving goes on "
                "without; one will be tried in %.0f s, and then at growing intervals",
                self._name,
                self._failures,
                reason,
                self._pause,
            )
        else:
            return
        self._state = State.OPEN
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

    def readable(self, tier: TierName) -> bool:
        """Whether a load from ``tier`` may be ordered now."""
        return self._loads[tier].allows

    @property
    def refusals(self) -> int:
        """Changes whenever chunks that were found may be out of reach since."""
        return sum(breaker.refusals for breaker in self._loads.values())

    def gauges(self, meter: Meter, tier: TierName) -> None:
        """Write to the meter whether a tier is in use, each way."""
        for kind, breaker in ((Kind.LOAD, self._loads[tier]), (_FILLS[tier], self._fills[tier])):
            meter.gauge("tier_in_use", int(breaker.closed), tier=tier.value, direction=kind.value)

"""Leaving an engine alone while it keeps failing, and trying it again now and then.

::

    CLOSED ── failures in a row ──▶ OPEN ── pause ──▶ PROBATION ── a success ──▶ CLOSED
                                     ▲                    │
                                     └─── one failure: ───┘
                                       twice the pause
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

MAX_PAUSE = 60.0
"""Seconds that the doubled pause does not exceed, unless the first one already does."""


class BreakerState(Enum):
    """What a breaker lets pass."""

    CLOSED = "closed"
    """Everything."""
    OPEN = "open"
    """Nothing, and what was sent before no longer counts."""
    PROBATION = "probation"
    """One request at a time."""


class CircuitBreaker:
    """One engine's.

    Args:
        failures: in a row, until it opens.
        pause: seconds that it is open at first.
        clock: monotonic seconds.
    """

    def __init__(self, failures: int, pause: float, clock: Callable[[], float]) -> None:
        self._limit = failures
        self._first_pause = pause
        self._clock = clock
        self._failures = 0
        self._pause = pause
        self._until = 0.0

    @property
    def state(self) -> BreakerState:
        """What it lets pass now."""
        if self._failures < self._limit:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock() < self._until else BreakerState.PROBATION

    def succeeded(self) -> None:
        """A request has got its answer."""
        if self.state is not BreakerState.OPEN:
            self.reset()

    def failed(self) -> float:
        """A request has failed.

        Returns:
            seconds that the engine is left alone from now on; 0 if nothing has changed.
        """
        if self.state is BreakerState.OPEN:
            return 0.0
        self._failures += 1
        if self._failures < self._limit:
            return 0.0
        pause, self._pause = self._pause, min(2 * self._pause, max(MAX_PAUSE, self._first_pause))
        self._until = self._clock() + pause
        return pause

    def reset(self) -> None:
        """Forget everything: the engine is another one."""
        self._failures = 0
        self._pause = self._first_pause

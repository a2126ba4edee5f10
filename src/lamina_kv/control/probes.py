"""When a far tier that is out of use is probed: soon after it failed, and then about once a second.

A probe is one cheap call of the store (:meth:`~lamina_kv.tiers.contract.Store.probe`) on a thread
of the data room. No request waits for it, and one is under way at a time: a store that hangs keeps
one call.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

LEAST_PAUSE, LONGEST_PAUSE = 0.25, 1.0
"""Seconds from the start of one probe to the start of the next; doubled with every probe, up to the
longest. A store that works again is used within that time and a step. A dead one gets one small
call a second from each rank of each engine."""

STALE = 2.0
"""Seconds after which the last answer says nothing about now. Only an engine without a step for so
long has such an answer: others probe every second."""

MOST_WAITED = 0.25
"""Seconds that a request waits at most for the first probe of an engine that was idle. A store that
works answers in milliseconds; one that does not answer for so long hangs."""


class Probe:
    """The probes of one tier.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """The tier is in use: the next time that it fails, probing begins anew."""
        self._pause = LEAST_PAUSE
        self._due = -inf  # when the next probe may be ordered
        self._look = -inf  # when a step has something to do: order a probe, or hear of it
        self._since = inf  # when the probe under way was ordered; infinite if none is
        self._heard = self._clock()

    @property
    def wait(self) -> float:
        """Seconds until a step is to order a probe, or to hear what became of it."""
        return max(0.0, self._look - self._clock())

    @property
    def is_under_way(self) -> bool:
        """Whether a probe has not ended yet."""
        return self._since < inf

    @property
    def is_news_due(self) -> bool:
        """Whether the last answer is stale, and a fresh one may come in a moment."""
        now = self._clock()
        hangs = now >= self._since + MOST_WAITED
        return not hangs and now >= self._heard + STALE

    def take(self) -> bool:
        """A plan is made. Returns whether it is to have a probe."""
        if self.wait > 0:
            return False
        now = self._clock()
        if self.is_under_way:
            self._look = now + LONGEST_PAUSE
            return False
        self._since, self._due = now, now + self._pause
        self._look = self._due
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        return True

    def ended(self) -> None:
        """The probe under way has ended."""
        self._since, self._heard = inf, self._clock()
        self._look = self._due

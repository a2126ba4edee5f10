"""How many seconds it takes until a prompt is computed, learnt from those that were.

A line through (tokens, seconds): what every prompt costs, and what each token adds. Old samples
fade with every new one and with time, so that it follows an engine that is slower today.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

FADE = 0.98
"""Weight of a sample once another one has come: some fifty count."""
HALF_LIFE = 600.0
"""Seconds in which a sample loses half of its weight."""
ENOUGH = 4.0
"""Weight of samples with which a line is believed."""
STRETCH = 4.0
"""How far beyond the longest prompt that was seen a line is believed."""
OUTLIER = 4.0
"""A sample counts as at most so many times what was expected: one that was held up by something
else (a connection, a pause, a preemption) says little of the next."""


class Line:
    """See the module.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._longest = 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        """So many tokens took so many seconds, those that were in front of them included."""
        expected = self.seconds(tokens)
        if expected is not None:
            seconds = min(seconds, OUTLIER * expected + 0.1)
        now = self._clock()
        fade = FADE * 0.5 ** ((now - self._last) / HALF_LIFE)
        self._last = now
        self._weight = fade * self._weight + 1
        self._x = fade * self._x + tokens
        self._y = fade * self._y + seconds
        self._xx = fade * self._xx + tokens * tokens
        self._xy = fade * self._xy + tokens * seconds
        self._longest = max(tokens, fade * self._longest)

    def seconds(self, tokens: int, queued: int = 0) -> float | None:
        """Until a prompt is computed; None if too little is known of prompts so long.

        Args:
            tokens: of the prompt.
            queued: that are computed before.
        """
        aged = self._weight * 0.5 ** ((self._clock() - self._last) / HALF_LIFE)
        if aged < ENOUGH or tokens > STRETCH * max(1.0, self._longest):
            return None
        base, each = self._fit()
        return base + each * (queued + tokens)

    @property
    def tokens_per_second(self) -> float:
        """At which prompts are computed; 0 if it is not known."""
        if self._weight < ENOUGH:
            return 0.0
        _, each = self._fit()
        return 1 / each if each > 0 else 0.0

    def _fit(self) -> tuple[float, float]:
        """Seconds of a prompt, and of each token."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        if spread > 0.01 * mean_x * mean_x + 1:
            each = (self._xy / self._weight - mean_x * mean_y) / spread
            base = mean_y - each * mean_x
            if each >= 0 and base >= 0:
                return base, each
        # All alike, or noise: in proportion to the length.
        return (0.0, self._xy / self._xx) if self._xx > 0 else (mean_y, 0.0)


def first_known(tokens: int, queued: int, lines: Iterable[Line]) -> float | None:
    """What the first line that knows says of a prompt; see :meth:`Line.seconds`."""
    known = (line.seconds(tokens, queued) for line in lines)
    return next((seconds for seconds in known if seconds is not None), None)

"""How long the rows of loads were on their way, and how long the model waited for them.

Copies that are made in the call are measured on the host. A device measures its own: its host only
launches copies, and the model waits on the device, where the host does not see it.
"""

from __future__ import annotations

from contextlib import suppress

from lamina_kv.data.movers.fences import Fence

Span = tuple[float, float]
"""Begin and end, in seconds on the host's clock (``time.perf_counter``)."""


class LoadTimes:
    """Times of one run. Not thread safe.

    Attributes:
        spans: by row, when the device copied it. Empty if copies are made in the call.
    """

    def __init__(self) -> None:
        self.spans: dict[int, Span] = {}
        self._in_flight = 0
        self._since = 0.0
        self._active = 0.0
        self._waited = 0.0
        self._given_up = False
        self._reached: dict[int, Fence] = {}

    def submitted(self, count: int, now: float) -> None:
        """Pieces are on their way."""
        if count and not self._in_flight:
            self._since = now
        self._in_flight += count

    def over(self, now: float) -> None:
        """A piece is over."""
        self._in_flight -= 1
        if not self._in_flight:
            self._active += now - self._since

    def given_up(self, now: float) -> None:
        """What is on its way is not waited for; the time of the host says how long it hung."""
        self._given_up = True
        if self._in_flight:
            self._active += now - self._since
            self._since = now

    def copied(self, row: int, fence: Fence) -> None:
        """The fence of a row has passed."""
        if (span := fence.span()) is not None:
            began, ended = self.spans.get(row, span)
            self.spans[row] = min(began, span[0]), max(ended, span[1])

    def waited_for(self, row: int, seconds: float, reached: Fence | None) -> None:
        """The model has asked for a row.

        Args:
            row: the row.
            seconds: for which the host waited.
            reached: where the model was on the device, timed; None if the row was there.
        """
        self._waited += seconds
        if reached is not None:
            self._reached[row] = reached

    @property
    def ended(self) -> float:
        """When the device had copied the last row; 0 if copies are made in the call."""
        return max((ended for _, ended in self.spans.values()), default=0.0)

    @property
    def active(self) -> float:
        """Seconds in which rows were on their way. Once all fences have passed."""
        total, until = 0.0, 0.0
        for began, ended in sorted(self.spans.values()):
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return self._active if self._given_up else total or self._active

    @property
    def waited(self) -> float:
        """Seconds that the model waited. Once all fences have passed."""
        if not self.spans:
            return self._waited
        return sum(ended - began for began, ended in self.waits().values())

    def waits(self) -> dict[int, Span]:
        """By row, when the model waited on the device. Once all fences have passed."""
        waits = {}
        with suppress(Exception):  # of a device that has failed since nothing more is known
            for row, reached in self._reached.items():
                if row not in self.spans or not reached.passed():
                    continue  # it is not there yet, and will find the row
                span = reached.span()
                if span is not None and self.spans[row][1] > span[1]:
                    waits[row] = span[1], self.spans[row][1]
        return waits

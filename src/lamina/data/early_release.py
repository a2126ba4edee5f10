"""When a parked request may go on although rows of it are missing.

::

    rows arrive   0  1  2  3  4  5  6  7
    model reads                  0    1    2    3    4    5    6    7
                              ↑ from here on every row arrives before it is read

Control says which loads may be released early: those from memory, which do not fail. The rank says
when, because it knows how fast rows arrive and how fast the model reads them. What is still missing
then is waited for row by row, like a load in the step. If the model had to wait after all, the next
load is released later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

MOST_CAUTION = 8.0
"""Factor by which rows are taken to arrive later than they have so far, at most."""

MOST_BUSY = 0.5
"""Share of the cores that a load takes at most if it is to go on beside the model. Where they copy
instead of a device, both together take longer than one after the other."""

TOLERATED_WAIT = 0.001
"""Seconds that the model may wait without anybody growing more cautious."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """How far a load is.

    Attributes:
        rows: rows in all.
        arrived: rows that are there, counted from the first one on.
        seconds: since it began.
        busy: of these, for how many it took the cores that the model would run on.
    """

    rows: int
    arrived: int
    seconds: float
    busy: float = 0.0


class EarlyRelease:
    """See the module.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._row_seconds = 0.0
        self._caution = 1.0
        self._began: float | None = None

    def step_begins(self, forward: bool) -> None:
        """A step begins; ``forward``: with the model in it."""
        self._began = self._clock() if forward else None

    def step_ends(self, rows: int, waited: float) -> None:
        """The model is through all of its rows, and has waited so long for loads."""
        if self._began is not None:
            self._row_seconds = (self._clock() - self._began - waited) / rows
            self._began = None

    def waited(self, seconds: float) -> None:
        """So long has the model waited for what was released early."""
        factor = 2.0 if seconds > TOLERATED_WAIT else 0.9
        self._caution = min(MOST_CAUTION, max(1.0, self._caution * factor))

    def allows(self, load: Arrival) -> bool:
        """Whether every row will be there when a step that begins now reads it."""
        if not load.arrived or load.busy > MOST_BUSY * load.seconds:
            return False
        arrival = self._caution * load.seconds / load.arrived
        first, last = load.arrived, load.rows - 1
        # Both grow evenly with the row, so that what holds for the ends holds between them.
        return all(arrival * (row - first + 1) <= self._row_seconds * row for row in (first, last))

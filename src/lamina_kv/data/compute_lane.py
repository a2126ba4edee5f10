"""When the layers of a step computed, for the timeline."""

from __future__ import annotations

from contextlib import suppress

from lamina_kv.data.movers.base import Mover
from lamina_kv.data.movers.fences import Fence
from lamina_kv.observe.timeline import Lane, Timeline


class ComputeLane:
    """Notes the layers of steps. A device says when they computed once they have.

    Args:
        mover: makes fences.
        timeline: where spans go.
    """

    def __init__(self, mover: Mover, timeline: Timeline) -> None:
        self._mover = mover
        self._timeline = timeline
        self._row = -1
        self._began = 0.0
        self._begin: Fence | None = None
        self._pending: list[tuple[int, int, Fence, Fence]] = []

    def begins(self, row: int) -> None:
        """A layer begins to compute.

        Args:
            row: its row, -1 if it has none.
        """
        self._row, self._began = row, Timeline.now()
        self._begin = self._mover.fence_compute(timed=True)

    def ends(self, step: int) -> None:
        """It has submitted all that it computes."""
        begin, end = self._begin, self._mover.fence_compute(timed=True)
        if begin is None or (end.passed() and end.span() is None):
            self._timeline.add(Lane.COMPUTE, step, self._row, self._began)
        else:
            self._pending.append((step, self._row, begin, end))

    def collect(self) -> None:
        """Note layers that a device has computed meanwhile."""
        with suppress(Exception):  # of a device that has failed nothing more is known
            while self._pending and self._pending[0][3].passed():
                step, row, *fences = self._pending.pop(0)
                begin, end = (fence.span() for fence in fences)
                if begin is not None and end is not None:
                    self._timeline.add(Lane.COMPUTE, step, row, begin[1], end=end[1])

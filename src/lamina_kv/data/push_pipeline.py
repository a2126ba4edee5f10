"""The push pipeline: in a step, a row is handed to the wire once its last layer has written it."""

from __future__ import annotations

from collections.abc import Sequence

from lamina_kv.data.movers.base import Mover
from lamina_kv.data.movers.fences import Fence
from lamina_kv.data.push_wire import OutgoingOrder, PushWire
from lamina_kv.geometry import CacheGeometry
from lamina_kv.plan import PushOrder, TransferId


class PushRun:
    """The pushes of one step.

    Args:
        orders: what to send; what was computed before the step is handed over at once.
        geometry: the engine's cache.
        mover: makes fences.
        wire: where to.
        gathers: what the step completes and has no destination yet.
        step: for the timeline.
    """

    def __init__(
        self,
        orders: Sequence[PushOrder],
        geometry: CacheGeometry,
        mover: Mover,
        wire: PushWire,
        *,
        gathers: Sequence[TransferId] = (),
        step: int = 0,
    ) -> None:
        self._mover = mover
        self._rows = geometry.rows
        self._unsent = set(range(len(geometry.rows)))
        self._fresh: list[tuple[set[int], OutgoingOrder]] = []
        fence = mover.fence_compute() if any(order.computed for order in orders) else None
        for order in orders:
            outgoing = wire.begin(order, step)
            groups = {part.group for part in order.pages}
            if not order.computed or fence is None:
                self._fresh.append((groups, outgoing))
                continue
            for row, shape in enumerate(geometry.rows):
                if groups.intersection(shape.groups):
                    outgoing.row_ready(row, fence)
            outgoing.over("")
        everything = {group for row in geometry.rows for group in row.groups}
        self._fresh += [(everything, wire.gather(transfer, step)) for transfer in gathers]

    @property
    def moves_rows(self) -> bool:
        """Whether layers have to say when they have written."""
        return bool(self._fresh)

    def row_written(self, row: int) -> None:
        """The engine has submitted everything that writes ``row`` in this step."""
        if self._fresh and row in self._unsent:
            self._unsent.remove(row)
            self._send(row, self._mover.fence_compute())

    def _send(self, row: int, written: Fence) -> None:
        for groups, outgoing in self._fresh:
            if groups.intersection(self._rows[row].groups):
                outgoing.row_ready(row, written)

    def sweep(self, failure: str) -> None:
        """The step is over: send the rows whose hook did not fire. One fence is behind them all.

        Args:
            failure: why nothing that the step computed may be believed; empty if it may.
        """
        if self._fresh and self._unsent:
            written = self._mover.fence_compute()
            for row in sorted(self._unsent):
                self._send(row, written)
            self._unsent.clear()
        for _, outgoing in self._fresh:
            outgoing.over(failure)

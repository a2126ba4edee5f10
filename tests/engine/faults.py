"""What can be wrong with the machine that an engine runs on. Each is called in the child, with a
number, before the engine starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lamina.data.early_release import Arrival
from lamina.data.load_pipeline import Piece
from lamina.data.movers.base import Fence, Mover
from lamina.data.sources import DiskSource, HostSource


def slow_loads(seconds: float) -> None:
    """Every row of every load takes that much longer, in any tier."""
    for source in (HostSource, DiskSource):
        load_row = source.load_row

        def slowly(
            self: object,
            row: int,
            piece: Piece,
            after: Fence,
            admit: Callable[[], bool],
            load_row: Callable[..., Fence | None] = load_row,
        ) -> Fence | None:
            time.sleep(seconds)
            return load_row(self, row, piece, after, admit)

        source.load_row = slowly


def slow_saves(seconds: float) -> None:
    """Every row of every save takes that much longer."""
    from lamina.data.movers.cpu import CpuMover

    save: Callable[..., Fence] = CpuMover.save

    def slowly(self: Mover, *arguments: object) -> Fence:
        time.sleep(seconds)
        return save(self, *arguments)

    CpuMover.save = slowly


def hasty(_: float) -> None:
    """Parked requests go on as soon as one row is there, although the model will have to wait."""
    from lamina.data.early_release import EarlyRelease

    EarlyRelease.released = 0

    def at_once(self: EarlyRelease, load: Arrival) -> bool:
        allowed = 0 < load.arrived < load.rows
        EarlyRelease.released += allowed
        return allowed

    EarlyRelease.allows = at_once


def network(number: float) -> None:
    """It is in another network namespace, that of :func:`namespace`."""
    from lamina.bench.network import join_network

    join_network(namespace(int(number)))


def namespace(number: int) -> str:
    """The name of a network namespace for tests."""
    return f"lamina-test-{number}"

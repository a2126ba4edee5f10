"""What the parts of control share: one object, handed over once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lamina_kv.config import Config
from lamina_kv.control.breakers import Breakers
from lamina_kv.control.catalog import Catalog
from lamina_kv.control.leases import LeaseBook
from lamina_kv.control.shape import ChunkShape
from lamina_kv.control.transfers import TransferTable
from lamina_kv.observe.metrics import Meter


class EngineClock:
    """Time as transfers feel it. While the model computes no receipt arrives, so that one long step
    must not make everything overdue that waits for its end.

    Args:
        clock: monotonic seconds.
        longest: seconds that one step counts as at most.

    Attributes:
        now: the time of the last tick.
        step: number of the step whose plan is made next.
        longest: seconds that one step counts as at most.
    """

    def __init__(self, clock: Callable[[], float], longest: float) -> None:
        self.now = 0.0
        self.step = 0
        self.longest = longest
        self._ticked = clock()
        self._clock = clock

    def tick(self) -> float:
        """The engine is here, between two steps; returns :attr:`now`."""
        last, self._ticked = self._ticked, self._clock()
        self.now += min(self._ticked - last, self.longest)
        return self.now

    def ticked(self) -> float:
        """The moment of the last tick, by the clock itself. It stands still while a request is
        looked up, so that a hint which ends meanwhile is believed throughout or not at all."""
        return self._ticked


@dataclass(frozen=True)
class Books:
    """See the module.

    Attributes:
        config: the whole tree.
        shape: tokens of blocks and chunks.
        catalog: where chunks are.
        transfers: all transfers of the engine.
        leases: holds on engine blocks.
        breakers: which tiers are in use.
        meter: where figures go.
        clock: control's time, and the number of the step.
        kept_bytes: bytes of one chunk, all ranks that keep chunks.
        moved_bytes: bytes of one chunk, all ranks: what a load brings.
        keeping: ranks that keep chunks; bounds of the configuration are for each of them.
    """

    config: Config
    shape: ChunkShape
    catalog: Catalog
    transfers: TransferTable
    leases: LeaseBook
    breakers: Breakers
    meter: Meter
    clock: EngineClock
    kept_bytes: int
    moved_bytes: int
    keeping: int

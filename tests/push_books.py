"""What parts of a planner share, of an engine of which a test drives the pushes alone."""

from __future__ import annotations

from math import inf

from lamina_kv.config import BreakerConfig, Config
from lamina_kv.control.books import Books, EngineClock
from lamina_kv.control.breakers import Breakers
from lamina_kv.control.catalog import open_catalog
from lamina_kv.control.leases import LeaseBook
from lamina_kv.control.shape import ChunkShape
from lamina_kv.control.transfers import TransferTable
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import RankReport


def _no_time() -> float:
    return 0.0


class ClockByHand(EngineClock):
    """Control's clock, whose time is what a test says."""

    def __init__(self) -> None:
        super().__init__(_no_time, inf)

    def ticked(self) -> float:
        """See :meth:`EngineClock.ticked`."""
        return self.now


class ByHand:
    """Who goes by such a clock, and is asked for the time.

    Attributes:
        clock: control's.
    """

    clock: ClockByHand

    @property
    def now(self) -> float:
        """Control's clock."""
        return self.clock.now

    @now.setter
    def now(self, seconds: float) -> None:
        self.clock.now = seconds


def push_books(
    shape: ChunkShape,
    transfers: TransferTable,
    leases: LeaseBook,
    clock: EngineClock,
    meter: Meter | None = None,
    breaker: BreakerConfig | None = None,
) -> Books:
    """Of an engine without far tiers, and with one near slot that nobody uses."""
    config = Config(breaker=breaker or BreakerConfig())
    return Books(
        config=config,
        shape=shape,
        catalog=open_catalog([RankReport(0, 1, 1)], (), lambda tier: True, clock.ticked),
        transfers=transfers,
        leases=leases,
        breakers=Breakers(config.breaker, clock.ticked, []),
        meter=meter or Meter(),
        clock=clock,
        kept_bytes=1,
        moved_bytes=1,
        keeping=1,
    )

"""The connector with its tiers behind a link, for ``lamina bench overlap``. Not for serving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lamina.bench.pacing import Link, PacedSource
from lamina.data.load_pipeline import RowSource
from lamina.data.movers import Mover
from lamina.data.tiers.disk_shard import ShardReader
from lamina.data.tiers.host import HostTier
from lamina.engines.vllm.connector import LaminaConnector
from lamina.engines.vllm.worker_side import WorkerSide
from lamina.geometry import CacheGeometry
from lamina.observe.timeline import Timeline
from lamina.plan import TierName

LINK = Link()
"""The link of the engine in this process."""


class PacedWorkerSide(WorkerSide):
    """Puts :data:`LINK` between every tier and the engine."""

    def sources(
        self, host: HostTier, disk: ShardReader | None, mover: Mover, geometry: CacheGeometry
    ) -> Mapping[TierName, RowSource]:
        """See :class:`~lamina.engines.vllm.worker_side.WorkerSide`."""
        plain = super().sources(host, disk, mover, geometry)
        return {tier: PacedSource(source, LINK, geometry) for tier, source in plain.items()}


class PacedConnector(LaminaConnector):
    """Lamina's connector, as it is, with paced tiers."""

    worker_side: ClassVar[type[WorkerSide]] = PacedWorkerSide

    forward_ended: ClassVar[float] = 0.0
    """When the last forward pass ended, on the timeline's clock."""

    def wait_for_save(self) -> None:
        """The end of every forward pass."""
        PacedConnector.forward_ended = Timeline.now()
        super().wait_for_save()

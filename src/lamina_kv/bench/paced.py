"""The connector with host memory behind a link, for ``lamina-kv bench overlap``. Not for
serving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from lamina_kv.bench.pacing import Link, PacedMover
from lamina_kv.data.movers import Mover
from lamina_kv.engines.vllm.connector import LaminaConnector
from lamina_kv.engines.vllm.worker_side import WorkerSide
from lamina_kv.geometry import CacheGeometry
from lamina_kv.observe.timeline import Timeline

LINK = Link()
"""The link of the engine in this process."""


class PacedWorkerSide(WorkerSide):
    """Puts :data:`LINK` between host memory and the engine."""

    def mover(self, geometry: CacheGeometry, allocations: Sequence[torch.Tensor]) -> Mover:
        """See :class:`~lamina_kv.engines.vllm.worker_side.WorkerSide`."""
        return PacedMover(super().mover(geometry, allocations), LINK, geometry)


class PacedConnector(LaminaConnector):
    """Lamina's connector, as it is, with a paced near tier."""

    worker_side: ClassVar[type[WorkerSide]] = PacedWorkerSide

    forward_ended: ClassVar[float] = 0.0
    """When the last forward pass ended, on the timeline's clock."""

    def wait_for_save(self) -> None:
        """The end of every forward pass."""
        PacedConnector.forward_ended = Timeline.now()
        super().wait_for_save()

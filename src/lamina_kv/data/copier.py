"""What copies rows between the near tier and the engine."""

from __future__ import annotations

from dataclasses import dataclass

from lamina_kv.data.movers.base import Mover
from lamina_kv.data.near import NearSlab
from lamina_kv.data.worker_pool import WorkerPool
from lamina_kv.geometry import CacheGeometry
from lamina_kv.observe.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Copier:
    """One direction of a rank: all loads share one, and all saves.

    Attributes:
        near: the near tier.
        mover: copies pages.
        pool: the threads that copies are made on.
        timeline: where spans go; None records nothing.
    """

    near: NearSlab
    mover: Mover
    pool: WorkerPool
    timeline: Timeline | None = None

    @property
    def geometry(self) -> CacheGeometry:
        """The engine's cache."""
        return self.near.geometry

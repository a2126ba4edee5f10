"""Puts together what a rank needs to carry out plans: a mover, tiers, and the executor on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lamina.config import Config
from lamina.data.executor import Executor
from lamina.data.load_pipeline import RowSource
from lamina.data.movers import Mover, make_mover
from lamina.data.push_wire import PushIdentity
from lamina.data.replicas import DiskPlace, Replicas
from lamina.data.sources import tier_sources
from lamina.data.tiers.disk_shard import ShardReader
from lamina.data.tiers.host import HostTier
from lamina.geometry import CacheGeometry
from lamina.observe.timeline import Timeline
from lamina.plan import TierName
from lamina.push.transports.base import Transport

log = logging.getLogger("lamina.data")

Sources = Callable[
    [HostTier, ShardReader | None, Mover, CacheGeometry], Mapping[TierName, RowSource]
]
"""Gives the tiers as loads see them."""


def assemble(
    config: Config,
    geometry: CacheGeometry,
    allocations: Sequence[torch.Tensor],
    *,
    rank: int,
    replicas: Replicas,
    slabs: int,
    place: DiskPlace | None,
    sources: Sources = tier_sources,
    push: tuple[PushIdentity, Transport] | None = None,
) -> Executor:
    """The executor of a rank, with its tiers open. Ranks call it together.

    Args:
        config: the whole tree.
        geometry: the engine's cache.
        allocations: uint8 tensors that back it, one for each of ``geometry.allocation_bytes``.
        rank: this rank.
        replicas: which ranks hold the same cache.
        slabs: how many ranks of this machine keep a host tier.
        place: of the disk tier, if there is one.
        sources: the tiers as loads see them.
        push: who this rank is among engines, and its wire to them.

    Raises:
        ValueError: if a capacity or a bound is less than a chunk, or there is no mover for the
            device.
        StoreError: if the store cannot be used.
        OSError: if there is no such amount of memory.
    """
    _check_bounds(config, geometry.chunk_bytes)
    mover = make_mover(geometry, allocations)
    tiers = replicas.open_tiers(geometry, mover, config.host.capacity_bytes(slabs), place)
    return Executor(
        rank=rank,
        geometry=geometry,
        mover=mover,
        host=tiers.host,
        disk=tiers.disk,
        config=config.load,
        sources=sources(tiers.host, tiers.disk, mover, geometry),
        follows=replicas.follows,
        push=push,
        timeline=_open_timeline(config.observe.timeline, rank),
    )


def _open_timeline(path: Path | None, rank: int) -> Timeline | None:
    if path is None:
        return None
    file = _of_rank(path, rank)
    try:
        file.open("ab").close()  # it is written at the end, hours from now
    except OSError as error:
        log.warning("observe.timeline: nothing is recorded: %s", error)
        return None
    return Timeline(file)


def _check_bounds(config: Config, chunk_bytes: int) -> None:
    for key, bound in (
        ("save.max_inflight", config.save.max_inflight),
        ("disk.max_inflight", config.disk.max_inflight if config.disk else None),
    ):
        if bound is not None and bound < chunk_bytes:
            raise ValueError(
                f"{key}: {bound} bytes is less than one chunk, so nothing could ever be moved; "
                f"use at least {chunk_bytes}"
            )


def _of_rank(path: Path, rank: int) -> Path:
    """The file that a rank has instead of ``path``; the first has that itself."""
    return path.with_stem(f"{path.stem}-rank{rank}") if rank else path

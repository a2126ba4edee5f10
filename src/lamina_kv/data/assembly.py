"""Puts together what a rank needs to carry out plans: its tiers, and the executor on them."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from lamina_kv.config import Config
from lamina_kv.data.executor import Executor, Tiers
from lamina_kv.data.far import FarTier
from lamina_kv.data.movers import Mover
from lamina_kv.data.push_wire import PushIdentity
from lamina_kv.data.replicas import Replicas
from lamina_kv.geometry import CacheGeometry
from lamina_kv.observe.timeline import Timeline
from lamina_kv.plan import TierName
from lamina_kv.push.transports.base import Transport
from lamina_kv.quantities import size_of
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.contract import Tenant
from lamina_kv.values import format_size

log = logging.getLogger("lamina_kv.data")


def assemble(
    config: Config,
    geometry: CacheGeometry,
    mover: Mover,
    *,
    rank: int,
    replicas: Replicas,
    slabs: int,
    tenant: Tenant | None,
    push: tuple[PushIdentity, Transport] | None = None,
) -> Executor:
    """The executor of a rank, with its tiers open. Ranks call it together.

    Args:
        config: the whole tree.
        geometry: the engine's cache.
        mover: copies between that and the near tier; closed with the executor, or at an error.
        rank: this rank.
        replicas: which ranks hold the same cache.
        slabs: how many ranks of this machine keep a near tier.
        tenant: for whom far tiers are opened; None if there are none.
        push: who this rank is among engines, and its wire to them.

    Raises:
        ValueError: if a capacity or a bound is less than a chunk.
        StoreError: if a store cannot be used.
        OSError: if there is no such amount of memory.
    """
    _check_bounds(config, geometry.chunk_bytes)
    with ExitStack() as undo:
        undo.callback(mover.close)
        near = replicas.open_near(geometry, mover, config.host.capacity_bytes(slabs))
        far = () if replicas.follows else _open_far(config, tenant, geometry, undo)
        executor = Executor(
            rank=rank,
            tiers=Tiers(near, far, replicas.follows),
            mover=mover,
            config=config.load,
            push=push,
            timeline=open_timeline(config.observe.timeline, rank),
        )
        if mover.shares_cores and config.load.mode == "auto":
            # A copy beside the model makes its threads wait for each other at every operation.
            executor.load_before_forward()
        undo.pop_all()
    return executor


def _open_far(
    config: Config, tenant: Tenant | None, geometry: CacheGeometry, undo: ExitStack
) -> tuple[FarTier, ...]:
    """Open the stores, the preferred one first; they are closed by ``undo``."""
    tiers = []
    for each in config.tiers:
        if tenant is None:
            raise ValueError("far tiers are opened for a tenant")
        store = KINDS[each.kind].open(each, tenant)
        undo.callback(store.close)
        tier = FarTier(
            TierName(each.name),
            store,
            # The same in every tier: a near slot is sealed for each that it is written to.
            shard=tenant.shard,
            length=geometry.chunk_bytes,
            timeout=config.load.deadline,
        )
        tiers.append(tier)
    return tuple(tiers)


def open_timeline(path: Path | None, rank: int) -> Timeline | None:
    """The timeline that ``observe.timeline`` asks for; None if it asks for none, or its file cannot
    be made, which is logged.

    Args:
        path: the file, if there is to be one.
        rank: whose; ranks beyond the first one have files of their own.
    """
    if path is None:
        return None
    try:
        return Timeline(_of_rank(path, rank), rank=rank)
    except OSError as error:
        log.warning("observe.timeline: nothing is recorded: %s", error)
        return None


def _check_bounds(config: Config, chunk_bytes: int) -> None:
    bounds = {"save.max_inflight": config.save.max_inflight}
    bounds |= {tier.key("max_inflight"): tier.max_inflight for tier in config.tiers}
    for key, bound in bounds.items():
        if bound < chunk_bytes:
            raise ValueError(
                f"{key}: {size_of(bound)} is less than one chunk, so nothing could ever be moved; "
                f"use at least {format_size(chunk_bytes)}"
            )


def _of_rank(path: Path, rank: int) -> Path:
    """The file that a rank has instead of ``path``; the first has that itself."""
    return path.with_stem(f"{path.stem}-rank{rank}") if rank else path

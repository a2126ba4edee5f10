"""Tiers as the load pipeline sees them: where one row of some chunks comes from."""

from __future__ import annotations

import queue
from collections.abc import Callable

import numpy as np
import torch

from lamina.data.load_pipeline import PIECE_BYTES, BadChunks, Piece, RowSource
from lamina.data.movers.base import Fence, Mover, pages_of
from lamina.data.tiers.disk_shard import ShardReader
from lamina.data.tiers.host import HostTier
from lamina.geometry import CacheGeometry, align_up
from lamina.plan import TierName

LOAD_THREADS = {TierName.HOST: 2, TierName.DISK: 4}
"""Threads that load from each tier; two copy as fast as memory allows, a disk likes more at once,
and each of its threads holds one staging buffer."""


class HostSource:
    """Host memory: one copy, nothing that can fail.

    Args:
        host: the tier.
        mover: copies pages into the engine.
        geometry: the engine's cache.
    """

    def __init__(self, host: HostTier, mover: Mover, geometry: CacheGeometry) -> None:
        self._host = host
        self._mover = mover
        self._rows = geometry.rows
        self._per_chunk = geometry.blocks_per_chunk

    def load_row(
        self, row: int, piece: Piece, after: Fence, admit: Callable[[], bool]
    ) -> Fence | None:
        """See :class:`~lamina.data.load_pipeline.RowSource`."""
        self._mover.await_host()
        if not admit():
            return None
        chunk, block = np.divmod(piece.pages, self._per_chunk)
        pages = piece.slots[chunk] * self._per_chunk + block
        blocks = pages_of(self._rows[row], piece.group, piece.blocks)
        return self._mover.load(row, self._host.pages(row), pages, blocks, after)


class DiskSource:
    """The disk: read into a staging buffer, verify, copy. The chunk never passes through the
    host tier.

    Args:
        disk: the tier.
        mover: copies pages into the engine and gives staging memory.
        geometry: the engine's cache.
    """

    def __init__(self, disk: ShardReader, mover: Mover, geometry: CacheGeometry) -> None:
        self._disk = disk
        self._mover = mover
        self._rows = geometry.rows
        self._extent_bytes = geometry.extent_bytes
        self._per_chunk = geometry.blocks_per_chunk
        size = align_up(max(PIECE_BYTES, *geometry.extent_bytes))
        self._staging: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for _ in range(LOAD_THREADS[TierName.DISK]):
            self._staging.put(mover.allocate_host(size))

    def load_row(
        self, row: int, piece: Piece, after: Fence, admit: Callable[[], bool]
    ) -> Fence | None:
        """See :class:`~lamina.data.load_pipeline.RowSource`."""
        staging = self._staging.get()
        try:
            extent = self._extent_bytes[row]
            flat = staging[: len(piece.keys) * extent]
            into = flat.numpy().reshape(-1, extent)
            slots = piece.slots.tolist()
            read = self._disk.read_row(row, slots, piece.keys, into)
            good = read.good
            if row == 0:
                self._disk.note_used(slots)
            shape = self._rows[row]
            pages, blocks = piece.pages, pages_of(shape, piece.group, piece.blocks)
            if not good.all():
                wanted = good[pages // self._per_chunk]
                pages, blocks = pages[wanted], blocks[wanted]
            if not admit():
                return None
            staged = flat.view(-1, shape.page_bytes)
            fence = self._mover.load(row, staged, pages, blocks, after)
            fence.wait()
            if not good.all():
                bad, damaged = np.flatnonzero(~good), np.flatnonzero(read.damaged)
                raise BadChunks(bad.tolist(), damaged.tolist(), f"disk_{read.failure}")
            return fence
        finally:
            self._staging.put(staging)


def tier_sources(
    host: HostTier, disk: ShardReader | None, mover: Mover, geometry: CacheGeometry
) -> dict[TierName, RowSource]:
    """Every tier as loads see it."""
    sources: dict[TierName, RowSource] = {TierName.HOST: HostSource(host, mover, geometry)}
    if disk is not None:
        sources[TierName.DISK] = DiskSource(disk, mover, geometry)
    return sources

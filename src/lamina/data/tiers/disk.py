"""The disk tier: one rank's chunks on a local disk, found again after a restart."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lamina.data.tiers import disk_store
from lamina.data.tiers.disk_index import DiskIndex, ShardLayout, open_index
from lamina.data.tiers.disk_shard import DiskShard, ReadFailure
from lamina.data.tiers.disk_slab import Slab, allocate, chunk_on_disk
from lamina.data.tiers.disk_store import Shard, StoreError, StoreNamespace

__all__ = ["DiskTier", "ReadFailure", "StoreError", "StoreNamespace"]

log = logging.getLogger("lamina.data")


class DiskTier(DiskShard):
    """A store's part for one rank and one model, opened for a server.

    What other models left in the store is removed, least recently used first, as far as
    ``capacity`` demands. What this model left is there again, unless the layout has changed or
    the files are damaged; then it starts empty, with a warning that says why.

    Args:
        path: the store's directory; made if it is not there.
        namespace: the model and all else that sets its chunks apart.
        rank: this rank.
        extent_bytes: per row, bytes of one chunk.
        capacity: bytes of disk for this rank; allocated here, not when they are needed.
        direct: bypass the page cache; None: where the file system can.

    Raises:
        ValueError: if ``capacity`` is less than one chunk.
        StoreError: if the store cannot be used: it is another server's, of another format, not
            writable, or the disk is full. The text says what to do.
    """

    def __init__(
        self,
        *,
        path: Path,
        namespace: StoreNamespace,
        rank: int,
        extent_bytes: Sequence[int],
        capacity: int,
        direct: bool | None = None,
    ) -> None:
        chunk = chunk_on_disk(extent_bytes)
        if capacity < chunk:
            raise ValueError(
                f"disk.capacity: {capacity} bytes for each rank is less than one chunk, which "
                f"takes {chunk} bytes on disk"
            )
        layout = ShardLayout(tuple(extent_bytes), capacity // chunk)
        size = layout.slots * chunk
        with ExitStack() as opened:
            disk_store.prepare(path)
            opened.enter_context(disk_store.hold(path, [rank]))
            try:
                shard = Shard(disk_store.describe(path, namespace), rank)
                disk_store.make_room(path, shard, size, capacity)
                disk_store.check_room(shard.slab, size)
                index, slab = _open(shard, layout, size, direct, opened)
                disk_store.sync_directories(path, shard.directory)
            except OSError as error:
                raise StoreError(f"disk.path: cannot use {path}: {error}") from error
            super().__init__(layout, slab, index)
            self._opened = opened.pop_all()
        log.info(
            "disk tier: %s in %s, %d of them stored, %s I/O",
            layout,
            shard.slab,
            len(index),
            "direct" if slab.direct else "buffered",
        )

    def close(self) -> None:
        """Close the files and give the store back; no other call may be under way. Idempotent."""
        self._opened.close()


def _open(
    shard: Shard, layout: ShardLayout, size: int, direct: bool | None, opened: ExitStack
) -> tuple[DiskIndex, Slab]:
    """Open a shard's files. The index is emptied before the slab changes, never after it."""
    whole = shard.slab.exists() and shard.slab.stat().st_size == size
    index = open_index(shard.index, layout)
    opened.callback(index.close)
    if not whole and len(index):
        log.warning(
            "disk tier: %s is missing or was cut short; this rank's part of the store starts empty",
            shard.slab,
        )
        index.clear()
    try:
        allocate(shard.slab, size)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise disk_store.no_room(shard.slab, size) from error
        raise
    slab = Slab(shard.slab, layout.extent_bytes, layout.slots, direct)
    opened.callback(slab.close)
    return index, slab

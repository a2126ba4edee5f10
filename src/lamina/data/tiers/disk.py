"""The disk tier: one rank's chunks on a local disk, found again after a restart."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from lamina.data.shared_memory import MemoryFile
from lamina.data.tiers import disk_store
from lamina.data.tiers.disk_index import (
    DamagedIndex,
    DiskIndex,
    ShardLayout,
    open_index,
    summarize,
)
from lamina.data.tiers.disk_lock import StoreError, Watch, hold
from lamina.data.tiers.disk_shard import DiskShard, ReadFailure, ShardReader
from lamina.data.tiers.disk_slab import Slab, allocate, chunk_on_disk
from lamina.data.tiers.disk_store import Server, Shard, StoreNamespace
from lamina.data.tiers.disk_table import ChunkTable
from lamina.data.tiers.file_system import concern

__all__ = ["DiskReader", "DiskTier", "ReadFailure", "StoreError", "StoreNamespace"]

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
        table: memory for what followers need to read it, see :class:`DiskReader`.
        shards: how many ranks' parts the server has in the store, from rank 0 on, so that those of
            ranks that are gone are told apart; None if that is not known.

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
        table: MemoryFile | None = None,
        shards: int | None = None,
    ) -> None:
        chunk = chunk_on_disk(extent_bytes)
        if capacity < chunk:
            raise ValueError(
                f"disk.capacity: {capacity} bytes for each rank is less than one chunk, which "
                f"takes {chunk} bytes on disk: use at least that, or smaller chunks (chunk_tokens)"
            )
        layout = ShardLayout(tuple(extent_bytes), capacity // chunk)
        size = layout.slots * chunk
        with ExitStack() as opened:
            disk_store.prepare(path)
            (lock,) = opened.enter_context(hold(path, [rank], disk_store.LOCK_PATIENCE))
            try:
                if (found := concern(path)) is not None:
                    log.warning("disk tier: %s: %s", found.found, found.advice)
                shard = Shard(disk_store.describe(path, namespace), rank)
                server = Server(shards, lock.before)
                disk_store.make_room(path, shard, size, capacity, server)
                disk_store.check_room(shard.slab, size)
                index, slab = _open(shard, layout, size, direct, table, opened)
                disk_store.sync_directories(path, shard.directory)
                watch = Watch(lock, [(shard.slab, slab.stat()), *index.stats()])
            except OSError as error:
                raise StoreError(f"disk.path: cannot use {path}: {error}") from error
            super().__init__(layout, slab, index, watch)
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


class DiskReader(ShardReader):
    """The disk tier of a leader, opened by a follower: it reads what the leader has stored, locks
    and changes nothing.

    Args:
        path: the store's directory.
        namespace: as the leader has it.
        rank: the leader's.
        extent_bytes: per row, bytes of one chunk.
        slots: chunks that fit.
        direct: whether the leader bypasses the page cache.
        table: the memory that the leader's tier was given.

    Raises:
        StoreError: if the leader's files cannot be read.
    """

    def __init__(
        self,
        *,
        path: Path,
        namespace: StoreNamespace,
        rank: int,
        extent_bytes: Sequence[int],
        slots: int,
        direct: bool,
        table: MemoryFile,
    ) -> None:
        layout = ShardLayout(tuple(extent_bytes), slots)
        file = Shard(path / namespace.fingerprint, rank).slab
        try:
            self._file = Slab(file, layout.extent_bytes, slots, direct, writable=False)
        except OSError as error:
            raise StoreError(f"disk.path: cannot read {file}: {error}") from error
        known = ChunkTable(slots, len(layout.extent_bytes), table, writable=False)
        super().__init__(layout, self._file, known)

    def close(self) -> None:
        """Close the leader's file; no other call may be under way. Idempotent."""
        self._file.close()


def _open(
    shard: Shard,
    layout: ShardLayout,
    size: int,
    direct: bool | None,
    table: MemoryFile | None,
    opened: ExitStack,
) -> tuple[DiskIndex, Slab]:
    """Open a shard's files. Space is found first, because there may be none: until then what is
    stored is left as it is. An index of another layout starts empty by itself."""
    before = shard.slab.stat().st_size if shard.slab.exists() else -1
    if before < size and shard.index.exists():
        _forget_lost_bytes(shard, layout)
    try:
        reserved = allocate(shard.slab, size)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise disk_store.no_room(shard.slab, size, error) from error
        raise
    if not reserved:
        log.warning(
            "disk tier: the file system of %s cannot reserve space, so that disk.capacity is only "
            "known to fit now: if others fill the disk later, writes stop. Use ext4 or xfs for "
            "disk.path, or keep as much free",
            shard.slab,
        )
    index = open_index(shard.index, layout, table)
    opened.callback(index.close)
    if before > size:
        os.truncate(shard.slab, size)
    slab = Slab(shard.slab, layout.extent_bytes, layout.slots, direct)
    opened.callback(slab.close)
    return index, slab


def _forget_lost_bytes(shard: Shard, layout: ShardLayout) -> None:
    """Empty the index of a slab that is missing or was cut short, before the slab is made whole: a
    start that fails in between would leave an index that promises bytes which are gone."""
    with suppress(DamagedIndex, OSError):  # whoever opens it next says what is wrong with it
        if summarize(shard.index).layout != layout:
            return
    with closing(open_index(shard.index, layout)) as index:
        if len(index):
            log.warning(
                "disk tier: %s is missing or was cut short; this rank's part of the store starts "
                "empty",
                shard.slab,
            )
            index.clear()

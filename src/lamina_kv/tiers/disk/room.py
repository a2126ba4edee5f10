"""Room for a shard: which others may be removed for it, and whether it fits on the disk."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from lamina_kv.quantities import size_of
from lamina_kv.tiers.contract import StoreError
from lamina_kv.tiers.disk.directory import Shard, shards, stat_of
from lamina_kv.tiers.disk.lock import hold, lock_file

log = logging.getLogger("lamina_kv.tiers")

LOCK_PATIENCE = 2.0
"""Seconds that a server waits for its part of a store, while another one may be removing an old
model's shard from it."""

START_SECONDS = 600.0
"""Seconds within which all ranks of a server open their shards."""


OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that say that there is no room."""


class NoRoom(StoreError):
    """The disk has not as much room as the tier is to have."""


@dataclass(frozen=True, slots=True)
class Server:
    """What a rank knows of the server that it belongs to, when it opens its shard.

    Attributes:
        shards: how many shards the server has, from rank 0 on; None if the rank cannot know.
        before: when the rank was opened the time before, in seconds since the epoch; 0 if never.
    """

    shards: int | None = None
    before: float = 0.0

    def has_left(self, path: Path, shard: Shard) -> bool:
        """Whether a shard of the server's model is that of a rank which there is no more: its
        number is too high. Where the rank cannot know that, it was not opened when this rank was,
        the time before."""
        if self.shards is not None:
            return shard.rank >= self.shards
        lock = stat_of(lock_file(path, shard.rank))
        used = max(shard.last_used(), lock.st_mtime if lock else 0.0)
        return used < self.before - START_SECONDS


def make_room(path: Path, own: Shard, size: int, capacity: int, server: Server) -> None:
    """Remove shards that are not the server's, least recently used first, until those that are
    left and ``size`` bytes of our own do not exceed ``capacity``.

    They are this rank's of other namespaces; rank 0 also answers for ranks that no server uses any
    more, of other namespaces and of this one.
    """
    candidates = [
        shard
        for shard in shards(path)
        if own.rank in {shard.rank, 0}
        and shard != own
        and (shard.directory != own.directory or server.has_left(path, shard))
    ]
    taken = {shard: shard.disk_bytes() for shard in candidates}
    for shard in sorted(candidates, key=Shard.last_used):
        if sum(taken.values()) + size <= capacity:
            return
        if shard.rank != own.rank:
            try:
                with hold(path, [shard.rank]):
                    shard.remove()
            except StoreError:
                del taken[shard]  # in use, so its own rank answers for it
                continue
        else:
            shard.remove()
        log.info(
            "%s: removed rank %d of namespace %s (%s) to stay within the tier's capacity",
            path,
            shard.rank,
            shard.directory.name,
            size_of(taken.pop(shard)),
        )


def check_room(slab: Path, size: int) -> None:
    """Make sure that a slab of ``size`` bytes fits on the disk.

    Raises:
        NoRoom: if it does not.
    """
    if _missing(slab, size) > _free_bytes(slab.parent):
        raise no_room(slab, size)


def no_room(slab: Path, size: int, error: OSError | None = None) -> NoRoom:
    """The error for a slab that is to have ``size`` bytes.

    Args:
        slab: the file.
        size: what it is to have.
        error: what the system says; a quota is seen in nothing else.
    """
    said = "" if error is None else f" ({error.strerror})"
    return NoRoom(
        f"{slab.parent} has {size_of(_free_bytes(slab.parent))} free, and "
        f"{size_of(_missing(slab, size))} more are needed{said}: lower the capacity, free some "
        "space, or choose another path"
    )


def _missing(slab: Path, size: int) -> int:
    return max(0, size - (slab.stat().st_blocks * 512 if slab.exists() else 0))


def _free_bytes(directory: Path) -> int:
    system = os.statvfs(directory)
    return system.f_bavail * system.f_frsize

"""A look into a store without its configuration, and a check of everything in it.

Nothing is changed. A server may be using a store that is looked into, but not one that is checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.audit import Part
from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.disk import directory, lock
from lamina_kv.tiers.disk.aio import Operation
from lamina_kv.tiers.disk.data import Slab, read_label
from lamina_kv.tiers.disk.directory import Shard
from lamina_kv.tiers.disk.heads import Heads, Summary
from lamina_kv.tiers.disk.layout import Layout
from lamina_kv.tiers.objects import aligned_memory, is_whole, shard_of

_BATCH_BYTES = 16 << 20


def open_audit(place: str, tier: TierConfig | None = None) -> DiskAudit | None:
    """Look into a store; None if ``place`` is none. No more than the path is needed.

    Raises:
        StoreError: if it is one that this user or this Lamina cannot read.
    """
    path = Path(place)
    directory.require_access(path)
    return DiskAudit(path) if directory.is_store(path) else None


class DiskAudit:
    """An :class:`~lamina_kv.tiers.audit.Audit` of a store.

    Args:
        path: the store.

    Attributes:
        place: see the protocol.
        damage_means: see there.
        clearing: empty: ``lamina-kv clear`` empties it.

    Raises:
        StoreError: if it is of another format.
    """

    damage_means = (
        "A server takes what is damaged for a miss and computes it again, and a few chunks are "
        "normal after a power failure; `lamina-kv clear` empties the store."
    )
    clearing = ""

    def __init__(self, path: Path) -> None:
        directory.check_format(path)
        self.place = str(path)
        self._path = path

    def parts(self) -> list[Part]:
        """See the protocol."""
        return [self._part(shard) for shard in directory.shards(self._path)]

    def check(self) -> Iterator[tuple[int, list[str]]]:
        """See the protocol.

        Raises:
            StoreError: if a server uses the store.
        """
        shards = directory.shards(self._path)
        with lock.hold(self._path, sorted({shard.rank for shard in shards})):
            for shard in shards:
                summary = summarize(shard.slab)
                if summary is None:
                    continue  # said by :meth:`parts`
                try:
                    yield from check(shard.slab, summary[0])
                except OSError as error:
                    yield 0, [f"{shard.slab}: cannot be read: {error}"]

    def close(self) -> None:
        """See the protocol."""

    def _part(self, shard: Shard) -> Part:
        said, taken = directory.description(shard), shard.disk_bytes()
        user = lock.holder(self._path, shard.rank)
        name, user = shard.directory.name, f"pid {user}" if user else ""
        summary = summarize(shard.slab)
        if summary is None:
            damage = (f"{shard.slab} is damaged or missing",)
            return Part(name, said, shard.rank, None, 0, taken, user=user, damage=damage)
        layout, found = summary
        return Part(
            name,
            said,
            shard.rank,
            found.chunks,
            found.chunks * layout.object_bytes,
            taken,
            found.oldest,
            found.newest,
            found.row_bytes,
            layout.slots,
            user,
            _damage(shard.slab, found),
        )


def _damage(slab: Path, found: Summary) -> tuple[str, ...]:
    """What is wrong with what says which chunks a slab holds."""
    lines = []
    if found.damaged:
        lines.append(f"{slab}: the heads of up to {found.damaged} chunks are damaged")
    if found.lost:
        lines.append(f"{slab}: the file was cut short by {found.lost} chunks")
    return tuple(lines)


def summarize(path: Path) -> tuple[Layout, Summary] | None:
    """How the slab ``path`` is laid out and what is in it; None if that cannot be told, as it is
    damaged or not there.

    Raises:
        OSError: if it cannot be read.
    """
    layout = read_label(path)
    if layout is None:
        return None
    with closing(Slab(path, layout, direct=False, writable=False)) as slab:
        return layout, Heads(slab).summary()


def check(path: Path, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """Read a slab back and verify every chunk in it.

    Args:
        path: the file.
        layout: of it.

    Yields:
        Bytes that were read, and what was wrong with them.

    Raises:
        OSError: if it cannot be read.
    """
    size = layout.object_bytes
    batch = max(1, _BATCH_BYTES // size)
    buffers = aligned_memory(batch * size).reshape(batch, size)
    with closing(Slab(path, layout, direct=None, writable=False)) as slab:
        stored = Heads(slab).stored(keys=True)
        assert stored.keys is not None
        for start in range(0, len(stored.slots), batch):
            slots = stored.slots[start : start + batch].astype(np.int64)
            errors = slab.move_objects(Operation.READ, slots, list(buffers[: len(slots)]))
            damage = []
            for i, error in enumerate(errors.tolist()):
                key = ChunkKey(stored.keys[start + i].tobytes())
                if error:
                    damage.append(f"{path}: slot {slots[i]} cannot be read: {os.strerror(error)}")
                elif not is_whole(buffers[i], key, shard_of(buffers[i])):
                    damage.append(f"{path}: the chunk in slot {slots[i]} is damaged")
            yield size * len(slots), damage

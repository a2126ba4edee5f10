"""Disk tiers of small chunks, for tests: opened, filled, and read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lamina_kv.geometry import OBJECT_HEADER_BYTES
from lamina_kv.keys import KEY_BYTES
from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import Fate, Piece, Tenant
from lamina_kv.tiers.disk.config import DiskConfig
from lamina_kv.tiers.disk.store import DiskStore, open_store
from lamina_kv.tiers.objects import Object, aligned_memory, seal, verify

NAMESPACE = "ab" * 16
OBJECT = 12288
"""Bytes of an object, unless a test says otherwise."""
PADDING = 1000
"""Bytes at the end of an object that are none of its rows."""
SLOTS = 8


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(8, "little") + bytes([number % 251]) * (KEY_BYTES - 8))


def open_disk(
    path: Path,
    slots: int = SLOTS,
    *,
    size: int = OBJECT,
    namespace: str = NAMESPACE,
    rank: int = 0,
    ranks: int | None = None,
    direct: bool | str = "auto",
    capacity: int | None = None,
    name: str = "disk",
    description: dict[str, str] | None = None,
) -> DiskStore:
    """Open a store with room for some chunks and a little more; ``capacity`` says exactly how
    much."""
    config = DiskConfig(name=name, path=path, capacity=capacity or slots * size + 1, direct=direct)  # type: ignore[call-arg,arg-type]
    return open_store(config, Tenant(namespace, description or {}, rank, ranks, size, rank))


def rows_of(size: int) -> int:
    return size - OBJECT_HEADER_BYTES - PADDING


def chunk(number: int, size: int = OBJECT, rank: int = 0) -> Object:
    """The sealed object of chunk ``number``."""
    made = aligned_memory(size)
    made[:] = np.random.default_rng([number, rank]).integers(0, 256, size, np.uint8)
    seal(made, key(number), rank, rows_of(size))
    return made


def write(
    store: DiskStore, chunks: dict[int, int], size: int = OBJECT, rank: int = 0
) -> Sequence[Fate]:
    """Write chunk ``chunks[slot]`` to every slot, in one batch."""
    pieces = [Piece(key(n), slot, chunk(n, size, rank)) for slot, n in chunks.items()]
    return store.write(pieces, 10.0)


def put(store: DiskStore, chunks: dict[int, int], size: int = OBJECT, rank: int = 0) -> None:
    """The same, and it must go well."""
    assert write(store, chunks, size, rank) == [Fate.DONE] * len(chunks)


def read(
    store: DiskStore, chunks: dict[int, int], size: int = OBJECT, rank: int = 0
) -> dict[int, Fate]:
    """What becomes of chunk ``chunks[slot]`` of every slot, read in one batch and verified as the
    data room does. What verifies must be right."""
    buffers = aligned_memory(len(chunks) * size).reshape(len(chunks), size)
    pieces = [
        Piece(key(n), slot, buffer)
        for (slot, n), buffer in zip(chunks.items(), buffers, strict=True)
    ]
    fates = {}
    for fate, piece, n in zip(store.read(pieces, 10.0), pieces, chunks.values(), strict=True):
        sound = fate is Fate.DONE and verify(piece.buffer, piece.key, rank, rows_of(size))
        if sound:
            rows = slice(OBJECT_HEADER_BYTES, OBJECT_HEADER_BYTES + rows_of(size))
            assert (piece.buffer[rows] == chunk(n, size, rank)[rows]).all()
        fates[piece.place] = Fate.CORRUPT if fate is Fate.DONE and not sound else fate
    return fates


def sound(
    store: DiskStore, chunks: dict[int, int], size: int = OBJECT, rank: int = 0
) -> dict[int, bool]:
    """Whether the chunks of these slots are delivered."""
    return {slot: fate is Fate.DONE for slot, fate in read(store, chunks, size, rank).items()}


def held(store: DiskStore) -> dict[int, ChunkKey]:
    """What the store says that it holds."""
    stored = store.stored(keys=True)
    assert stored.keys is not None
    keys = [ChunkKey(each.tobytes()) for each in stored.keys]
    return dict(zip(stored.slots.tolist(), keys, strict=True))


def used(store: DiskStore) -> dict[int, float]:
    """When what it holds was used last."""
    stored = store.stored(keys=True)
    assert stored.used is not None
    return dict(zip(stored.slots.tolist(), stored.used.tolist(), strict=True))


def slab_of(path: Path, rank: int = 0) -> Path:
    """The one file of a rank's chunks."""
    (found,) = path.rglob(f"rank-{rank}.slab")
    return found

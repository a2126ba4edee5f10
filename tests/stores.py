"""A far tier in memory: the double of every store in tests, and an example of how to write one.

What it holds is in a :class:`Shelf`, which several stores may share as engines share a server: it
outlives them, and who opens it again finds what is there. What goes wrong is up to its
:class:`Faults`. As a kind of tier it is registered by ``KINDS["memory"] = KIND``.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, cast

import numpy as np
from pydantic import Field

from lamina_kv.keys import key_array
from lamina_kv.plan import ChunkKey, StoredChunks, marks_of
from lamina_kv.tiers import Kind
from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.contract import Fate, Piece, Tenant, Traits
from lamina_kv.values import choice, integer


class MemoryConfig(TierConfig):
    """A tier in memory."""

    kind: Annotated[Literal["memory"], choice("memory")] = "memory"
    slots: Annotated[int, integer(0)] = Field(
        default=0, description="Chunks that fit. 0: any number, and they go by key."
    )


def stored_chunks(chunks: Mapping[int, ChunkKey], *, keys: bool) -> StoredChunks:
    """What a tier holds, by slot; used in the order of ``chunks``, the first one longest ago.

    Args:
        chunks: keys by slot.
        keys: whether the rank is the first, which sends whole keys.
    """
    slots = np.array(sorted(chunks), np.int32)
    names = key_array([chunks[slot] for slot in sorted(chunks)])
    if not keys:
        return StoredChunks(slots, marks_of(names))
    ages = {slot: float(age) for age, slot in enumerate(chunks)}
    used = np.array([ages[slot] for slot in sorted(chunks)], np.float64)
    return StoredChunks(slots, marks_of(names), names, used)


class Faults:
    """What goes wrong with a store: nothing. Tests override what they need."""

    def pause(self, verb: str) -> None:
        """Take as long as a call of this name takes. It has not touched a buffer yet."""

    def fate(self, verb: str, key: ChunkKey) -> Fate:
        """What becomes of a chunk that could be read or written."""
        return Fate.DONE

    def content(self, key: ChunkKey, content: bytes) -> bytes:
        """What is read instead of ``content``."""
        return content


@dataclass
class Shelf:
    """What a far place holds: keys and bytes, by slot or by key. The least recent is first."""

    held: dict[int | ChunkKey, tuple[ChunkKey, bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


SHELVES: defaultdict[tuple[str, str, int], Shelf] = defaultdict(Shelf)
"""By the tier's name, the namespace and the rank: what :func:`open_store` finds again."""

KIND = Kind(MemoryConfig, "stores:open_store")
"""The kind of tier that this is."""


def open_store(config: MemoryConfig, tenant: Tenant) -> MemoryStore:
    """Open the part of a rank."""
    shelf = SHELVES[config.name, tenant.namespace, tenant.rank]
    return MemoryStore(shelf, slots=config.slots)


class MemoryStore:
    """A :class:`~lamina_kv.tiers.contract.Store` in memory.

    Args:
        shelf: what it holds; a new one if None.
        slots: how many chunks fit; control assigns their slots. 0: chunks go by key.
        room: chunks that fit where they go by key; beyond it the least recent one is forgotten.
        readers: threads that may read at once.
        batch: pieces to be given in one call.
        faults: what goes wrong.
    """

    def __init__(
        self,
        shelf: Shelf | None = None,
        *,
        slots: int = 0,
        room: int = 1 << 30,
        readers: int = 2,
        batch: int = 4,
        faults: Faults | None = None,
    ) -> None:
        self.traits = Traits(readers=readers, batch=batch)
        self.slots = slots
        self.shelf = shelf or Shelf()
        self.faults = faults or Faults()
        self.closed = False
        self._room = slots or room

    def stored(self, *, keys: bool) -> StoredChunks | None:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        if not self.slots:
            return None
        with self.shelf.lock:
            held = {cast(int, slot): key for slot, (key, _) in self.shelf.held.items()}
        return stored_chunks(held, keys=keys)

    def find(self, keys: Sequence[ChunkKey], timeout: float) -> Sequence[bool] | None:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        self.faults.pause("find")
        if any(self.faults.fate("find", key) is not Fate.DONE for key in keys):
            return None
        with self.shelf.lock:
            held = {key for key, _ in self.shelf.held.values()}
        return [key in held for key in keys]

    def probe(self, timeout: float) -> bool:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        self.faults.pause("probe")
        return self.faults.fate("probe", ChunkKey(b"")) is Fate.DONE

    def read(self, pieces: Sequence[Piece], timeout: float) -> Sequence[Fate]:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        self.faults.pause("read")
        return [self._read(piece) for piece in pieces]

    def _read(self, piece: Piece) -> Fate:
        with self.shelf.lock:
            key, content = self.shelf.held.get(self._where(*piece[:2]), (None, b""))
        if key != piece.key:
            return Fate.GONE
        fate = self.faults.fate("read", piece.key)
        if fate is Fate.DONE:
            given = self.faults.content(piece.key, content)
            if len(given) != len(piece.buffer):
                return Fate.CORRUPT
            piece.buffer[:] = np.frombuffer(given, np.uint8)
        return fate

    def write(self, pieces: Sequence[Piece], timeout: float) -> Sequence[Fate]:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        self.faults.pause("write")
        return [self._write(piece) for piece in pieces]

    def _write(self, piece: Piece) -> Fate:
        where = self._where(*piece[:2])
        fate = self.faults.fate("write", piece.key)
        with self.shelf.lock:
            held = self.shelf.held
            if fate is Fate.DONE and not self.slots and where in held and not piece.damaged:
                return fate  # objects never change: the first writer's stays
            held.pop(where, None)
            if fate is Fate.DONE:
                held[where] = (piece.key, piece.buffer.tobytes())
            while len(held) > self._room:
                del held[next(iter(held))]
        return fate

    def drop(self, slots: Sequence[int]) -> None:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        with self.shelf.lock:
            for slot in slots:
                self.shelf.held.pop(slot, None)

    def touch(self, uses: Sequence[tuple[ChunkKey, int]]) -> None:
        """See :class:`~lamina_kv.tiers.contract.Store`."""
        with self.shelf.lock:
            for key, place in uses:
                where = self._where(key, place)
                if self.shelf.held.get(where, (None,))[0] == key:
                    self.shelf.held[where] = self.shelf.held.pop(where)

    def close(self) -> None:
        """See :class:`~lamina_kv.tiers.contract.Store`. The shelf stays."""
        self.closed = True

    def _where(self, key: ChunkKey, place: int) -> int | ChunkKey:
        return place if self.slots else key

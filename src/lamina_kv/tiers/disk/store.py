"""One rank's part of a store, opened: a slab and its heads.

Crash safety rests on what an object is: its header names the chunk and its checksum proves every
byte, so the data room finds out whatever a crash has mixed up, and a head never has to be true. A
chunk counts as kept when its object and its head are durable, which one ``fdatasync`` of the one
file says of both. So a batch is written with one sync, and nothing is synced before it: what a
crash in between leaves is a head without its object, or an object without its head. Both are
misses.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import numpy as np
import numpy.typing as npt

from lamina_kv.keys import key_array
from lamina_kv.plan import ChunkKey, StoredChunks
from lamina_kv.quantities import size_of
from lamina_kv.tiers.contract import Fate, Piece, StoreError, Tenant, Traits
from lamina_kv.tiers.disk import directory
from lamina_kv.tiers.disk.aio import Operation
from lamina_kv.tiers.disk.config import DiskConfig
from lamina_kv.tiers.disk.data import Slab
from lamina_kv.tiers.disk.directory import Shard
from lamina_kv.tiers.disk.file_system import concern
from lamina_kv.tiers.disk.heads import Heads
from lamina_kv.tiers.disk.layout import Layout
from lamina_kv.tiers.disk.lock import StoreLost, Watch, hold
from lamina_kv.tiers.disk.mending import open_slab
from lamina_kv.tiers.disk.room import (
    LOCK_PATIENCE,
    OUT_OF_SPACE,
    NoRoom,
    Server,
    check_room,
    make_room,
)
from lamina_kv.tiers.objects import row_bytes
from lamina_kv.tiers.once import Once
from lamina_kv.values import format_size

log = logging.getLogger("lamina_kv.tiers")

TRAITS = Traits(readers=2, batch=32)
"""Two readers: while one waits for Python's interpreter lock, the other keeps the disk busy."""

_PASSING = (
    errno.EAGAIN,
    errno.ECANCELED,
    errno.EINTR,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
"""Errors that say that the machine could not read just now, and nothing about the disk."""

_REFUSED = (*OUT_OF_SPACE, errno.EROFS, errno.EACCES, errno.EPERM)


def open_store(config: DiskConfig, tenant: Tenant) -> DiskStore:
    """Open a rank's part of a store, and keep it from everybody else.

    What other models left in the store is removed, least recently used first, as far as the
    capacity demands. What this model left is there again. What a damaged, shortened or differently
    laid out file has lost is said in a warning.

    Args:
        config: the tier. Its capacity is allocated here, not when it is needed.
        tenant: for whom.

    Raises:
        StoreError: if the store cannot be used: it is another server's, of another format, not
            writable, or the disk is full; or the capacity is less than one chunk.
    """
    layout = Layout(tenant.object_bytes, config.capacity // tenant.object_bytes)
    if not layout.slots:
        raise StoreError(
            f"{config.key('capacity')}: {format_size(config.capacity)} for each rank is less than "
            f"one chunk, which takes {size_of(tenant.object_bytes)} on disk: use at least "
            f"{format_size(tenant.object_bytes)}, or smaller chunks (chunk_tokens)"
        )
    try:
        return _open(config, tenant, layout)
    except NoRoom as error:
        raise StoreError(f"{config.key('capacity')}: {error}") from error
    except StoreError as error:
        raise StoreError(f"{config.key('path')}: {error}") from error
    except OSError as error:
        raise StoreError(f"{config.key('path')}: cannot use {config.path}: {error}") from error


class DiskStore:
    """A :class:`~lamina_kv.tiers.contract.Store` on the local disk; see the module.

    If a file is deleted, moved or replaced, nothing more is written: it would be lost, or be in
    the way of whoever has the place now. What is stored can still be read, as the file is open.

    Timeouts are not looked at: I/O that a disk has begun cannot be taken back.

    Args:
        name: the tier's.
        slab: where the bytes are.
        heads: which chunks they are.
        watch: whether the files are still there.
        opened: closes all of it.

    Attributes:
        traits: see the protocol.
        slots: see there.
    """

    def __init__(
        self, name: str, slab: Slab, heads: Heads, watch: Watch, opened: ExitStack
    ) -> None:
        self.traits = TRAITS
        self.slots = slab.layout.slots
        self._name = name
        self._slab = slab
        self._heads = heads
        self._watch = watch
        self._opened = opened
        self._is_lost = False
        self._once = Once()

    def stored(self, *, keys: bool) -> StoredChunks:
        """See the protocol."""
        return self._heads.stored(keys=keys)

    def find(self, keys: Sequence[ChunkKey], timeout: float) -> None:
        """See the protocol: what is in which slot is control's to know."""

    def probe(self, timeout: float) -> bool:
        """See the protocol. A block is read from the disk. That the file is another one by now is
        for the writer to notice."""
        return not self._is_lost and self._slab.is_readable()

    def read(self, pieces: Sequence[Piece], timeout: float) -> list[Fate]:
        """See the protocol. Neighbouring slots are best given in order."""
        slots, keys = _slots_of(pieces), _keys_of(pieces)
        errors = np.full(len(pieces), errno.ENOENT, np.int32)
        held = np.flatnonzero(self._heads.holds(slots, keys))
        buffers = [pieces[i].buffer for i in held.tolist()]
        errors[held] = self._slab.move_objects(Operation.READ, slots[held], buffers)
        if not errors.any():
            return [Fate.DONE] * len(pieces)
        self._warn("read", errors[held])
        return [
            Fate.DONE if not error else Fate.DOWN if error in _PASSING else Fate.GONE
            for error in errors.tolist()
        ]

    def write(self, pieces: Sequence[Piece], timeout: float) -> list[Fate]:
        """See the protocol. A batch costs one sync, however large it is."""
        slots, keys = _slots_of(pieces), _keys_of(pieces)
        buffers = [piece.buffer for piece in pieces]
        self._heads.erase(slots)
        if not self._is_there():
            return [Fate.DOWN] * len(pieces)
        # Not synced: a kill leaves no head of what is overwritten, and a power failure may.
        self._heads.write()
        errors = self._slab.move_objects(Operation.WRITE, slots, buffers)
        good = errors == 0
        lengths = np.array([row_bytes(buffer) for buffer in buffers], np.int64)
        self._heads.enter(slots[good], keys[good], lengths[good])
        errors[good] = self._commit(slots[good])
        if errors.any():
            self._heads.erase(slots[errors != 0])
            self._warn("written", errors)
        self._heads.show(slots[errors == 0])
        return [
            Fate.DONE if not error else Fate.REFUSED if error in _REFUSED else Fate.DOWN
            for error in errors.tolist()
        ]

    def drop(self, slots: Sequence[int]) -> None:
        """See the protocol. Not synced: what comes back after a power failure is verified again."""
        self._heads.erase(np.array(slots, np.int64))
        if self._is_there() and (error := self._heads.write()):
            self._warn("written", np.array([error]))

    def touch(self, uses: Sequence[tuple[ChunkKey, int]]) -> None:
        """See the protocol. Written with what is written next, or some time later."""
        slots = np.array([slot for _, slot in uses], np.int64)
        there = self._heads.holds(slots, key_array([key for key, _ in uses]))
        self._heads.touch(slots[there])
        if self._heads.recency_is_due and self._is_there():
            self._heads.write_recency()

    def close(self) -> None:
        """See the protocol."""
        if self._slab.is_open and self._is_there():
            self._heads.write()
            self._heads.write_recency()
            with suppress(OSError):
                self._slab.sync()
        self._opened.close()

    # -- inside ------------------------------------------------------------------------------------

    def _commit(self, slots: npt.NDArray[np.int64]) -> int:
        """Make what was written and entered durable. Returns 0 or an errno."""
        if error := self._heads.write(slots):
            return error
        try:
            self._slab.sync()
        except OSError as failed:
            return failed.errno or errno.EIO
        return 0 if self._is_there() else errno.ESTALE

    def _is_there(self) -> bool:
        """Whether the store is still the one that was opened; said once if not."""
        if not self._is_lost:
            try:
                self._watch.check()
            except StoreLost as error:
                self._is_lost = True
                log.warning("tier %s: %s", self._name, error.strerror)
        return not self._is_lost

    def _warn(self, verb: str, errors: npt.NDArray[np.int32]) -> None:
        """Say each kind of error once."""
        for error in np.unique(errors).tolist():
            told = error in (0, errno.ECANCELED, errno.ESTALE)  # elsewhere, if at all
            if not told and self._once.first(verb, error):
                log.warning(
                    "tier %s: chunks in %s cannot be %s (%s): each is a miss, and serving goes on. "
                    "This is said once; look at the disk if the tier's failures go up",
                    self._name,
                    self._slab.path,
                    verb,
                    os.strerror(error),
                )


def _open(config: DiskConfig, tenant: Tenant, layout: Layout) -> DiskStore:
    began = time.monotonic()
    path = config.path
    directory.prepare(path)
    with ExitStack() as opened:
        (lock,) = opened.enter_context(hold(path, [tenant.rank], LOCK_PATIENCE))
        if (found := concern(path)) is not None:
            log.warning("tier %s: %s: %s", config.name, found.found, found.advice)
        shard = Shard(directory.describe(path, tenant.namespace, tenant.description), tenant.rank)
        server = Server(tenant.ranks, lock.before)
        make_room(path, shard, layout.slots * layout.object_bytes, config.capacity, server)
        check_room(shard.slab, layout.file_bytes)
        slab, heads = open_slab(config, shard.slab, layout, opened, alone=tenant.ranks == 1)
        directory.sync_directories(path, shard.directory)
        watch = Watch(lock, [(shard.slab, slab.stat())])
        store = DiskStore(config.name, slab, heads, watch, opened.pop_all())
    log.info(
        "tier %s: %s in %s, %d of them stored, %s I/O, opened in %.1f s",
        config.name,
        layout,
        shard.slab,
        len(heads),
        "direct" if slab.direct else "buffered",
        time.monotonic() - began,
    )
    return store


def _slots_of(pieces: Sequence[Piece]) -> npt.NDArray[np.int64]:
    return np.array([piece.place for piece in pieces], np.int64)


def _keys_of(pieces: Sequence[Piece]) -> npt.NDArray[np.uint8]:
    return key_array([piece.key for piece in pieces])

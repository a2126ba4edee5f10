"""One rank's part of one namespace: a slab and its index, kept in agreement.

Crash safety rests on one order. A slot that is to be overwritten is durably forgotten first; its
new bytes are durable before the index names them; and the index names them with their checksums.
So at any moment the index names only what is whole, and where a disk does not keep even that
promise, the checksum tells.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from lamina.data.tiers.disk_aio import Integers
from lamina.data.tiers.disk_checksum import Bytes, Checksums, agree, checksum
from lamina.data.tiers.disk_index import DiskIndex, ShardLayout, key_array
from lamina.data.tiers.disk_lock import StoreLost, Watch
from lamina.data.tiers.disk_slab import Extent, Slab
from lamina.data.tiers.disk_table import ChunkTable
from lamina.geometry import DIRECT_IO_ALIGNMENT
from lamina.plan import ChunkKey, StoredChunk

log = logging.getLogger("lamina.data")


_PASSING = (
    errno.EAGAIN,
    errno.ECANCELED,
    errno.EINTR,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
"""Errors that say that the machine could not read just now, and nothing about the disk."""


class ReadFailure(StrEnum):
    """Why an extent was not delivered."""

    OTHER_KEY = "other_key"
    """The slot does not hold the chunk that was asked for."""
    IO_ERROR = "io_error"
    """The disk did not give all of the bytes."""
    CHECKSUM = "checksum"
    """The bytes are not those that were written."""


@dataclass(frozen=True, slots=True)
class RowRead:
    """One row of some chunks, read back. Masks have one element for each chunk.

    Attributes:
        good: the slot holds that chunk and the bytes are those that were written.
        damaged: it is not there, or not as it was written, or the disk cannot read it. What is
            neither could only not be read this time.
        failure: what happened to one that is not good; None if all are.
    """

    good: npt.NDArray[np.bool_]
    damaged: npt.NDArray[np.bool_]
    failure: ReadFailure | None


class ShardReader:
    """Chunks in slots, to be read. Threads may read at once, and while another thread, or another
    process, writes other slots.

    Args:
        layout: of the slab.
        slab: where the bytes are; the caller closes it.
        table: what they are.
    """

    def __init__(self, layout: ShardLayout, slab: Slab, table: ChunkTable) -> None:
        self._layout = layout
        self._slab = slab
        self._table = table
        self._failures: Counter[ReadFailure] = Counter()
        self._counting = threading.Lock()

    @property
    def slots(self) -> int:
        """Chunks that fit."""
        return self._layout.slots

    @property
    def direct(self) -> bool:
        """Whether the page cache is bypassed."""
        return self._slab.direct

    @property
    def failures(self) -> dict[ReadFailure, int]:
        """Extents that could not be delivered, by kind."""
        with self._counting:
            return dict(self._failures)

    def stored(self) -> tuple[StoredChunk, ...]:
        """Every chunk that can be read."""
        return self._table.stored()

    def read_row(
        self, row: int, slots: Sequence[int], keys: Sequence[ChunkKey], into: Bytes
    ) -> RowRead:
        """Read one row of some chunks and verify it.

        Args:
            row: the row.
            slots: where the chunks are, ``n`` of them. Neighbours are best given in order.
            keys: which chunks they are.
            into: shape ``(n, extent_bytes[row])``, C-contiguous, aligned to
                :data:`~lamina.geometry.DIRECT_IO_ALIGNMENT`. What is not delivered is undefined.

        Returns:
            Which of them were delivered. What goes wrong with the disk is said here and counted,
            never raised.

        Raises:
            ValueError: if ``into`` is not as described.
        """
        self._check_target(row, len(slots), into)
        where, names = np.array(slots, np.int64), key_array(keys)
        held = self._table.holds(where, names)
        expected = self._table.checksums(row, where, names)
        failed = self._slab.read(row, where, into)
        read = held & (failed == 0)
        if read.all():
            good = agree(into, expected)
        else:
            good = read.copy()
            good[read] = agree(into[read], expected[read])
        if good.all():
            return RowRead(good, ~good, None)
        damaged = ~good & ~(held & np.isin(failed, _PASSING))
        broken = held & (failed != 0)
        self._count(ReadFailure.OTHER_KEY, row, where[~held])
        self._count(ReadFailure.IO_ERROR, row, where[broken], failed[broken])
        self._count(ReadFailure.CHECKSUM, row, where[read & ~good])
        if broken.any():
            return RowRead(good, damaged, ReadFailure.IO_ERROR)
        return RowRead(good, damaged, ReadFailure.CHECKSUM if held.all() else ReadFailure.OTHER_KEY)

    def note_used(self, slots: Sequence[int]) -> None:
        """These slots were of use just now. A reader notes nothing: who keeps the index has loaded
        the same chunks."""

    # -- inside ------------------------------------------------------------------------------

    def _check_target(self, row: int, count: int, into: Bytes) -> None:
        wanted = (count, self._layout.extent_bytes[row])
        if into.shape != wanted or into.dtype != np.uint8 or not into.flags.c_contiguous:
            raise ValueError(f"row {row} is read into C-contiguous uint8 of shape {wanted}")
        if into.ctypes.data % DIRECT_IO_ALIGNMENT:
            raise ValueError(f"rows are read to multiples of {DIRECT_IO_ALIGNMENT} bytes")

    def _count(
        self,
        kind: ReadFailure,
        row: int,
        slots: Integers,
        errors: npt.NDArray[np.int32] | None = None,
    ) -> None:
        if not slots.size:
            return
        with self._counting:
            first = kind not in self._failures
            self._failures[kind] += int(slots.size)
        log.log(
            logging.WARNING if first else logging.DEBUG,
            "disk tier: %s in row %d of slots %s%s; these chunks are misses%s",
            kind.value,
            row,
            slots.tolist(),
            "" if errors is None else f" ({os.strerror(int(errors[0]))})",
            " (said once, then counted)" if first else "",
        )


class DiskShard(ShardReader):
    """Chunks in slots, to be read and written; changes come from one thread at a time.

    Once a file is gone (see :class:`~lamina.data.tiers.disk_lock.Watch`) nothing is written any
    more. What is stored can still be read: the files are open, and every extent is verified.

    Args:
        layout: of the slab.
        slab: where the bytes are; the caller closes it.
        index: what they are; the caller closes it.
        watch: whether the files are still there.
    """

    def __init__(self, layout: ShardLayout, slab: Slab, index: DiskIndex, watch: Watch) -> None:
        super().__init__(layout, slab, index)
        self._index = index
        self._watch = watch
        self._lost: StoreLost | None = None
        self._pending: dict[int, dict[int, int]] = {}

    def begin(self, slots: Sequence[int]) -> None:
        """Durably forget what these slots hold; they may be written from now on.

        Raises:
            OSError: if that could not be made durable; the slots must not be written then.
            StoreLost: if a file of the store is gone.
        """
        self._see_that_it_is_there()
        self._index.forget(np.array(slots, np.int64))
        self._pending.update((slot, {}) for slot in slots)

    def write_row(self, row: int, slots: Sequence[int], extents: Sequence[Extent]) -> None:
        """Write one row of slots that were begun.

        Args:
            row: the row.
            slots: ``n`` of them. Neighbours are best given in order.
            extents: ``n`` times ``extent_bytes[row]`` contiguous bytes; written without a copy
                where they are aligned to :data:`~lamina.geometry.DIRECT_IO_ALIGNMENT`.

        Raises:
            OSError: if the disk did not take them.
            ValueError: if a slot was not begun or an extent has another size.
        """
        arrays = [np.frombuffer(extent, np.uint8) for extent in extents]
        if any(len(array) != self._layout.extent_bytes[row] for array in arrays):
            raise ValueError(f"an extent of row {row} has {self._layout.extent_bytes[row]} bytes")
        pending = [self._begun(slot) for slot in slots]
        self._slab.write(row, np.array(slots, np.int64), arrays)
        for sums, array in zip(pending, arrays, strict=True):
            sums[row] = checksum(array)

    def commit(self, chunks: Sequence[tuple[int, ChunkKey]]) -> None:
        """Make chunks durable and readable: every row of their slots has been written.

        Args:
            chunks: slots, and the keys of the chunks in them.

        Raises:
            OSError: if that failed; the chunks are not there then.
            StoreLost: if a file of the store is gone.
            ValueError: if a slot was not begun or lacks rows.
        """
        rows = range(len(self._layout.extent_bytes))
        pending = [self._begun(slot) for slot, _ in chunks]
        if any(len(sums) < len(rows) for sums in pending):
            raise ValueError("a chunk can be committed only when all of its rows are written")
        sums: Checksums = np.array([[found[row] for row in rows] for found in pending], np.uint32)
        self._slab.sync()
        self._see_that_it_is_there()
        slots = np.array([slot for slot, _ in chunks], np.int64)
        self._index.record(slots, key_array([key for _, key in chunks]), sums)
        for slot, _ in chunks:
            del self._pending[slot]

    def drop(self, slots: Sequence[int]) -> None:
        """Forget what these slots hold, so that it does not come back after a restart either.

        Where the index cannot be written, as on a full disk, the bytes themselves are spoilt, which
        takes no room; and where that fails, too, the index is deleted. A slot that was begun in
        vain holds nothing since; if that comes back, it is whole and only of an earlier time.

        Raises:
            OSError: if nothing of this was possible; the text says what to do.
        """
        where = np.array(slots, np.int64)
        held = self._index.hide(where)
        try:
            self._see_that_it_is_there()
        except StoreLost:
            return  # with all that could come back, or it is another server's now
        try:
            self._index.forget(where)
        except OSError as error:
            if held.size:
                self._spoil(held, error)

    def note_used(self, slots: Sequence[int]) -> None:
        """These slots were of use just now; orders eviction after a restart."""
        self._index.note_used(np.array(slots, np.int64))

    def _spoil(self, slots: Integers, reason: OSError) -> None:
        try:
            self._slab.spoil(slots)
        except OSError as error:
            self._lost = self._index.delete(f"{reason}; {error}")
            log.warning("disk tier: %s", self._lost.strerror)

    def _see_that_it_is_there(self) -> None:
        """Look whether the store is still the one that was opened; said once if not."""
        if self._lost is not None:
            raise self._lost
        try:
            self._watch.check()
        except StoreLost as error:
            self._lost = error
            log.warning("disk tier: %s", error.strerror)
            raise

    def _begun(self, slot: int) -> dict[int, int]:
        try:
            return self._pending[slot]
        except KeyError:
            raise ValueError(f"slot {slot} is written before it was begun") from None

"""The slab: one preallocated file of extents, laid out ``[row][slot][extent]``.

Every extent starts at a multiple of :data:`~lamina.geometry.DIRECT_IO_ALIGNMENT`, and neighbouring
slots of one row are neighbours in the file.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lamina.data.tiers.disk_aio import AioQueue, Integers, Operation, UnendedIO
from lamina.data.tiers.disk_checksum import Bytes
from lamina.data.tiers.file_system import reserve
from lamina.geometry import DIRECT_IO_ALIGNMENT, align_up

log = logging.getLogger("lamina.data")

Extent = memoryview | Bytes


def aligned_memory(size: int) -> Bytes:
    """A uint8 array of ``size`` bytes that starts at a page, fit for direct I/O."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, align_up(max(size, 1)), flags), np.uint8)[:size]


def chunk_on_disk(extent_bytes: Sequence[int]) -> int:
    """Bytes that one chunk takes in a slab."""
    return sum(map(align_up, extent_bytes))


class Slab:
    """A slab that exists, opened. Threads may read and write different extents at once.

    Args:
        path: the file.
        extent_bytes: per row, bytes of one extent.
        slots: extents in each row.
        direct: bypass the page cache; None: where the file system can.
        writable: whether it is written, too.

    Raises:
        OSError: if the file cannot be opened, or ``direct`` is True and it cannot be.
    """

    def __init__(
        self,
        path: Path,
        extent_bytes: Sequence[int],
        slots: int,
        direct: bool | None,
        *,
        writable: bool = True,
    ) -> None:
        self._extent_bytes = tuple(extent_bytes)
        self._strides = tuple(map(align_up, extent_bytes))
        self._bases = tuple(accumulate((s * slots for s in self._strides), initial=0))
        self._queues: deque[AioQueue] = deque([AioQueue()])
        self._lent: list[object] = []
        self._said: set[int | None] = set()
        self._file, self.direct = _open(path, direct, os.O_RDWR if writable else os.O_RDONLY)

    def read(self, row: int, slots: Integers, into: Bytes) -> npt.NDArray[np.int32]:
        """Read one row of some slots.

        Args:
            row: the row.
            slots: which slots, shape ``(n,)``.
            into: C-contiguous, shape ``(n, extent_bytes[row])``, aligned to
                :data:`~lamina.geometry.DIRECT_IO_ALIGNMENT`.

        Returns:
            Shape ``(n,)``: 0 where the whole extent was read, else an errno; ``ECANCELED`` where
            the machine and not the disk is the reason.
        """
        size = stride = self._extent_bytes[row]
        target = into
        if self.direct and size % DIRECT_IO_ALIGNMENT:
            size = stride = self._strides[row]
            target = aligned_memory(len(slots) * stride).reshape(-1, stride)
        addresses = _address(target) + stride * np.arange(len(slots))
        try:
            failed = self._run(Operation.READ, row, slots, addresses, size, (target, into))
        except OSError as error:
            if error.errno not in self._said:
                self._said.add(error.errno)
                log.warning("disk tier: nothing can be read: %s (said once)", error)
            return np.full(len(slots), errno.ECANCELED, np.int32)
        if target is not into:
            into[:] = target[:, : into.shape[1]]
        return failed

    def write(self, row: int, slots: Integers, extents: Sequence[Bytes]) -> None:
        """Write one row of some slots; not durable before :meth:`sync`.

        Extents that are not aligned to :data:`~lamina.geometry.DIRECT_IO_ALIGNMENT` are copied
        first where the page cache is bypassed.

        Raises:
            OSError: if any extent was not written whole.
        """
        size = self._extent_bytes[row]
        addresses = np.array([_address(extent) for extent in extents], np.int64)
        if self.direct and (size % DIRECT_IO_ALIGNMENT or (addresses % DIRECT_IO_ALIGNMENT).any()):
            copies = aligned_memory(len(extents) * self._strides[row]).reshape(len(extents), -1)
            for copy, extent in zip(copies, extents, strict=True):
                copy[:size] = extent
            size = self._strides[row]
            extents = list(copies)
            addresses = _address(copies) + size * np.arange(len(extents))
        failed = self._run(Operation.WRITE, row, slots, addresses, size, extents)
        if failed.any():
            number = int(failed[failed != 0][0])
            raise OSError(number, f"cannot write to the disk tier: {os.strerror(number)}")

    def spoil(self, slots: Integers) -> None:
        """Durably overwrite a part of what these slots hold, so that it is never taken for what it
        was. Needs no space on the disk where extents are overwritten in place.

        Raises:
            OSError: if that failed for any of them.
        """
        noise = aligned_memory(DIRECT_IO_ALIGNMENT)
        noise[:] = np.frombuffer(os.urandom(len(noise)), np.uint8)
        addresses = np.full(len(slots), _address(noise))
        failed = self._run(Operation.WRITE, 0, slots, addresses, len(noise), noise)
        if failed.any():
            number = int(failed[failed != 0][0])
            raise OSError(number, f"cannot overwrite the disk tier: {os.strerror(number)}")
        self.sync()

    def stat(self) -> os.stat_result:
        """What the open file is."""
        return os.fstat(self._file)

    def sync(self) -> None:
        """Make what was written durable.

        Raises:
            OSError: if that failed; what was written since the last success may be lost.
        """
        os.fdatasync(self._file)

    def close(self) -> None:
        """Close the file; no read or write may be under way. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        while self._queues:
            self._queues.popleft().close()

    def _run(
        self,
        operation: Operation,
        row: int,
        slots: Integers,
        addresses: Integers,
        size: int,
        memory: object,
    ) -> npt.NDArray[np.int32]:
        """Move ``size`` bytes for each slot; ``memory`` is what has the addresses in it.

        Raises:
            OSError: if nothing was moved, for want of a queue.
            UnendedIO: if the kernel may use ``memory`` at any time from now on. It is kept, and as
                nothing is read or written any more, nobody uses it for anything else.
        """
        if self._lent:
            raise OSError(errno.ECANCELED, "the disk tier is out of use until a restart")
        try:
            queue = self._queues.popleft()
        except IndexError:
            queue = AioQueue()
        try:
            offsets = self._bases[row] + slots * self._strides[row]
            sizes = np.full(len(slots), size, np.int64)
            return queue.run(operation, self._file, offsets, addresses, sizes)
        except UnendedIO as error:
            self._lent.append(memory)
            log.warning(
                "disk tier: %s: it is out of use until this server is restarted, and the memory "
                "that was read or written is kept for the kernel. Where system calls are filtered, "
                "allow io_getevents and io_destroy",
                error,
            )
            raise
        finally:
            if queue.usable:
                self._queues.append(queue)


def allocate(path: Path, size: int) -> bool:
    """Make the file ``path`` at least ``size`` bytes, reserved on the disk where the file system
    can. Changes no byte that is there.

    Returns:
        Whether they are reserved.

    Raises:
        OSError: if there is no room; the file is as it was then, and gone if this call made it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        file, made = os.open(path, flags | os.O_EXCL, 0o600), True
    except FileExistsError:
        file, made = os.open(path, flags), False
    before = os.fstat(file).st_size
    try:
        reserved = reserve(file, size)
        if os.fstat(file).st_size < size:
            os.ftruncate(file, size)
        os.fsync(file)
    except BaseException:
        with suppress(OSError):
            if made:
                path.unlink()
            elif before < size:
                os.ftruncate(file, before)
        raise
    finally:
        os.close(file)
    return reserved


def _open(path: Path, direct: bool | None, access: int) -> tuple[int, bool]:
    flags = access | os.O_CLOEXEC
    if direct is False:
        return os.open(path, flags), False
    try:
        file = os.open(path, flags | os.O_DIRECT)
        try:
            with mmap.mmap(-1, DIRECT_IO_ALIGNMENT) as page:
                os.preadv(file, [page], 0)
        except OSError:
            os.close(file)
            raise
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        if direct:
            raise OSError(
                errno.EINVAL,
                f"disk.direct is on, but {path.parent} is on a file system without direct I/O: "
                "set it to 'auto', or use a local file system such as ext4 or xfs",
            ) from error
        log.warning("%s: no direct I/O on this file system, using the page cache", path)
        return os.open(path, flags), False
    return file, True


def _address(array: Bytes) -> int:
    return int(array.__array_interface__["data"][0])

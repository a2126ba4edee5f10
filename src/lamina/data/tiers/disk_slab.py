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
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lamina.data.tiers.disk_aio import AioQueue, Integers, Operation
from lamina.data.tiers.disk_checksum import Bytes
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
        self._file, self.direct = _open(path, direct, os.O_RDWR if writable else os.O_RDONLY)

    def read(self, row: int, slots: Integers, into: Bytes) -> npt.NDArray[np.int32]:
        """Read one row of some slots.

        Args:
            row: the row.
            slots: which slots, shape ``(n,)``.
            into: C-contiguous, shape ``(n, extent_bytes[row])``, aligned to
                :data:`~lamina.geometry.DIRECT_IO_ALIGNMENT`.

        Returns:
            Shape ``(n,)``: 0 where the whole extent was read, else an errno.
        """
        size = stride = self._extent_bytes[row]
        target = into
        if self.direct and size % DIRECT_IO_ALIGNMENT:
            size = stride = self._strides[row]
            target = aligned_memory(len(slots) * stride).reshape(-1, stride)
        addresses = _address(target) + stride * np.arange(len(slots))
        try:
            failed = self._run(Operation.READ, row, slots, addresses, size)
        except OSError as error:  # no queue, and so nothing was read
            failed = np.full(len(slots), error.errno, np.int32)
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
            addresses = _address(copies) + size * np.arange(len(extents))
        failed = self._run(Operation.WRITE, row, slots, addresses, size)
        if failed.any():
            number = int(failed[failed != 0][0])
            raise OSError(number, f"cannot write to the disk tier: {os.strerror(number)}")

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
        self, operation: Operation, row: int, slots: Integers, addresses: Integers, size: int
    ) -> npt.NDArray[np.int32]:
        try:
            queue = self._queues.popleft()
        except IndexError:
            queue = AioQueue()
        try:
            offsets = self._bases[row] + slots * self._strides[row]
            sizes = np.full(len(slots), size, np.int64)
            return queue.run(operation, self._file, offsets, addresses, sizes)
        finally:
            self._queues.append(queue)


def allocate(path: Path, size: int) -> None:
    """Make the file ``path`` exactly ``size`` bytes, all of them reserved on the disk.

    Raises:
        OSError: if there is no room; the file is gone then.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, size)
        os.posix_fallocate(file, 0, size)
        os.fsync(file)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(file)


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

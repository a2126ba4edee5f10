"""A slab as a file: made, opened, read and written in batches."""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lamina_kv.geometry import DIRECT_IO_ALIGNMENT
from lamina_kv.tiers.disk.aio import AioQueue, Operation
from lamina_kv.tiers.disk.file_system import reserve
from lamina_kv.tiers.disk.layout import BLOCK, Integers, Layout, decode_label, encode_label
from lamina_kv.tiers.objects import Object, aligned_memory
from lamina_kv.tiers.once import Once

log = logging.getLogger("lamina_kv.tiers")

Errors = npt.NDArray[np.int32]
"""One for each request: 0, or an errno. ``ECANCELED``: the machine is the reason, not the disk."""


class Slab:
    """A slab, opened. Threads may read and write different places at once.

    Args:
        path: the file; made, empty, if it is not there.
        layout: where in it is what.
        direct: bypass the page cache; None: where the file system can.
        writable: whether it is written, too.

    Attributes:
        layout: see there.
        path: see there.
        direct: whether the page cache is bypassed.

    Raises:
        OSError: if the file cannot be opened, or ``direct`` is True and it cannot be.
    """

    def __init__(
        self, path: Path, layout: Layout, direct: bool | None, *, writable: bool = True
    ) -> None:
        self.path = path
        self.layout = layout
        self._queues: deque[AioQueue] = deque()
        self._once = Once()
        access = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        self._file, self.direct = _open(path, direct, access)
        try:
            self._queues.append(AioQueue())
        except OSError:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether it is not closed yet."""
        return self._file >= 0

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file).st_size

    def stat(self) -> os.stat_result:
        """What the open file is."""
        return os.fstat(self._file)

    def move_objects(
        self, operation: Operation, slots: Integers, buffers: Sequence[Object]
    ) -> Errors:
        """Read or write the objects of some slots, one request each.

        Args:
            operation: which way.
            slots: shape ``(n,)``.
            buffers: one a slot, of ``object_bytes`` each.

        Raises:
            ValueError: if a buffer is not as large, not contiguous or not aligned to
                :data:`~lamina_kv.geometry.DIRECT_IO_ALIGNMENT`.
        """
        size = self.layout.object_bytes
        addresses = np.array([address_of(buffer) for buffer in buffers], np.int64)
        fit = all(b.nbytes == size and b.flags.c_contiguous for b in buffers)
        if not fit or (addresses % DIRECT_IO_ALIGNMENT).any():
            raise ValueError(
                f"an object is moved to or from {size} contiguous bytes that begin at a multiple "
                f"of {DIRECT_IO_ALIGNMENT}"
            )
        return self.move(operation, self.layout.objects(slots), addresses, size)

    def move(
        self, operation: Operation, offsets: Integers, addresses: Integers, size: int
    ) -> Errors:
        """Read or write ``size`` bytes at each of some places. The caller keeps the memory.

        Args:
            operation: which way.
            offsets: bytes from the start of the file, shape ``(n,)``.
            addresses: of memory, shape ``(n,)``.
            size: bytes. All three are multiples of
                :data:`~lamina_kv.geometry.DIRECT_IO_ALIGNMENT`.

        Returns:
            See :data:`Errors`. The end of the file is ``ENODATA``.
        """
        queue = None
        try:
            queue = self._take_queue()
            sizes = np.full(len(offsets), size, np.int64)
            return queue.run(operation, self._file, offsets, addresses, sizes)
        except OSError as error:
            if self._once.first(error.errno):
                log.warning("%s: cannot be read or written now: %s", self.path, error)
            return np.full(len(offsets), errno.ECANCELED, np.int32)
        finally:
            if queue is not None and queue.usable:
                self._queues.append(queue)

    def write_label(self) -> None:
        """Say in the file how it is laid out.

        Raises:
            OSError: if that fails.
        """
        memory = aligned_memory(BLOCK)
        memory[:] = np.frombuffer(encode_label(self.layout), np.uint8)
        where = np.zeros(1, np.int64)
        (error,) = self.move(Operation.WRITE, where, where + address_of(memory), BLOCK).tolist()
        if error:
            raise OSError(error, os.strerror(error), str(self.path))

    def is_readable(self) -> bool:
        """Whether its first block can be read now."""
        memory = aligned_memory(BLOCK)
        where = np.zeros(1, np.int64)
        return not self.move(Operation.READ, where, where + address_of(memory), BLOCK).any()

    def sync(self) -> None:
        """Make what was written durable.

        Raises:
            OSError: if that fails; what was written since the last success may be lost.
        """
        os.fdatasync(self._file)

    def close(self) -> None:
        """Close the file; no read or write may be under way. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        while self._queues:
            self._queues.popleft().close()

    def _take_queue(self) -> AioQueue:
        with suppress(IndexError):
            return self._queues.popleft()
        return AioQueue()


def read_label(path: Path) -> Layout | None:
    """How the slab ``path`` says that it is laid out; None if there is no such file, or its first
    block is damaged."""
    try:
        with path.open("rb") as file:
            return decode_label(file.read(BLOCK))
    except FileNotFoundError:
        return None


def allocate(path: Path, size: int) -> bool:
    """Make the file ``path`` exactly ``size`` bytes, reserved on the disk where the file system
    can. Changes no byte before that.

    Returns:
        Whether they are reserved.

    Raises:
        OSError: if there is no room; the file has the size then that it had.
    """
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    before = os.fstat(file).st_size
    try:
        reserved = reserve(file, size)
        os.ftruncate(file, size)
        os.fsync(file)
    except BaseException:
        with suppress(OSError):
            os.ftruncate(file, before)
        raise
    finally:
        os.close(file)
    return reserved


def _open(path: Path, direct: bool | None, access: int) -> tuple[int, bool]:
    flags = access | os.O_CLOEXEC
    if direct is False:
        return os.open(path, flags, 0o600), False
    try:
        file = os.open(path, flags | os.O_DIRECT, 0o600)
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
                f"direct I/O is asked for, and {path.parent} is on a file system without it: set "
                "`direct` to 'auto', or use a local file system such as ext4 or xfs",
            ) from error
        log.warning("%s: no direct I/O on this file system, using the page cache", path)
        return os.open(path, flags, 0o600), False
    return file, True


def address_of(array: npt.NDArray[np.generic]) -> int:
    """Where an array begins in memory."""
    return int(array.__array_interface__["data"][0])

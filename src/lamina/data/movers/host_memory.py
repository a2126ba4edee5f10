"""Host memory that is there at once and fast soon.

A slab of many GiB must not delay the start of a server, and its first use must not pay for page
faults: they cost many times what the copy itself does. So the address space is reserved at once,
and a thread commits it piece by piece.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable

import torch

from lamina.data.shared_memory import MemoryFile, private_memory
from lamina.data.threads import Threads

log = logging.getLogger("lamina.data")

POPULATE_PIECE = 2 << 20
"""Bytes to make resident by one call of :func:`populate`, one huge page: while the call runs the
kernel lets no other thread of the process map memory."""

_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class HostMemory:
    """One mapping, on huge pages where the kernel has them.

    Children of a fork do not get it: a fork would otherwise copy its page tables, and the pages
    themselves where they are pinned.

    Args:
        size: bytes.
        piece: bytes committed at a time, a multiple of the page size.
        commit: given the address and length of a piece, makes it resident. Called from a thread
            of this object's own; must release the GIL while it works.
        file: memory that other processes have mapped or will map; None for private memory. Each
            commits it: what one has made resident costs the next next to nothing.
        threads: how the thread that commits it begins.

    Attributes:
        tensor: the memory, flat, uint8, zeros; the mapping lives as long as it does.

    Raises:
        ValueError: if ``size`` is not positive, or not the size of ``file``.
        OSError: if the machine has no such amount of memory.
    """

    def __init__(
        self,
        size: int,
        piece: int,
        commit: Callable[[int, int], None],
        file: MemoryFile | None = None,
        threads: Threads | None = None,
    ) -> None:
        if size <= 0:
            raise ValueError(f"host memory of {size} bytes")
        try:
            mapping = private_memory(size) if file is None else file.map(size, writable=True)
        except OSError as error:
            reason = f"{size} bytes of host memory cannot be reserved: lower host.capacity"
            raise OSError(error.errno, reason) from error
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        mapping.madvise(mmap.MADV_DONTFORK)
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        self._piece = piece
        self._commit = commit
        self._closing = threading.Event()
        self._committed = False
        self._error: BaseException | None = None
        self._thread = (threads or Threads()).start("host-memory", self._run, self._died)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the bytes of a contiguous host tensor are part of this memory."""
        start = tensor.data_ptr() - self.tensor.data_ptr()
        return start >= 0 and start + tensor.nbytes <= self.tensor.nbytes

    def wait(self) -> None:
        """Block until the whole memory has been committed.

        Raises:
            RuntimeError: if it could not be, or was closed before it was.
        """
        self._thread.join()
        if self._error is not None:
            raise RuntimeError(
                f"host memory of {self.tensor.nbytes} bytes could not be made resident "
                f"({self._error}): lower host.capacity"
            ) from self._error
        if not self._committed:
            raise RuntimeError("host memory was closed before it was resident")

    def close(self) -> None:
        """Commit no further piece; returns when none is being committed. Idempotent."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        base, size = self.tensor.data_ptr(), self.tensor.nbytes
        for start in range(0, size, self._piece):
            if self._closing.is_set():
                return
            self._commit(base + start, min(self._piece, size - start))
        self._committed = True

    def _died(self, error: BaseException) -> None:
        self._error = error
        log.warning(
            "host memory of %d bytes could not be made resident: %s", self.tensor.nbytes, error
        )


def populate(address: int, length: int) -> None:
    """Make memory resident; releases the GIL. Does nothing on a kernel older than Linux 5.14.

    Raises:
        OSError: if there is no memory.
    """
    if _libc.madvise(address, length, _MADV_POPULATE_WRITE) != 0:
        code = ctypes.get_errno()
        if code != errno.EINVAL:
            raise OSError(code, os.strerror(code))

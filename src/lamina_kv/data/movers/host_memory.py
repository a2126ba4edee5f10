"""Host memory: usable at once, resident or pinned in the background.

A slab of many GiB must not delay the start of a server, and its first use must not pay for page
faults: they cost many times what the copy itself does. So the address space is reserved at once,
and a thread commits it piece by piece, from its beginning on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable

import torch

from lamina_kv.data.shared_memory import MemoryFile, private_memory
from lamina_kv.data.threads import Threads

log = logging.getLogger("lamina_kv.data")

POPULATE_PIECE = 2 << 20
"""Bytes to make resident by one call of :func:`populate`, one huge page: while the call runs the
kernel lets no other thread of the process map memory."""

_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_mappings: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_of_parents: list[mmap.mmap] = []


def _keep_in_child() -> None:
    """In a forked child, never unmap what was its parent's.

    The child does not have that memory, so the kernel may give its addresses to something else
    there; unmapping them, once the child collects the parent's garbage, would take that away.
    """
    _of_parents.extend(_mappings)


os.register_at_fork(after_in_child=_keep_in_child)


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
        _mappings.add(mapping)
        mapping.madvise(mmap.MADV_DONTFORK)
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        self._piece = piece
        self._commit = commit
        self._closing = threading.Event()
        self._progress = threading.Condition()
        self._committed = 0
        self._ended = False
        self._error: BaseException | None = None
        self._thread = (threads or Threads()).start("host-memory", self._run, self._died)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the bytes of a contiguous host tensor are part of this memory."""
        start = tensor.data_ptr() - self.tensor.data_ptr()
        return start >= 0 and start + tensor.nbytes <= self.tensor.nbytes

    def wait(self, end: int | None = None) -> None:
        """Block until the first bytes of the memory have been committed.

        Args:
            end: how many; all if None.

        Raises:
            RuntimeError: if they could not be, or the memory was closed before they were.
        """
        size = self.tensor.nbytes
        wanted = size if end is None else end
        if self._committed >= wanted:
            return
        with self._progress:
            self._progress.wait_for(lambda: self._committed >= wanted or self._ended)
        if self._committed >= wanted:
            return
        if self._error is not None:
            raise RuntimeError(
                f"host memory of {size} bytes could not be made resident ({self._error}): lower "
                "host.capacity"
            ) from self._error
        raise RuntimeError("host memory was closed before it was resident")

    def close(self) -> None:
        """Commit no further piece; returns when none is being committed. Idempotent."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        base, size = self.tensor.data_ptr(), self.tensor.nbytes
        for start in range(0, size, self._piece):
            if self._closing.is_set():
                break
            length = min(self._piece, size - start)
            self._commit(base + start, length)
            with self._progress:
                self._committed = start + length
                self._progress.notify_all()
        self._end()

    def _died(self, error: BaseException) -> None:
        self._error = error
        log.warning(
            "host memory of %d bytes could not be made resident: %s", self.tensor.nbytes, error
        )
        self._end()

    def _end(self) -> None:
        with self._progress:
            self._ended = True
            self._progress.notify_all()


def populate(address: int, length: int) -> None:
    """Make memory resident; releases the GIL. Does nothing on a kernel older than Linux 5.14.

    Raises:
        OSError: if there is no memory.
    """
    if _libc.madvise(address, length, _MADV_POPULATE_WRITE) != 0:
        code = ctypes.get_errno()
        if code != errno.EINVAL:
            raise OSError(code, os.strerror(code))

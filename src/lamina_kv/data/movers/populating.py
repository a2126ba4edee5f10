"""Making host memory resident before its first use, by several threads.

The kernel zeroes a page at its first use. One core does so more slowly than a link to a GPU takes
the bytes, and the copy that meets the page waits for that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time

from lamina_kv.data.threads import Threads

PIECE = 2 << 20
"""Bytes to make resident by one call of :func:`populate`, one huge page: while the call runs the
kernel lets no other thread of the process map memory."""

MOST_THREADS, CORES_PER_THREAD = 4, 4
"""Threads at most, and cores for each: an engine starts beside them."""

_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Populating:
    """Makes a mapping resident from its beginning on.

    Args:
        address: of its first byte.
        size: its bytes.
        threads: how its threads begin. Memory that is bound to no NUMA node comes from that of
            their cores.
        count: how many; by default as many as the cores allow.

    Attributes:
        error: why not all of it can be made resident; None so far.
    """

    def __init__(self, address: int, size: int, threads: Threads, count: int | None = None) -> None:
        self.error: BaseException | None = None
        self._address = address
        self._size = size
        self._changed = threading.Condition()
        self._next = 0  # where the next piece begins
        self._under_way: set[int] = set()  # where pieces begin that threads are at
        self._resident = 0
        self._wanted = size  # bytes that somebody waits for
        self._over = False  # no further piece is begun
        if count is None:
            cores = len(threads.cores or ())
            count = max(1, min(MOST_THREADS, cores // CORES_PER_THREAD))
        self._threads = [threads.start("populate", self._run, self._died) for _ in range(count)]

    def await_first(self, end: int) -> int:
        """Wait until the first bytes are resident; for one thread at a time.

        Args:
            end: how many.

        Returns:
            How many of them are; fewer than ``end`` only if there will not be more.
        """
        with self._changed:
            self._wanted = end
            self._changed.wait_for(lambda: self._resident >= end or self._over)
            return min(self._resident, end)

    def end(self) -> None:
        """Begin no further piece."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def stop(self, timeout: float) -> bool:
        """Begin no further piece; idempotent. Returns whether those under way have ended within
        ``timeout`` seconds."""
        self.end()
        due = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, due - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (start := self._take()) is not None:
            populate(self._address + start, min(PIECE, self._size - start))
            with self._changed:
                self._under_way.remove(start)
                self._resident = min(self._under_way, default=self._next)
                if self._resident >= self._wanted:  # each piece is a moment: nobody wakes for one
                    self._changed.notify_all()

    def _take(self) -> int | None:
        with self._changed:
            start = self._next
            if self._over or start == self._size:
                return None
            self._next = min(start + PIECE, self._size)
            self._under_way.add(start)
            return start

    def _died(self, error: BaseException) -> None:
        # The piece stays under way, so that nothing behind it counts.
        self.error = self.error or error
        self.end()


def populate(address: int, length: int) -> None:
    """Make memory resident; releases the GIL. Does nothing on a kernel older than Linux 5.14.

    Raises:
        OSError: if there is no memory.
    """
    if _libc.madvise(address, length, _MADV_POPULATE_WRITE) != 0:
        code = ctypes.get_errno()
        if code != errno.EINVAL:
            raise OSError(code, os.strerror(code))

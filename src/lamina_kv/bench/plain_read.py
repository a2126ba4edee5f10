"""The floor of a disk hit: how fast plain tools read as many bytes from the same disk."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lamina_kv.geometry import DIRECT_IO_ALIGNMENT, align_up

_THREADS = (1, 2, 4, 8)
_PIECES = (1 << 20, 4 << 20, 8 << 20)
_RANDOM_BYTES = 64 << 20


class PlainFile:
    """A file of random bytes to be read, past the page cache if the file system can.

    Args:
        directory: where; on the disk that is to be measured.
        size: its size in bytes, rounded up to whole pages of direct I/O.

    Raises:
        OSError: if the disk is full or the directory cannot be written.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self._path = directory / "plain"
        self._size = align_up(size)
        noise = os.urandom(min(_RANDOM_BYTES, self._size))
        with self._path.open("wb") as file:
            for start in range(0, self._size, len(noise)):
                file.write(noise[: self._size - start])
            file.flush()
            os.fsync(file.fileno())
        self.direct = self._can_read_directly()
        self._times: dict[str, list[float]] = {}

    def read(self) -> None:
        """Read the file once in each of several ways: with 1 to 8 threads in pieces of 1 to 8 MiB,
        and with ``dd``."""
        for threads, piece in itertools.product(_THREADS, _PIECES):
            way = f"{threads} threads, pieces of {piece >> 20} MiB"
            self._times.setdefault(way, []).append(self._read_parallel(threads, piece))
        if (dd := shutil.which("dd")) is not None:
            self._times.setdefault("dd", []).append(self._read_with_dd(dd))

    def fastest(self) -> tuple[str, list[float]]:
        """The way with the smallest median so far, and its times in seconds, one for each call
        of :meth:`read`."""
        return min(self._times.items(), key=lambda item: statistics.median(item[1]))

    def _can_read_directly(self) -> bool:
        page = mmap.mmap(-1, DIRECT_IO_ALIGNMENT)
        try:
            with _opened(self._path, os.O_DIRECT) as descriptor:
                return os.preadv(descriptor, [page], 0) == min(len(page), self._size)
        except OSError:
            return False

    def _read_parallel(self, threads: int, piece: int) -> float:
        starts = iter(range(0, self._size, piece))
        lock = threading.Lock()

        def run() -> None:
            buffer = memoryview(mmap.mmap(-1, piece))
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                done = 0
                while done < min(piece, self._size - start):
                    done += os.preadv(descriptor, [buffer[done:]], start + done)

        drop_page_cache(self._path)
        with _opened(self._path, os.O_DIRECT if self.direct else 0) as descriptor:
            workers = [threading.Thread(target=run) for _ in range(threads)]
            began = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            return time.perf_counter() - began

    def _read_with_dd(self, dd: str) -> float:
        command = [dd, f"if={self._path}", "of=/dev/null", "bs=16M", "status=none"]
        if self.direct:
            command.append("iflag=direct")
        drop_page_cache(self._path)
        began = time.perf_counter()
        subprocess.run(command, check=True)
        return time.perf_counter() - began


def drop_page_cache(path: Path) -> None:
    """Make the page cache forget a file, or every file below a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with _opened(file, 0) as descriptor:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

"""Ways to do the disk tier's reads from inside a serving process, side by side.

A request is what the disk tier serves: one row of many chunks, that is ``--extents`` extents of
one size, read with O_DIRECT into one buffer; neighbouring (one run in the file) or scattered. For
every way of reading it measures, in random order and as medians over ``--rounds``:

- throughput alone, and the CPU seconds one GB costs;
- throughput beside a thread that does nothing but Python (a counter), and the share of its own
  speed that this thread keeps. That is the price in GIL time: an engine is such a thread.

    python bench/disk_io.py --path /var/lib/lamina

Ways that need a package that is not installed are skipped: ``liburing==2024.5.3`` (later ones
read into ``bytearray`` only, which cannot be aligned), ``nixl``. With ``--hash`` it measures
checksums instead: what covering one row's bytes costs, alone and beside the counter.
"""

# ruff: noqa: D102 - what an override does is said where it is declared

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import queue
import random
import resource
import shutil
import statistics
import subprocess
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from isal import isal_zlib

from lamina_kv.tiers.disk.aio import AioQueue, Operation

Offsets = npt.NDArray[np.int64]
Buffer = npt.NDArray[np.uint8]


def aligned(size: int) -> Buffer:
    """A page-aligned uint8 array of ``size`` bytes, touched."""
    array = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    array[:] = 1
    return array


class Reader(ABC):
    """One way to read the extents of a request; used from one thread."""

    @abstractmethod
    def read(self, offsets: Offsets) -> None:
        """Read the extents at ``offsets`` into the buffer given at construction, in order."""

    def close(self) -> None:  # noqa: B027
        """Give back what the reader holds."""


class Preadv(Reader):
    """``os.preadv``, one call for each run of neighbouring extents."""

    def __init__(self, fd: int, extent: int, buffer: Buffer) -> None:
        self._fd, self._extent, self._buffer = fd, extent, buffer.data

    def read(self, offsets: Offsets) -> None:
        cuts = np.flatnonzero(np.diff(offsets) != self._extent) + 1
        for first, last in itertools.pairwise([0, *cuts.tolist(), len(offsets)]):
            place, begin, end = int(offsets[first]), first * self._extent, last * self._extent
            while begin < end:
                done = os.preadv(self._fd, [self._buffer[begin:end]], place)
                begin, place = begin + done, place + done


class LinuxAio(Reader):
    """What the disk tier does: the whole request in one system call, laid out by numpy."""

    def __init__(self, fd: int, extent: int, buffer: Buffer) -> None:
        self._queue, self._fd = AioQueue(), fd
        count = len(buffer) // extent
        self._addresses = buffer.ctypes.data + extent * np.arange(count)
        self._sizes = np.full(count, extent)

    def read(self, offsets: Offsets) -> None:
        count = len(offsets)
        failed = self._queue.run(
            Operation.READ, self._fd, offsets, self._addresses[:count], self._sizes[:count]
        )
        if failed.any():
            raise OSError("an extent was not read")

    def close(self) -> None:
        self._queue.close()


class Liburing(Reader):
    """io_uring through the ``liburing`` package."""

    def __init__(self, fd: int, extent: int, buffer: Buffer) -> None:
        import liburing

        self._api: Any = liburing
        self._fd, self._extent, self._buffer = fd, extent, buffer.data
        self._ring = liburing.io_uring()
        self._cqe = liburing.io_uring_cqe()
        liburing.io_uring_queue_init(len(buffer) // extent, self._ring)

    def read(self, offsets: Offsets) -> None:
        api, ring, cqe, extent = self._api, self._ring, self._cqe, self._extent
        for index, offset in enumerate(offsets.tolist()):
            part = self._buffer[index * extent : (index + 1) * extent]
            api.io_uring_prep_read(api.io_uring_get_sqe(ring), self._fd, part, extent, offset)
        api.io_uring_submit_and_wait(ring, len(offsets))
        for _ in range(len(offsets)):
            api.io_uring_peek_cqe(ring, cqe)
            if cqe.res != extent:
                raise OSError("short read")
            api.io_uring_cqe_seen(ring, cqe)

    def close(self) -> None:
        self._api.io_uring_queue_exit(self._ring)


class Nixl(Reader):
    """NIXL's POSIX plugin, with prepared descriptor lists and a poll every 100 microseconds."""

    def __init__(self, fd: int, extent: int, buffer: Buffer, engine: str) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        config = nixl_agent_config(enable_prog_thread=False, backends=[])
        self._agent: Any = nixl_agent(f"bench-{random.getrandbits(32)}", config)
        self._agent.create_backend("POSIX", {engine: "true"})
        count, file_bytes = len(buffer) // extent, os.fstat(fd).st_size
        self._memory = self._agent.register_memory(
            [(buffer.ctypes.data, len(buffer), 0, "")], "DRAM"
        )
        self._file = self._agent.register_memory([(0, file_bytes, fd, "")], "FILE")
        self._extent = extent
        local = [(buffer.ctypes.data + i * extent, extent, 0) for i in range(count)]
        remote = [(i * extent, extent, fd) for i in range(file_bytes // extent)]
        self._local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", local, "DRAM")
        self._remote = self._agent.prep_xfer_dlist(self._agent.name, remote, "FILE")
        self._indices = np.arange(count, dtype=np.int32)

    def read(self, offsets: Offsets) -> None:
        handle = self._agent.make_prepped_xfer(
            "READ",
            self._local,
            self._indices[: len(offsets)],
            self._remote,
            (offsets // self._extent).astype(np.int32),
        )
        state = self._agent.transfer(handle)
        while state == "PROC":
            time.sleep(1e-4)
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise OSError(f"NIXL says {state}")
        self._agent.release_xfer_handle(handle)

    def close(self) -> None:
        self._agent.release_dlist_handle(self._local)
        self._agent.release_dlist_handle(self._remote)
        self._agent.deregister_memory(self._memory)
        self._agent.deregister_memory(self._file)


WAYS: dict[str, tuple[int, Callable[[int, int, Buffer], Reader]]] = {
    "preadv, 1 thread": (1, Preadv),
    "preadv, 2 threads": (2, Preadv),
    "preadv, 4 threads": (4, Preadv),
    "Linux AIO, 1 thread": (1, LinuxAio),
    "Linux AIO, 2 threads": (2, LinuxAio),
    "Linux AIO, 4 threads": (4, LinuxAio),
    "io_uring (liburing), 1 thread": (1, Liburing),
    "NIXL POSIX, AIO": (1, lambda fd, extent, buffer: Nixl(fd, extent, buffer, "use_aio")),
    "NIXL POSIX, io_uring": (1, lambda fd, extent, buffer: Nixl(fd, extent, buffer, "use_uring")),
}


class Counter(threading.Thread):
    """A thread that does nothing but Python, and says how much of it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.count, self._halt = 0, False

    def run(self) -> None:
        while not self._halt:
            self.count += 1

    def rate_over(self, work: Callable[[], None]) -> tuple[float, float]:
        """Seconds that ``work`` took, and counts per second meanwhile."""
        before, begin = self.count, time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
        return seconds, (self.count - before) / seconds

    def stop(self) -> None:
        self._halt = True
        self.join()


@contextmanager
def counting() -> Iterator[tuple[Counter, float]]:
    """A running counter, and its speed when nothing else runs."""
    counter = Counter()
    counter.start()
    time.sleep(0.05)
    try:
        yield counter, counter.rate_over(lambda: time.sleep(0.3))[1]
    finally:
        counter.stop()


@dataclass(frozen=True)
class Sample:
    """One round of one way: GB/s and CPU s/GB alone, GB/s and the counter's share beside it."""

    alone: float
    cpu: float
    beside: float
    share: float


def measure(work: Callable[[], None], gigabytes: float) -> Sample:
    """Do some work twice: alone, and beside the counter."""
    before, begin = cpu_seconds(), time.perf_counter()
    work()
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - before
    with counting() as (counter, speed):
        beside, rate = counter.rate_over(work)
    return Sample(gigabytes / seconds, cpu / gigabytes, gigabytes / beside, rate / speed)


def cpu_seconds() -> float:
    """CPU time that this process has taken, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def fan_out(readers: list[Reader], requests: list[Offsets]) -> None:
    """Let every reader, in a thread of its own, take requests until none is left."""
    todo: queue.SimpleQueue[Offsets] = queue.SimpleQueue()
    for request in requests:
        todo.put(request)
    failures: list[Exception] = []

    def work(reader: Reader) -> None:
        while True:
            try:
                request = todo.get_nowait()
            except queue.Empty:
                return
            try:
                reader.read(request)
            except Exception as failure:
                failures.append(failure)
                return

    threads = [threading.Thread(target=work, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def one_round(
    fd: int, way: str, extent: int, buffers: list[Buffer], requests: list[Offsets]
) -> Sample:
    """Measure one way once, alone and beside the counter."""
    threads, make = WAYS[way]
    readers = [make(fd, extent, buffer) for buffer in buffers[:threads]]
    gigabytes = sum(len(request) for request in requests) * extent / 1e9
    try:
        readers[0].read(requests[0])
        stamps = buffers[0].view(np.int64)[:: extent // 8][: len(requests[0])]
        if not (stamps == requests[0]).all():
            raise OSError(f"{way} read something else")
        return measure(lambda: fan_out(readers, requests), gigabytes)
    finally:
        for reader in readers:
            reader.close()


def make_file(path: Path, size: int, step: int) -> None:
    """A file of random bytes in which every ``step`` bytes begin with their own offset."""
    part = np.random.default_rng(0).integers(0, 256, 64 << 20, dtype=np.uint8)
    with path.open("wb") as out:
        for begin in range(0, size, len(part)):
            count = min(len(part), size - begin)
            part.view(np.int64)[:: step // 8] = begin + np.arange(0, len(part), step)
            out.write(part[:count].data)
        out.flush()
        os.fsync(out.fileno())


def compare_reads(path: Path, sizes: Sequence[int], count: int, total: int, rounds: int) -> None:
    """Print the table of reads: requests of ``count`` extents out of a file of ``total`` bytes."""
    file = path / "lamina-bench-disk-io"
    make_file(file, total, min(sizes))
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        plain_tools(file)
        buffers = [aligned(max(sizes) * count) for _ in range(max(t for t, _ in WAYS.values()))]
        header("way of reading", "extent", "pattern")
        for extent, pattern in itertools.product(sizes, ("neighbouring", "scattered")):
            offsets = np.arange(0, total, extent, dtype=np.int64)
            if pattern == "scattered":
                np.random.default_rng(1).shuffle(offsets)
            whole = len(offsets) // count * count
            requests = np.split(offsets[:whole], whole // count)
            samples: dict[str, list[Sample]] = {way: [] for way in WAYS}
            skipped: dict[str, str] = {}
            for _ in range(rounds):
                for way in random.sample(list(WAYS), len(WAYS)):
                    try:
                        samples[way].append(one_round(fd, way, extent, buffers, requests))
                    except Exception as failure:
                        skipped[way] = f"{type(failure).__name__}: {failure}"
            for way, found in samples.items():
                row(way, f"{extent >> 10} KiB", pattern, found, skipped.get(way, ""))
        footer()
    finally:
        os.close(fd)
        file.unlink()


def plain_tools(file: Path) -> None:
    """Print what a tool reads from the same file, if there is one."""
    if shutil.which("fio") is None:
        print("fio is not installed, so there is no reference\n")
        return
    for engine, depth, size in (("psync", 1, "8m"), ("libaio", 32, "512k"), ("libaio", 32, "128k")):
        command = f"fio --name=reference --filename={file} --readonly --direct=1 --rw=read"
        command += f" --ioengine={engine} --iodepth={depth} --bs={size} --output-format=json"
        rates = [
            json.loads(subprocess.run(command.split(), capture_output=True, check=True).stdout)[
                "jobs"
            ][0]["read"]["bw_bytes"]
            for _ in range(3)
        ]
        rate = statistics.median(rates) / 1e9
        print(f"fio, {engine}, depth {depth}, {size}, sequential: {rate:.2f} GB/s")
    print()


HASHES: dict[str, Callable[[Buffer], object]] = {
    "XXH3-64, per extent": lambda extents: [xxhash.xxh3_64_intdigest(each) for each in extents],
    "CRC-32 (ISA-L), per extent": lambda extents: [isal_zlib.crc32(each) for each in extents],
    "CRC-32 (zlib), per row": lambda extents: zlib.crc32(extents.data),
    "CRC-32 (ISA-L), per row": isal_zlib.crc32,
}


def compare_hashes(sizes: Sequence[int], count: int, rounds: int) -> None:
    """Print the table of checksums: of ``count`` extents in memory, until 1 GiB is done."""
    header("way of checking", "extent", "")
    for size in sizes:
        extents = np.random.default_rng(0).integers(0, 256, (count, size), dtype=np.uint8)
        samples: dict[str, list[Sample]] = {name: [] for name in HASHES}
        for _ in range(rounds):
            for name in random.sample(list(HASHES), len(HASHES)):
                samples[name].append(hash_round(HASHES[name], extents))
        for name, found in samples.items():
            row(name, f"{size >> 10} KiB", "", found)
    footer()


def hash_round(check: Callable[[Buffer], object], extents: Buffer) -> Sample:
    """Measure one way of checking once."""
    repeats = max(1, (1 << 30) // extents.nbytes)

    def work() -> None:
        for _ in range(repeats):
            check(extents)

    return measure(work, repeats * extents.nbytes / 1e9)


def header(*titles: str) -> None:
    """Print the head of a table."""
    first, second, third = titles
    print(f"{first:32}{second:>9}{third:>14}{'GB/s':>8}{'CPU s/GB':>10}{'GB/s*':>8}{'kept*':>7}")


def row(way: str, extent: str, pattern: str, found: Sequence[Sample], skipped: str = "") -> None:
    """Print the medians of one way."""
    label = f"{way:32}{extent:>9}{pattern:>14}"
    if not found:
        print(f"{label}  skipped: {skipped}")
        return
    alone, cpu, beside, share = (
        statistics.median(getattr(sample, name) for sample in found)
        for name in ("alone", "cpu", "beside", "share")
    )
    print(f"{label}{alone:8.2f}{cpu:10.3f}{beside:8.2f}{share:7.0%}", flush=True)


def footer() -> None:
    """Print what the columns mean."""
    print("* beside a thread that only counts; kept: how much of its own speed that thread keeps\n")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--path", type=Path, help="a directory on the disk to be measured")
    parser.add_argument("--hash", action="store_true", help="measure checksums instead")
    parser.add_argument("--sizes", default="512,128", help="KiB of an extent, with commas")
    parser.add_argument("--extents", type=int, default=64, help="extents in one request")
    parser.add_argument("--total", type=int, default=2048, help="MiB of the file that is read")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = [int(size) << 10 for size in options.sizes.split(",")]
    if options.hash:
        compare_hashes(sizes, options.extents, options.rounds)
    elif options.path is None:
        parser.error("--path or --hash is needed")
    else:
        compare_reads(options.path, sizes, options.extents, options.total << 20, options.rounds)


if __name__ == "__main__":
    main()

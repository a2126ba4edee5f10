"""What a disk tier does in a second, and how long it takes to open.

Chunks are written and read as the data room does it: sealed, written in batches with one sync each;
read in batches by several threads into memory that is used again, and verified. The file is larger
than what the disk itself caches where ``--gib`` says so; direct I/O goes past the page cache.

    python bench/disk_tier.py --path /var/lib/lamina-bench
    python bench/disk_tier.py --path /var/lib/lamina-bench --open 1000000
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import resource
import shutil
import statistics
import threading
import time
from pathlib import Path

import numpy as np

from lamina_kv.geometry import OBJECT_HEADER_BYTES
from lamina_kv.keys import KEY_BYTES
from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import Fate, Piece, Tenant
from lamina_kv.tiers.disk.config import DiskConfig
from lamina_kv.tiers.disk.store import DiskStore, open_store
from lamina_kv.tiers.objects import Object, aligned_memory, seal, verify

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def key(number: int) -> ChunkKey:
    """The key of the chunk in slot ``number``."""
    return ChunkKey(number.to_bytes(KEY_BYTES, "little"))


def open_disk(path: Path, slots: int, size: int) -> DiskStore:
    """Open a store of chunks of ``size`` bytes."""
    config = DiskConfig(path=path, capacity=slots * size)
    return open_store(config, Tenant("be" * 16, {}, 0, 1, size, 0))


def memory_mb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_opening(path: Path, slots: int) -> None:
    """Fill the heads of a slab, and no more of it, and open it."""
    store = open_disk(path, slots, 4 * KIB)
    where = np.arange(slots)
    keys = np.random.default_rng(0).integers(0, 256, (slots, KEY_BYTES), np.uint8)
    store._heads.enter(where, keys, np.full(slots, 4000))
    store._heads.write(where)
    store.close()
    del store, keys
    before = memory_mb()
    began, cpu = time.perf_counter(), time.process_time()
    store = open_disk(path, slots, 4 * KIB)
    opened, cpu = time.perf_counter(), time.process_time() - cpu
    stored = store.stored(keys=True)
    seconds = time.perf_counter() - opened
    print(
        f"{len(stored.slots):,} chunks: opened in {opened - began:.2f} s ({cpu:.2f} s of CPU), "
        f"told in {seconds:.2f} s; {memory_mb() - before:.0f} MB with what was told, "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB at most in all"
    )
    store.close()


def write_all(store: DiskStore, order: list[int], buffers: list[Object], rows: int) -> float:
    """Seal and write every slot; returns seconds."""
    batch = len(buffers)
    began = time.perf_counter()
    for start in range(0, len(order), batch):
        slots = order[start : start + batch]
        for slot, buffer in zip(slots, buffers, strict=False):
            seal(buffer, key(slot), 0, rows)
        pieces = [Piece(key(s), s, b) for s, b in zip(slots, buffers, strict=False)]
        assert set(store.write(pieces, 60.0)) == {Fate.DONE}
    return time.perf_counter() - began


def read_all(store: DiskStore, order: list[int], memory: list[list[Object]], rows: int) -> float:
    """Read and verify every slot, one thread for each of ``memory``; returns seconds."""
    batch = len(memory[0])
    batches: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for start in range(0, len(order), batch):
        batches.put(order[start : start + batch])

    def work(buffers: list[Object]) -> None:
        while True:
            try:
                slots = batches.get_nowait()
            except queue.Empty:
                return
            pieces = [Piece(key(s), s, b) for s, b in zip(slots, buffers, strict=False)]
            assert set(store.read(pieces, 60.0)) == {Fate.DONE}
            assert all(verify(piece.buffer, piece.key, 0, rows) for piece in pieces)

    threads = [threading.Thread(target=work, args=(buffers,)) for buffers in memory]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def measure_speed(path: Path, size: int, total: int, rounds: int, batch: int) -> None:
    """Write and read back ``total`` bytes of objects of ``size`` bytes."""
    slots = total // size
    store = open_disk(path, slots, size)
    rows = size - OBJECT_HEADER_BYTES
    buffers = [aligned_memory(size) for _ in range(batch)]
    for buffer in buffers:
        buffer[:] = np.frombuffer(random.randbytes(size), np.uint8)
    order = list(range(slots))
    figures: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        figures.setdefault(name, []).append(total / seconds / 1e9)

    note("write, first time", write_all(store, order, buffers, rows))
    for _ in range(rounds):
        note("write, neighbours", write_all(store, order, buffers, rows))
        random.shuffle(order)
        note("write, scattered", write_all(store, order, buffers, rows))
        for readers in (1, 2, 4):
            memory = [[aligned_memory(size) for _ in range(batch)] for _ in range(readers)]
            random.shuffle(order)
            note(f"read, scattered, {readers} threads", read_all(store, order, memory, rows))
    store.close()
    for name, values in figures.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{size // KIB:>6} KiB  {name:<28} {statistics.median(values):5.2f} GB/s  ({spread})")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--path", type=Path, required=True, help="a directory that is not there")
    parser.add_argument("--open", type=int, default=0, help="measure opening so many chunks")
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 2048], help="KiB")
    parser.add_argument("--gib", type=float, default=2.0, help="bytes of chunks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="chunks in one call")
    given = parser.parse_args()
    if given.path.exists():
        parser.error(f"{given.path} is there already")
    try:
        if given.open:
            measure_opening(given.path, given.open)
            return
        for size in given.sizes:
            measure_speed(given.path, size * KIB, int(given.gib * GIB), given.rounds, given.batch)
            shutil.rmtree(given.path)
    finally:
        shutil.rmtree(given.path, ignore_errors=True)


if __name__ == "__main__":
    main()

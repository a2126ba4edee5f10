"""Ways to copy KV pages between two places in memory, side by side with the CPU mover.

One round moves ``--mib`` of pages from the near tier into an engine's cache of 16 rows, row by row,
in calls of 8 MiB as the load pipeline makes them. Chunks have four pages in a row. Slots and blocks
are neighbours, the engine's blocks are scattered, the near slots are, or both are; the last also
beside a busy engine:

- ``matmul``: a thread that multiplies matrices with torch on every core; the GIL is mostly free
- ``python``: a thread that does nothing but Python; the GIL is never free

    python bench/movers.py --pages 4KiB 32KiB 128KiB 512KiB

The tables give GB/s, medians over ``--rounds`` in random order, and in brackets the share of its
own speed that the engine kept. ``memcpy`` is one large copy of the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from lamina_kv.data.movers.cpu import CpuMover
from lamina_kv.data.near import NearSlab
from lamina_kv.geometry import Band, CacheGeometry, Row

Ids = npt.NDArray[np.int64]

ROWS, PER_SLOT = 16, 4
CALL_BYTES = 8 << 20
PATIENCE = 4.0
"""Seconds after which a way gets no further rounds."""

_libc = ctypes.CDLL(None, use_errno=True)
_iovecs = (ctypes.c_void_p, ctypes.c_ulong)
_libc.process_vm_readv.argtypes = (ctypes.c_int, *_iovecs, *_iovecs, ctypes.c_ulong)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class Cache:
    """An engine's cache and a near slab, both twice as large as what is moved: a shuffle of all
    pages would be no scatter, the mover would put it in order.

    Args:
        total: bytes to move.
        page: bytes of a page.
    """

    def __init__(self, total: int, page: int) -> None:
        self.page = page
        self.slots = total // ROWS // page // PER_SLOT
        self.blocks = self.slots * PER_SLOT
        row_bytes = 2 * self.blocks * page
        self.total = ROWS * self.blocks * page
        geometry = CacheGeometry(
            rows=tuple(Row((str(i),), 0, i * row_bytes, page, page) for i in range(ROWS)),
            num_blocks=2 * self.blocks,
            block_tokens=16,
            chunk_tokens=16 * PER_SLOT,
            allocation_bytes=(2 * self.total,),
        )
        engine = torch.ones(2 * self.total, dtype=torch.uint8)
        self.mover = CpuMover(geometry, [engine])
        self.near = NearSlab(
            geometry, 2 * self.slots * geometry.object_bytes, self.mover.allocate_host
        )
        self.near.memory.fill_(2)
        self.engine = engine.view(ROWS, -1, page)
        self._after = self.mover.fence_compute()

    def memcpy(self) -> None:
        """Copy as many bytes at once."""
        half = self.total
        np.copyto(self.engine.view(-1)[:half].numpy(), self.near.memory[:half].numpy())

    def lamina(self, row: int, pages: Ids, blocks: Ids) -> None:
        """Copy with the CPU mover."""
        self.mover.load([row], self.mover.pairs(self.near, pages, blocks), self._after)

    def save(self, row: int, pages: Ids, blocks: Ids) -> None:
        """Copy with the CPU mover, in the other direction."""
        self.mover.save([row], self.mover.pairs(self.near, pages, blocks), self._after)

    def numpy(self, row: int, pages: Ids, blocks: Ids) -> None:
        """Copy by indexing both sides with numpy."""
        place = self.near.rows(Band(row))
        engine = self.engine[row].numpy().view(f"V{self.page}")
        engine[blocks] = place.pages[place.begins(pages)]

    def vm_readv(self, row: int, pages: Ids, blocks: Ids) -> None:
        """Have the kernel read from this very process."""
        source, target = np.empty((2, len(pages), 2), np.uint64)
        source[:, 0] = self._addresses(row, pages)
        target[:, 0] = self.engine[row].data_ptr() + blocks * self.page
        source[:, 1] = target[:, 1] = self.page
        for start in range(0, len(pages), 1024):
            count = min(1024, len(pages) - start)
            sides = (target[start:].ctypes.data, count, source[start:].ctypes.data, count)
            if _libc.process_vm_readv(os.getpid(), *sides, 0) != count * self.page:
                raise OSError(ctypes.get_errno(), "process_vm_readv")

    def page_by_page(self, row: int, pages: Ids, blocks: Ids) -> None:
        """Copy in a loop, each page with a call that releases the GIL."""
        engine, near = self.engine[row].data_ptr(), self._addresses(row, pages)
        for page, block in zip(near.tolist(), blocks.tolist(), strict=True):
            ctypes.memmove(engine + block * self.page, page, self.page)

    def _addresses(self, row: int, pages: Ids) -> Ids:
        place = self.near.rows(Band(row))
        return place.memory.data_ptr() + place.begins(pages) * place.unit


class Company:
    """A thread that plays the engine and counts what it gets done.

    Args:
        work: what it does again and again; None for no company.
    """

    def __init__(self, work: Callable[[], object] | None) -> None:
        self._work = work
        with self._running() as rate:
            time.sleep(0.5)
            while work is not None and not rate():
                time.sleep(0.1)
            self._own_rate = rate()

    def measure(self, work: Callable[[], None]) -> tuple[float, float]:
        """Seconds that ``work`` takes beside it, and the share of its speed that it keeps."""
        with self._running() as rate:
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
            return seconds, rate() / self._own_rate if self._work else 1.0

    @contextmanager
    def _running(self) -> Iterator[Callable[[], float]]:
        done, stop, began = 0, False, time.perf_counter()

        def run() -> None:
            nonlocal done
            while not stop and self._work is not None:
                self._work()
                done += 1

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield lambda: done / (time.perf_counter() - began)
        finally:
            stop = True
            thread.join()


def spin() -> None:
    """Take thousands of steps without letting go of the GIL."""
    for _ in range(5_000):
        pass


def compare(total: int, page: int, rounds: int, rng: np.random.Generator) -> None:
    """Measure one page size and print its table."""
    cache = Cache(total, page)
    step = max(1, CALL_BYTES // page)
    run = np.arange(cache.blocks)
    blocks = rng.permutation(2 * cache.blocks)[: cache.blocks]
    slots = rng.permutation(2 * cache.slots)[: cache.slots]
    pages = (slots[:, None] * PER_SLOT + np.arange(PER_SLOT)).reshape(-1)
    orders = {"neighbours": (run, run), "engine scattered": (run, blocks)}
    orders |= {"near scattered": (pages, run), "both scattered": (pages, blocks)}
    left = torch.randn(256, 256)
    companies = {
        "": Company(None),
        "matmul": Company(lambda: torch.mm(left, left)),
        "python": Company(spin),
    }
    ways = {"lamina": (cache.lamina, 1), "lamina, 2 threads": (cache.lamina, 2)}
    ways |= {"lamina, save": (cache.save, 1), "numpy": (cache.numpy, 1)}
    ways |= {"vm_readv": (cache.vm_readv, 1), "page by page": (cache.page_by_page, 1)}
    pools = {threads: ThreadPoolExecutor(threads) for threads in (1, 2)}

    def move(way: str, order: str) -> None:
        (copy, threads), (pages, blocks) = ways[way], orders[order]
        jobs = [
            pools[threads].submit(copy, row, pages[i : i + step], blocks[i : i + step])
            for row in range(ROWS)
            for i in range(0, cache.blocks, step)
        ]
        for job in jobs:
            job.result()

    columns = [(order, "") for order in orders]
    columns += [("both scattered", company) for company in ("matmul", "python")]
    cases = [(way, order, company) for way in ways for order, company in columns]
    seen: defaultdict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    flat: list[float] = []
    for _ in range(rounds):
        random.shuffle(cases)
        for way, order, company in cases:
            results = seen[way, order, company]
            if sum(seconds for seconds, _ in results) < PATIENCE:
                results.append(companies[company].measure(partial(move, way, order)))
            flat.append(companies[""].measure(cache.memcpy)[0])

    print(
        f"\npages of {page / 1024:g} KiB; memcpy {cache.total / statistics.median(flat) / 1e9:.1f}"
    )
    print("| | " + " | ".join(f"{o}{' + ' if c else ''}{c}" for o, c in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for way in ways:
        cells = [way]
        for order, company in columns:
            seconds, share = map(statistics.median, zip(*seen[way, order, company], strict=True))
            speed = cache.total / seconds / 1e9
            cells.append(f"{speed:.1f} ({share:.0%})" if company else f"{speed:.1f}")
        print("| " + " | ".join(cells) + " |", flush=True)
    for pool in pools.values():
        pool.shutdown()
    cache.mover.close()


def size(text: str) -> int:
    """Bytes, from a number of bytes or of KiB."""
    return int(text.removesuffix("KiB")) * 1024 if text.endswith("KiB") else int(text)


def main() -> None:
    """Print a table for every page size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pages", type=size, nargs="+", default=[4096, 32768, 131072, 524288])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    versions = f"torch {torch.__version__}, numpy {np.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}")
    for page in options.pages:
        compare(options.mib << 20, page, options.rounds, np.random.default_rng(0))


if __name__ == "__main__":
    main()

"""K: how long pinning takes, and what it does to Python and to launches meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from threading import Event, Thread

import torch

from gpu.lab import Lab
from gpu.plan import Bench
from gpu.report import Bound, Row
from lamina_kv.data.movers.host_memory import HostMemory

SIZE, SMALL_SIZE = 16 << 30, 16 << 20
"""Bytes to pin, and where memory is scarce."""

LONGEST_GAP = Bound(50.0)
"""Milliseconds."""


def run(bench: Bench[Lab]) -> Generator[Row, None, None]:
    """See the module."""
    size = SIZE if bench.lab.is_large else SMALL_SIZE
    pinner = bench.lab.pinner()
    small = torch.zeros(1, device=bench.lab.device)
    stop = Event()
    gaps = {"Python": 0.0, "launches": 0.0}

    def watch(name: str, act: Callable[[], object]) -> None:
        pinner.choose()
        last = time.perf_counter()
        while not stop.is_set():
            act()
            now = time.perf_counter()
            gaps[name] = max(gaps[name], now - last)
            last = now

    def launch() -> None:
        small.add_(1)
        time.sleep(0.001)

    watchers = [
        Thread(target=watch, args=("Python", lambda: time.sleep(0.001))),
        Thread(target=watch, args=("launches", launch)),
    ]
    for watcher in watchers:
        watcher.start()
    began = time.perf_counter()
    memory = HostMemory(size, pinner=pinner, node=pinner.numa_node, enter=pinner.choose)
    try:
        memory.wait()
        seconds = time.perf_counter() - began
    finally:
        stop.set()
        for watcher in watchers:
            watcher.join()
        began = time.perf_counter()
        memory.close()
    closing = time.perf_counter() - began
    yield Row(f"pinning {size >> 20} MiB", seconds, "s")
    yield Row("calls that pin", float(len(memory.pins)))
    for name, gap in gaps.items():
        yield Row(f"longest gap of {name} meanwhile", gap * 1e3, "ms", LONGEST_GAP)
    yield Row("close", closing, "s")

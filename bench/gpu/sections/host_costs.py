"""G: what calls of the mover cost their threads, and a chunk that is saved its step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

from gpu.copies import Cache
from gpu.lab import Lab
from gpu.pages import PER_SLOT
from gpu.plan import Bench
from gpu.report import Bound, Row
from lamina_kv.data.movers.fences import Fence

LAYERS = 64
LAYER_SECONDS = 150e-6
"""A piece of a decode step's graph."""

PAGE, SLOTS = 16 << 10, 4
ROUNDS = 100
SAVE_COST, FENCE_COST = Bound(300.0), Bound(50.0)
"""Microseconds: of a pool's thread for a chunk, of the engine's for a step."""


def run(bench: Bench[Lab]) -> Generator[Row, None, None]:
    """See the module."""
    cache = Cache(bench.lab, PAGE, SLOTS * PER_SLOT * PAGE, LAYERS)
    engine, mover, rows = cache.engine, cache.engine.mover, range(LAYERS)
    chunk = cache.ids[:PER_SLOT]
    with engine.computing():
        after = mover.fence_compute()

    def copy(*, to_engine: bool) -> None:
        pairs = cache.pairs(chunk, chunk)
        fence = (mover.load if to_engine else mover.save)(rows, pairs, after)
        held.append(fence)

    held = [after]
    try:
        yield Row(
            "save of a chunk, all rows", _cost(lambda: copy(to_engine=False)), "us", SAVE_COST
        )
        yield Row("load of a chunk, all rows", _cost(lambda: copy(to_engine=True)), "us")
        with engine.computing():
            yield Row("fence behind a step", _cost(mover.fence_compute), "us", FENCE_COST)
            yield Row("hold of a layer", _cost(lambda: mover.hold_compute(held[-1])), "us")
        held[-1].wait()
        alone = _steps(cache, saves=False)
        with_saves = _steps(cache, saves=True)
        yield Row("step", alone * 1e3, "ms")
        yield Row("step with a chunk saved, of one without", with_saves / alone, "", Bound(1.03))
    finally:
        cache.close()


def _cost(call: Callable[[], object]) -> float:
    """Microseconds of the calling thread's own time, mean."""
    call()
    began = time.thread_time()
    for _ in range(ROUNDS):
        call()
    return (time.thread_time() - began) / ROUNDS * 1e6


def _steps(cache: Cache, *, saves: bool) -> float:
    """Median seconds of a step, which ends when the device is through with it."""
    engine, mover = cache.engine, cache.engine.mover
    chunk = cache.ids[:PER_SLOT]
    taken: list[float] = []
    saved: list[Fence] = []

    def save(after: Fence) -> None:
        saved.append(mover.save(range(LAYERS), cache.pairs(chunk, chunk), after))

    with ThreadPoolExecutor(1, initializer=mover.enter_thread) as thread:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            with engine.computing():
                for _ in range(LAYERS):
                    engine.delay(engine.streams[0], LAYER_SECONDS)
                written = mover.fence_compute()
            if saves:
                thread.submit(save, written)
            written.wait()
            taken.append(time.perf_counter() - began)
    for fence in saved:
        fence.wait()
    return statistics.median(taken)

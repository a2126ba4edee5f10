"""G: what calls of the mover cost their threads, and what Lamina costs a decode step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator

from gpu.copies import Cache
from gpu.lab import Lab
from gpu.pages import PER_SLOT
from gpu.plan import Bench
from gpu.report import Bound, Row
from lamina_kv.config import LoadConfig
from lamina_kv.data.executor import Executor, Tiers
from lamina_kv.plan import SaveOrder, StepPlan, TransferId

LAYERS = 64
LAYER_SECONDS = 150e-6
"""A piece of a decode step's graph."""

PAGE, SLOTS = 16 << 10, 4
ROUNDS = 100
SAVE_COST, FENCE_COST = Bound(300.0), Bound(50.0)
"""Microseconds: of a pool's thread for a chunk, of the engine's for a step."""

IDLE_STEP, SAVING_STEP = Bound(1.01), Bound(1.03)
"""Of a step without Lamina: one with nothing to move, one that completes a chunk."""

Plan = Callable[[int], StepPlan]
"""What Lamina is to do in the step of a number."""


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
        alone = _step(cache)
        yield Row("step without Lamina", alone * 1e3, "ms")
        executor = Executor(rank=0, tiers=Tiers(cache.near), mover=mover, config=LoadConfig())
        try:
            idle = _step(cache, executor, StepPlan)
            yield Row("idle step, of one without Lamina", idle / alone, "", IDLE_STEP)
            saving = _step(cache, executor, _saving)
            yield Row("step that saves a chunk, of one without", saving / alone, "", SAVING_STEP)
        finally:
            executor.close()
    finally:
        cache.close()


def _saving(step: int) -> StepPlan:
    return StepPlan(step, saves=(SaveOrder(TransferId(step), "r", 0, tuple(range(PER_SLOT))),))


def _cost(call: Callable[[], object]) -> float:
    """Microseconds of the calling thread's own time, mean."""
    call()
    began = time.thread_time()
    for _ in range(ROUNDS):
        call()
    return (time.thread_time() - began) / ROUNDS * 1e6


def _step(cache: Cache, executor: Executor | None = None, plan: Plan = StepPlan) -> float:
    """Median seconds of a step, which ends when the device is through with it.

    Args:
        cache: the engine's.
        executor: Lamina; None for none.
        plan: what it does.
    """
    engine, taken = cache.engine, list[float]()
    for number in range(ROUNDS):
        began = time.perf_counter()
        with engine.computing():
            if executor is not None:
                executor.begin_step(plan(number))
                executor.start_loads()
            for _ in range(LAYERS):
                engine.delay(engine.streams[0], LAYER_SECONDS)
            if executor is not None:
                executor.end_step()
                executor.collect()
            written = engine.mover.fence_compute()
        written.wait()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)

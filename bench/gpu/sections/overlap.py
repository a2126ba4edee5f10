"""H: a layerwise load and the step that waits for it. I: a load between steps, beside steps.

The model's layers are kernels that only pass time: they say what the order of the streams costs.
Section F says what copies take from real ones.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

from gpu.copies import Cache, seconds
from gpu.lab import Engine, Lab
from gpu.plan import Bench
from gpu.report import Bound, Row
from lamina_kv.data.movers.base import Pairs
from lamina_kv.data.movers.fences import Fence

LAYERS, PAGE = 32, 64 << 10
ROW_BYTES, SMALL_ROW_BYTES = 16 << 20, 64 << 10
"""Bytes of a row, and where memory is scarce."""

ROUNDS = 5
PARKED_PIECE, WINDOW = 8 << 20, 4
"""Bytes of a piece of the load between steps, and how many are launched at a time."""

DECODE_LAYERS, DECODE_SECONDS, STEPS = 64, 150e-6, 40


def layerwise(bench: Bench[Lab]) -> Generator[Row, None, None]:
    """H."""
    cache = _cache(bench.lab)
    try:
        pieces = cache.pieces(cache.size, scattered=True)
        load = min(seconds(_loads(cache, pieces)) for _ in range(ROUNDS))
        each = load / LAYERS
        compute = min(_step(cache.engine, [], each) for _ in range(ROUNDS))
        both = min(_step(cache.engine, _loads(cache, pieces), each) for _ in range(ROUNDS))
        yield Row("load alone", load * 1e3, "ms")
        yield Row("step alone", compute * 1e3, "ms")
        ideal = max(load, compute) + each
        yield Row("step with the load, of the longer + a row", both / ideal, "", Bound(1.05))
    finally:
        cache.close()


def parked(bench: Bench[Lab]) -> Generator[Row, None, None]:
    """I."""
    cache = _cache(bench.lab)
    engine, mover = cache.engine, cache.engine.mover
    try:
        pieces = cache.pieces(PARKED_PIECE, scattered=True)
        row = [pieces[0]]
        idle = min(seconds(cache.move(row, to_engine=True)) for _ in range(ROUNDS))
        alone = max(_decode(engine) for _ in range(STEPS))
        stop = False

        def load() -> int:
            count = 0
            queued: list[Fence] = []
            with engine.computing():
                after = mover.fence_compute()
            while not stop:
                pairs = pieces[count % len(pieces)]
                queued.append(mover.load([1], pairs, after, urgent=False))
                count += 1
                if len(queued) == WINDOW:
                    queued.pop(0).wait()
            for fence in queued:
                fence.wait()
            return count

        with ThreadPoolExecutor(1, initializer=mover.enter_thread) as thread:
            loading = thread.submit(load)
            try:
                beside = max(_decode(engine) for _ in range(STEPS))
                urgent = max(seconds(cache.move(row, to_engine=True)) for _ in range(ROUNDS))
            finally:
                stop = True
            count = loading.result()
        yield Row("pieces loaded meanwhile", float(count), "", Bound(1, at_least=True))
        yield Row("longest step, of one with no load", beside / alone, "", Bound(1.1))
        yield Row("a step's piece beside the load, of an idle one", urgent / idle, "", Bound(3.0))
    finally:
        cache.close()


def _cache(lab: Lab) -> Cache:
    return Cache(lab, PAGE, ROW_BYTES if lab.is_large else SMALL_ROW_BYTES, LAYERS)


def _loads(cache: Cache, pieces: list[Pairs]) -> list[Fence]:
    """A load of every row, by one piece."""
    return [cache.move(pieces, to_engine=True, rows=[row])[-1] for row in range(LAYERS)]


def _step(engine: Engine, rows: list[Fence], layer: float) -> float:
    """Device seconds of a step whose layers wait for ``rows``; none if there are none."""
    mover = engine.mover
    with engine.computing():
        began = mover.fence_compute(timed=True)
        for number in range(LAYERS):
            if rows:
                mover.hold_compute(rows[number])
            engine.delay(engine.streams[0], layer)
        ended = mover.fence_compute(timed=True)
    return seconds([began, ended])


def _decode(engine: Engine) -> float:
    """Device seconds of a decode step."""
    mover = engine.mover
    with engine.computing():
        began = mover.fence_compute(timed=True)
        for _ in range(DECODE_LAYERS):
            engine.delay(engine.streams[0], DECODE_SECONDS)
        ended = mover.fence_compute(timed=True)
    return seconds([began, ended])

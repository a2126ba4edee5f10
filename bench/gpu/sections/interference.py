"""F: what copies take from the model's kernels: large products, and a decode step's graph."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import torch

from gpu.copies import Cache
from gpu.lab import CudaLab
from gpu.plan import Bench
from gpu.report import Bound, Row
from lamina_kv.data.movers.crossover import Way, way_of

PAGE, SIZE, PIECE, WINDOW = 64 << 10, 256 << 20, 8 << 20, 4
WIDTH, DECODE_BATCH, DECODE_LAYERS = 8192, 8, 64
REPLAYS, PRODUCTS = 20, 20
PROGRAMS = (12, 32)
"""Of the kernel; 12 are a load's own."""


def run(bench: Bench[CudaLab]) -> Generator[Row, None, None]:
    """See the module."""
    cache = Cache(bench.lab, PAGE, SIZE)
    try:
        for name, work, bound in _works(bench.lab.device):
            with cache.engine.computing():
                work()
                alone = _milliseconds(work)
            yield Row(f"{name} alone", alone, "ms")
            kinds: list[tuple[Way, int]] = [(Way.KERNEL, count) for count in PROGRAMS]
            if Way.COPY_ENGINE in cache.ways:
                kinds.append((Way.COPY_ENGINE, PROGRAMS[0]))
            for to_engine, (way, programs) in itertools.product((True, False), kinds):
                with (
                    bench.lab.way(way),
                    bench.lab.programs(programs),
                    _copying(cache, to_engine=to_engine),
                    cache.engine.computing(),
                ):
                    beside = _milliseconds(work)
                how = f"{programs} programs" if way is Way.KERNEL else str(way)
                what = f"{name} beside {'loads' if to_engine else 'saves'}, {how}"
                taken = way_of(PAGE, to_engine=to_engine) if len(kinds) > len(PROGRAMS) else way
                promised = bound if (way, programs) == (taken, PROGRAMS[0]) else None
                yield Row(what, (beside / alone - 1) * 100, "% slower", promised)
    finally:
        cache.close()


def _works(device: torch.device) -> Iterator[tuple[str, Callable[[], object], Bound | None]]:
    square = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16, device=device)
    other, out = square.clone(), torch.empty_like(square)

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mm(square, other, out=out)

    torch.cuda.synchronize(device)  # made on another stream than it is used on
    yield "large products", products, None
    small = torch.randn(DECODE_BATCH, WIDTH, dtype=torch.bfloat16, device=device)
    result = torch.empty_like(small)
    torch.mm(small, square, out=result)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(DECODE_LAYERS):
            torch.mm(small, square, out=result)

    def replays() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    yield "decode graph", replays, Bound(5.0)


def _milliseconds(work: Callable[[], object]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    ended.synchronize()
    milliseconds: float = began.elapsed_time(ended)
    return milliseconds


@contextmanager
def _copying(cache: Cache, *, to_engine: bool) -> Iterator[None]:
    """Inside, a thread copies without a pause; some copies are made before."""
    mover, pieces = cache.engine.mover, cache.pieces(PIECE, scattered=True)
    stop, busy = threading.Event(), threading.Event()
    call = mover.load if to_engine else mover.save
    with cache.engine.computing():
        # Of before the model's work: a copy behind that would not run beside it.
        after = mover.fence_compute()

    def copy() -> None:
        mover.enter_thread()
        queued = []
        while not stop.is_set():
            for pairs in pieces:
                queued.append(call([0], pairs, after))
                if len(queued) > WINDOW:
                    queued.pop(0).wait()
                    busy.set()
        for fence in queued:
            fence.wait()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        if not busy.wait(10):
            raise RuntimeError("the copies beside the model did not begin within 10 s")
        yield
    finally:
        stop.set()
        thread.join()

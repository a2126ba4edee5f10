"""``lamina-kv bench step``: what Lamina costs an engine in one step, beside the bytes themselves.

An executor is driven as an engine adapter drives it, with pages so small that copying them costs
nothing. What is left is Python: on the engine's thread, which launches the model, and on Lamina's
threads, which take the interpreter lock from it. Both are processor time of these threads. What a
device is asked to do is counted on one that does nothing, see :mod:`lamina_kv.bench.counted`.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from lamina_kv.bench.counted_device import Asked, CountedDevice
from lamina_kv.bench.progress import Progress
from lamina_kv.bench.report import Machine, Report
from lamina_kv.bench.samples import Samples, Target, Unit
from lamina_kv.config import LoadConfig
from lamina_kv.data.executor import Executor, Tiers
from lamina_kv.data.movers import Mover
from lamina_kv.data.movers.cpu import CpuMover
from lamina_kv.data.movers.cuda import CudaMover
from lamina_kv.data.near import NearSlab
from lamina_kv.geometry import CacheGeometry, Row
from lamina_kv.plan import LoadMode, LoadOrder, PageMap, SaveOrder, StepPlan, TransferId

ENGINE_LIMIT, LOCK_LIMIT = 50e-6, 0.3e-3
"""Seconds that a decode step which completes chunks may cost the engine's thread, and Lamina's
threads while they hold the interpreter lock, whatever the number of rows."""

DECODE_CALLS = {Asked.LAUNCH: 1, Asked.EVENT: 3, Asked.WAIT: 1, Asked.JOB: 1}
"""What such a step may ask of a device and of Lamina's threads, if its rows are alike. Its copy
engines get all pages in one launch. One event is the model's, and the copy is between two."""

_PAGE_BYTES, _BLOCK_TOKENS, _CHUNK_TOKENS = 256, 16, 64
_CHUNK_BLOCKS = _CHUNK_TOKENS // _BLOCK_TOKENS
_STEPS, _WARM = 100, 10
_TIMEOUT = 60.0


class Where(StrEnum):
    """What moves the bytes."""

    CPU = "CPU"
    DEVICE = "device"


class Kind(StrEnum):
    """What a step has to do."""

    IDLE = "idle"
    DECODE = "decode"
    LOAD = "load"


@dataclass(frozen=True, slots=True)
class StepSettings:
    """Options of the bench.

    Attributes:
        rows: numbers of rows to try.
        chunks: chunks that a step saves or loads.
        repeat: repetitions.

    Raises:
        ValueError: if an option makes no sense; the message names it.
    """

    rows: tuple[int, ...]
    chunks: int
    repeat: int

    def __post_init__(self) -> None:
        if not self.rows or min(self.rows) < 1:
            raise ValueError(f"--rows must be at least 1 each, got {min(self.rows, default=0)}")
        for name in ("chunks", "repeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step costs.

    Attributes:
        engine: processor seconds of the engine's thread.
        others: of Lamina's threads.
        counts: what the device was asked for, and jobs of Lamina's threads.
    """

    engine: float
    others: float
    counts: Mapping[Asked, float]


def measure(settings: StepSettings, progress: Progress) -> Report:
    """Run the bench."""
    machine = Machine.here()
    samples: list[Samples] = []
    targets: list[Target] = []
    for where, rows in itertools.product(Where, settings.rows):
        with closing(_Rank(where, rows, settings.chunks)) as rank:
            for kind in Kind:
                name = f"{kind}, {rows} rows, {where}"
                progress.say(name)
                costs = [rank.cost(kind) for _ in range(settings.repeat + 1)][1:]
                engine = Samples(f"{name}: engine", tuple(c.engine for c in costs))
                others = Samples(f"{name}: others", tuple(c.others for c in costs))
                samples += [engine, others]
                if kind is Kind.DECODE:
                    targets.append(Target(engine, Unit.SECONDS, ENGINE_LIMIT))
                    targets.append(Target(others, Unit.SECONDS, LOCK_LIMIT))
                if where is Where.DEVICE:
                    targets += _counted(name, costs, DECODE_CALLS if kind is Kind.DECODE else {})
    return Report(
        bench="step",
        title="What a step costs beside its bytes",
        machine=machine,
        settings={
            "rows": ",".join(map(str, settings.rows)),
            "chunks": settings.chunks,
            "repeat": settings.repeat,
        },
        samples=tuple(samples),
        compared="Promised, and asked of a device",
        targets=tuple(targets),
        notes=(
            f"{Kind.IDLE}: a step with nothing to move. {Kind.DECODE}: one that completes "
            f"{settings.chunks} chunks. {Kind.LOAD}: one with a layerwise load of as many.",
            f"Pages of {_PAGE_BYTES} bytes. Seconds are processor time of the engine's thread and "
            f"of Lamina's, medians and means of {_STEPS} steps: of others, an upper bound of the "
            "time in which they hold the interpreter lock.",
            "The device does nothing and was never a GPU: what its driver takes for a launch, an "
            "event or an upload comes on top.",
        ),
    )


def _counted(name: str, costs: Sequence[Cost], promised: Mapping[Asked, int]) -> list[Target]:
    """What was asked for in one step."""
    samples = {what: tuple(cost.counts[what] for cost in costs) for what in Asked}
    return [
        Target(Samples(f"{name}: {what}", counts), Unit.COUNT, promised.get(what))
        for what, counts in samples.items()
        if any(counts)
    ]


class _Rank:
    """One rank with a near tier, without an engine.

    Args:
        where: what moves the bytes.
        rows: rows of the cache.
        chunks: chunks that a step saves or loads.
    """

    def __init__(self, where: Where, rows: int, chunks: int) -> None:
        blocks = chunks * _CHUNK_BLOCKS
        self._layers = [f"layer.{row}" for row in range(rows)]
        row_bytes = blocks * _PAGE_BYTES
        geometry = CacheGeometry(
            rows=tuple(
                Row((layer,), 0, row * row_bytes, _PAGE_BYTES, _PAGE_BYTES)
                for row, layer in enumerate(self._layers)
            ),
            num_blocks=blocks,
            block_tokens=_BLOCK_TOKENS,
            chunk_tokens=_CHUNK_TOKENS,
            allocation_bytes=(rows * row_bytes,),
        )
        cache = torch.zeros(rows * row_bytes, dtype=torch.uint8)
        self._device = CountedDevice()
        self._mover: Mover = (
            CpuMover(geometry, [cache])
            if where is Where.CPU
            else CudaMover(geometry, [cache], self._device)
        )
        near = NearSlab(geometry, chunks * geometry.object_bytes, self._mover.allocate_host)
        self._mover.await_near(near, np.arange(near.page_count))
        before = set(threading.enumerate())
        self._executor = Executor(rank=0, tiers=Tiers(near), mover=self._mover, config=LoadConfig())
        self._threads = [
            time.pthread_getcpuclockid(thread.ident)
            for thread in set(threading.enumerate()) - before
            if thread.ident is not None
        ]
        self._pools = (self._executor._loader.pool, self._executor._saver.pool)
        for pool in self._pools:
            vars(pool)["submit"] = self._counting(pool.submit)
        self._chunks = chunks
        self._numbers = itertools.count()

    def close(self) -> None:
        """Stop its threads."""
        self._executor.close()

    def cost(self, kind: Kind) -> Cost:
        """The mean cost of a step."""
        for _ in range(_WARM):
            self._step(kind)
        self._device.counts.clear()
        others = self._others()
        engine = [self._step(kind) for _ in range(_STEPS)]
        counts = {what: self._device.counts[what] / _STEPS for what in Asked}
        return Cost(statistics.median(engine), (self._others() - others) / _STEPS, counts)

    def _step(self, kind: Kind) -> float:
        """Run a step, and wait until everything of it has ended; returns what it cost the engine's
        thread."""
        plan = self._plan(kind)
        executor, layers = self._executor, self._layers
        began = time.thread_time()
        executor.begin_step(plan)
        executor.start_loads()
        if executor.moves_rows:
            for layer in layers:
                executor.wait_layer(layer)
                executor.layer_written(layer)
        executor.end_step()
        executor.collect()
        cost = time.thread_time() - began
        self._await_end()
        return cost

    def _plan(self, kind: Kind) -> StepPlan:
        step = next(self._numbers)
        loads: tuple[LoadOrder, ...] = ()
        saves: tuple[SaveOrder, ...] = ()
        if kind is Kind.LOAD:
            pages = np.arange(self._chunks * _CHUNK_BLOCKS, dtype=np.int32)
            load = PageMap(0, pages, pages)
            loads = (LoadOrder(TransferId(step), "r", LoadMode.LAYERWISE, (load,), _TIMEOUT),)
        elif kind is Kind.DECODE:
            saves = tuple(
                SaveOrder(
                    TransferId(step * self._chunks + chunk),
                    f"r{chunk}",
                    chunk,
                    tuple(range(chunk * _CHUNK_BLOCKS, (chunk + 1) * _CHUNK_BLOCKS)),
                )
                for chunk in range(self._chunks)
            )
        return StepPlan(step, loads, saves)

    def _await_end(self) -> None:
        for pool in self._pools:
            pool.await_idle(_TIMEOUT)

    def _others(self) -> float:
        return sum(map(time.clock_gettime, self._threads))

    def _counting(self, submit: Callable[..., None]) -> Callable[..., None]:
        def counted(*arguments: Any) -> None:
            self._device.counts[Asked.JOB] += 1
            submit(*arguments)

        return counted

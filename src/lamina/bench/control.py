"""What the scheduler pays: lookups in a large catalog, plans for many requests, receipts, memory.

Control alone, without an engine, so that what is measured is Lamina and nothing else.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lamina.bench.progress import Progress
from lamina.bench.report import Machine, Report
from lamina.bench.samples import Samples, Target, Unit
from lamina.config import Config
from lamina.control.catalog import TierCatalog
from lamina.control.planner import Planner
from lamina.control.requests import ChunkShape, PushParameters
from lamina.keys import KEY_BYTES
from lamina.observe.metrics import Meter
from lamina.plan import (
    ChunkKey,
    Outcome,
    RankReport,
    Receipt,
    StepPlan,
    TransferReceipt,
)

LOOKUP_LIMIT, AGAIN_LIMIT, PLAN_LIMIT = 2e-3, 50e-6, 0.3e-3
"""Seconds that a first lookup, one more, and a plan may take."""

MEMORY_LIMIT = 200
"""Bytes that a chunk may take beyond its key."""

_BLOCK_TOKENS = 16
_CHUNK_BYTES = 1 << 20
_STEPS = 200


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """How large everything is.

    Attributes:
        chunks: chunks in the catalog.
        chunk_tokens: tokens of each.
        tokens: tokens of a prompt.
        requests: requests that run at once.
        repeat: repetitions.

    Raises:
        ValueError: names the option and what it must be.
    """

    chunks: int
    chunk_tokens: int
    tokens: int
    requests: int
    repeat: int

    def __post_init__(self) -> None:
        for name in ("chunks", "tokens", "requests", "repeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.chunk_tokens < 1 or self.chunk_tokens % _BLOCK_TOKENS:
            raise ValueError(
                f"--chunk-tokens must be a multiple of {_BLOCK_TOKENS}, got {self.chunk_tokens}"
            )
        if self.tokens // self.chunk_tokens > self.chunks:
            raise ValueError("--chunks must be enough for one prompt")


class _Pool:
    """An engine's block pool that costs nothing."""

    def hold(self, blocks: Sequence[int]) -> None:
        pass

    def free(self, blocks: Sequence[int]) -> None:
        pass


class _Request:
    """An engine's request that costs nothing."""

    recompute_tokens = 1
    root_extra = b""
    push: PushParameters | None = None

    def __init__(self, name: str, tokens: list[int]) -> None:
        self.request_id = name
        self._tokens = tokens
        self.num_prompt_tokens = len(tokens)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def tokens(self) -> Sequence[int]:
        return self._tokens

    def chunk_extra(self, start: int, end: int) -> bytes:
        return b""

    def blocks(self, group: int) -> Sequence[int]:
        return range(len(self._tokens) // _BLOCK_TOKENS + 1)

    def state_blocks(self, group: int, end: int) -> Sequence[int]:
        return ()


def measure(settings: ControlSettings, progress: Progress) -> Report:
    """Measure it."""
    machine = Machine.here()
    progress.say(f"filling a catalog with {settings.chunks:,} chunks")
    planner = _planner(settings)
    memory = _fill(planner._catalog.host, settings.chunks)
    arrivals, lookups, again = _lookups(planner, settings, progress)
    plans, completions, receipts = _steps(settings, progress)
    samples = (arrivals, lookups, again, plans, completions, receipts, memory)
    return Report(
        bench="control",
        title="What the scheduler pays",
        machine=machine,
        settings={name: getattr(settings, name) for name in ControlSettings.__slots__},
        samples=samples[:-1],
        compared="Promised",
        targets=(
            Target(lookups, Unit.SECONDS, LOOKUP_LIMIT),
            Target(again, Unit.SECONDS, AGAIN_LIMIT),
            Target(plans, Unit.SECONDS, PLAN_LIMIT),
            Target(memory, Unit.BYTES, MEMORY_LIMIT),
        ),
        notes=(
            f"A prompt of {settings.tokens:,} tokens; {settings.requests} requests that run.",
            "A prompt is hashed when it arrives. In a step in which all requests complete a chunk, "
            "each has a save ordered, and its receipt comes back.",
        ),
    )


def _planner(settings: ControlSettings) -> Planner:
    return Planner(
        Config(),
        ChunkShape.uniform(_BLOCK_TOKENS, settings.chunk_tokens),
        b"bench",
        _Pool(),
        [RankReport(0, settings.chunks, 0, _CHUNK_BYTES)],
        Meter(),
        reports_blocks=False,
    )


def _fill(host: TierCatalog, chunks: int) -> Samples:
    """Bytes that each chunk of a full catalog takes, beyond its key."""
    keys = [ChunkKey(os.urandom(KEY_BYTES)) for _ in range(chunks)]
    gc.collect()
    before = _resident_bytes()
    for key in keys:
        host.reserve(key)
        host.publish(key)
    return Samples("memory for a chunk", ((_resident_bytes() - before) / chunks,))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def _lookups(
    planner: Planner, settings: ControlSettings, progress: Progress
) -> tuple[Samples, Samples, Samples]:
    """Seconds of arrivals, first lookups and further ones of a prompt that is hit whole."""
    source = random.Random(0)
    tokens = [source.randrange(100_000) for _ in range(settings.tokens)]
    _let_be_found(planner, tokens)
    arrivals, first, again = [], [], []
    for i in range(settings.repeat):
        progress.say(f"lookup {i + 1} of {settings.repeat}")
        request = _Request(f"lookup {i}", tokens)
        began = time.perf_counter()
        planner.arrived(request)
        arrivals.append(time.perf_counter() - began)
        began = time.perf_counter()
        hit = planner.lookup(request, 0)
        first.append(time.perf_counter() - began)
        assert hit.tokens >= settings.tokens - settings.chunk_tokens, "it is all there"
        repeated = []
        for _ in range(_STEPS):
            began = time.perf_counter()
            planner.lookup(request, 0)
            repeated.append(time.perf_counter() - began)
        again.append(statistics.median(repeated))
        planner.finished(request.request_id, 0, [()])
    return (
        Samples("arrival of a prompt", tuple(arrivals)),
        Samples("its first lookup", tuple(first)),
        Samples("another one while it waits", tuple(again)),
    )


def _let_be_found(planner: Planner, tokens: list[int]) -> None:
    """Save a prompt."""
    request = _Request("writer", tokens)
    planner.lookup(request, 0)
    planner.admitted(request.request_id, 0)
    while (plan := planner.plan_step([("writer", 0, len(tokens))], forward=True)).saves:
        _answer(planner, plan)
    planner.finished(request.request_id, len(tokens), [request.blocks(0)])


def _answer(planner: Planner, plan: StepPlan) -> None:
    receipts = tuple(TransferReceipt(o.transfer, Outcome.DONE, _CHUNK_BYTES) for o in plan.saves)
    planner.receive([Receipt(0, receipts)])


def _steps(settings: ControlSettings, progress: Progress) -> tuple[Samples, Samples, Samples]:
    """Seconds of a plan in which nothing is complete, of one in which every request has completed a
    chunk, and of the receipts of its saves."""
    chunk, plain, complete, received = settings.chunk_tokens, [], [], []
    for i in range(settings.repeat):
        progress.say(f"steps {i + 1} of {settings.repeat}")
        planner = _planner(settings)
        requests = [
            _Request(f"running {n}", [n] * chunk * (_STEPS + 2)) for n in range(settings.requests)
        ]
        for request in requests:
            planner.lookup(request, 0)
            planner.admitted(request.request_id, 0)
        names = [request.request_id for request in requests]
        whole, part, receipts = [], [], []
        for step in range(1, _STEPS + 1):
            last = chunk * step
            begin = time.perf_counter()
            planner.plan_step([(name, last - chunk, last - 1) for name in names], forward=True)
            part.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            plan = planner.plan_step([(name, last - 1, last) for name in names], forward=True)
            whole.append(time.perf_counter() - begin)
            assert len(plan.saves) == settings.requests, "each has completed a chunk"
            begin = time.perf_counter()
            _answer(planner, plan)
            receipts.append(time.perf_counter() - begin)
        plain.append(statistics.median(part))
        complete.append(statistics.median(whole))
        received.append(statistics.median(receipts))
    return (
        Samples("plan of a step", tuple(plain)),
        Samples("plan of one that completes chunks", tuple(complete)),
        Samples("receipts of their saves", tuple(received)),
    )

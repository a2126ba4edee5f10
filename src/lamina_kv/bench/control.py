"""What the scheduler pays: lookups in a large catalog, plans for many requests that run, wait or
are held back, ends of long requests, receipts, memory.

Control alone, without an engine, so that what is measured is Lamina and nothing else.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lamina_kv.bench.progress import Progress
from lamina_kv.bench.report import Machine, Report
from lamina_kv.bench.samples import Samples, Target, Unit
from lamina_kv.config import load_config
from lamina_kv.control.planner import Planner
from lamina_kv.control.requests import PushParameters
from lamina_kv.control.shape import ChunkShape
from lamina_kv.keys import KEY_BYTES, key_array
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import (
    ChunkKey,
    Outcome,
    RankReport,
    Receipt,
    StepPlan,
    StoredChunks,
    TierName,
    TierReport,
    TransferReceipt,
    marks_of,
)
from lamina_kv.tiers.regard import USUAL
from lamina_kv.tiers.slots import SlotIndex

LOOKUP_LIMIT, AGAIN_LIMIT, PLAN_LIMIT = 2e-3, 50e-6, 0.3e-3
"""Seconds that a first lookup, one more, and a plan may take."""

LOAD_LIMIT = 2e-3
"""Seconds that the order of a load of 2,048 chunks may take, the rank's part of it included."""

QUEUE_LIMIT = 2e-3
"""Seconds that a plan may take however many requests wait, and the end of a request however long
it is."""

CROWD_LIMIT = 30e-3
"""Seconds for which an engine may ask for all requests that wait, one after the other, before one
step: some 10 ms to look some of them up, and as long to say of each that it still waits."""

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
        waiting: requests that wait at once.
        waiting_tokens: tokens of each of those.
        repeat: repetitions.

    Raises:
        ValueError: names the option and what it must be.
    """

    chunks: int
    chunk_tokens: int
    tokens: int
    requests: int
    waiting: int
    waiting_tokens: int
    repeat: int

    def __post_init__(self) -> None:
        for name in ("chunks", "tokens", "requests", "waiting", "waiting_tokens", "repeat"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be at least 1, got {getattr(self, name)}")
        if self.chunk_tokens < 1 or self.chunk_tokens % _BLOCK_TOKENS:
            raise ValueError(
                f"--chunk-tokens must be a multiple of {_BLOCK_TOKENS}, got {self.chunk_tokens}"
            )
        if max(self.tokens, self.waiting_tokens) // self.chunk_tokens > self.chunks:
            raise ValueError("--chunks must be enough for one prompt")


class _Pool:
    """An engine's block pool that costs nothing."""

    def hold(self, blocks: Sequence[int]) -> None:
        pass

    def free(self, blocks: Sequence[int]) -> None:
        pass


class _Request:
    """An engine's request that costs nothing.

    Args:
        name: its name.
        tokens: all that are known of it.
        prompt: how many of them are its prompt; None for all.
    """

    recompute_tokens = 1
    root_extra = b""
    push: PushParameters | None = None
    regard = USUAL

    def __init__(self, name: str, tokens: list[int], prompt: int | None = None) -> None:
        self.request_id = name
        self._tokens = tokens
        self.num_prompt_tokens = len(tokens) if prompt is None else prompt

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
    memory = _fill(planner._books.catalog.near, settings.chunks)
    arrivals, lookups, again, loads = _lookups(planner, settings, progress)
    plans, completions, receipts = _steps(settings, progress)
    queues = (
        *_queue(settings, progress, 1, "in host memory"),
        *_queue(settings, progress, 2, "far, every second"),
    )
    beside_crowd, crowd = _crowd(settings, progress)
    held_back, ends = _held_back(settings, progress), _ends(settings, progress)
    samples = (
        arrivals, lookups, again, loads, plans, completions, receipts, *queues,
        beside_crowd, crowd, held_back, ends, memory,
    )  # fmt: skip
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
            Target(loads, Unit.SECONDS, LOAD_LIMIT),
            Target(plans, Unit.SECONDS, PLAN_LIMIT),
            *(Target(queue, Unit.SECONDS, QUEUE_LIMIT) for queue in queues),
            Target(beside_crowd, Unit.SECONDS, QUEUE_LIMIT),
            Target(crowd, Unit.SECONDS, CROWD_LIMIT),
            Target(held_back, Unit.SECONDS, PLAN_LIMIT),
            Target(ends, Unit.SECONDS, QUEUE_LIMIT),
            Target(memory, Unit.BYTES, MEMORY_LIMIT),
        ),
        notes=(
            f"A prompt of {settings.tokens:,} tokens; {settings.requests} requests that run; "
            f"{settings.waiting:,} of {settings.waiting_tokens:,} tokens that wait.",
            "A prompt is hashed when it arrives. In a step in which all requests complete a chunk, "
            "each has a save ordered, and its receipt comes back. Python's garbage collector rests "
            "beside the queues: the requests are not Lamina's.",
        ),
    )


def _planner(
    settings: ControlSettings, far: Sequence[ChunkKey] | None = None, **save: object
) -> Planner:
    """A planner whose tiers are empty; with a far tier that has ``far`` if that is given."""
    tree: dict[str, object] = {"load": {"when": "always"}, "save": save}
    tiers: tuple[TierReport, ...] = ()
    if far is not None:
        capacity = settings.chunks * _CHUNK_BYTES
        tree["tiers"] = [{"kind": "disk", "path": "/nowhere", "capacity": capacity}]
        keys = key_array(far)
        slots = np.arange(len(far), dtype=np.int32)
        stored = StoredChunks(slots, marks_of(keys), keys, slots.astype(np.float64))
        tiers = (TierReport(TierName("disk"), settings.chunks, stored),)
    return Planner(
        load_config(tree, {}),
        ChunkShape.uniform(_BLOCK_TOKENS, settings.chunk_tokens),
        b"bench",
        _Pool(),
        [RankReport(0, settings.chunks, _CHUNK_BYTES, tiers)],
        Meter(),
    )


def _fill(near: SlotIndex, chunks: int) -> Samples:
    """Bytes that each chunk of a full catalog takes, beyond its key."""
    keys = [ChunkKey(os.urandom(KEY_BYTES)) for _ in range(chunks)]
    gc.collect()
    before = _resident_bytes()
    for key in keys:
        near.room(key)
        near.filled(key)
    return Samples("memory for a chunk", ((_resident_bytes() - before) / chunks,))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def _lookups(
    planner: Planner, settings: ControlSettings, progress: Progress
) -> tuple[Samples, Samples, Samples, Samples]:
    """Seconds of arrivals, first lookups, further ones and orders to load of a prompt that is hit
    whole."""
    source = random.Random(0)
    tokens = [source.randrange(100_000) for _ in range(settings.tokens)]
    _let_be_found(planner, tokens)
    arrivals, first, again, loads = [], [], [], []
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
        began = time.perf_counter()
        planner.admitted(request.request_id, hit.tokens)
        plan = planner.plan_step([(request.request_id, hit.tokens, settings.tokens)], forward=True)
        loads.append(time.perf_counter() - began)
        assert plan.loads, "it is loaded"
        _answer(planner, plan)
        planner.finished(request.request_id, 0, [()])
    return (
        Samples("arrival of a prompt", tuple(arrivals)),
        Samples("its first lookup", tuple(first)),
        Samples("another one while it waits", tuple(again)),
        Samples("order to load it, and the plan", tuple(loads)),
    )


def _let_be_found(planner: Planner, tokens: list[int]) -> None:
    """Save a prompt."""
    request = _Request("writer", tokens)
    planner.lookup(request, 0)
    planner.admitted(request.request_id, 0)
    saves = True
    while saves:
        plan = planner.plan_step([("writer", 0, len(tokens))], forward=True)
        _answer(planner, plan)  # its writes, too
        saves = bool(plan.saves)
    planner.finished(request.request_id, len(tokens), [request.blocks(0)])


def _answer(planner: Planner, plan: StepPlan) -> None:
    transfers = [order.transfer for order in plan.loads]
    transfers += [order.transfer for order in plan.saves]
    for orders in plan.tiers:
        transfers += [move.transfer for move in (*orders.outward, *orders.inward)]
    receipts = tuple(TransferReceipt(t, Outcome.DONE, _CHUNK_BYTES) for t in transfers)
    planner.receive([Receipt(0, receipts)])


def _queue(
    settings: ControlSettings, progress: Progress, every: int, where: str
) -> tuple[Samples, Samples]:
    """Seconds of the first plan after many requests have arrived, and of the longest later one.

    Args:
        settings: how large everything is.
        progress: told how far it is.
        every: of so many requests one needs what is in host memory; the others need what only the
            far tier has.
        where: says so.
    """
    in_host = [1] * settings.waiting_tokens
    in_far = [2] * settings.waiting_tokens
    probe = _planner(settings)
    probe.arrived(_Request("probe", in_far))
    (keys,) = probe._requests["probe"].known_keys()
    first, later = [], []
    for i in range(settings.repeat):
        progress.say(f"a queue {where}, {i + 1} of {settings.repeat}")
        planner = _planner(settings, keys)
        _let_be_found(planner, in_host)
        while planner.has_work:
            _answer(planner, planner.plan_step((), forward=False))
        for n in range(settings.waiting):
            planner.arrived(_Request(f"waiting {n}", in_far if n % every else in_host))
        times = []
        gc.collect()
        gc.disable()
        try:
            for _ in range(_STEPS):
                began = time.perf_counter()
                plan = planner.plan_step((), forward=True)
                times.append(time.perf_counter() - began)
                _answer(planner, plan)
        finally:
            gc.enable()
        first.append(times[0])
        later.append(max(times[1:]))
    return (
        Samples(f"first plan beside a queue, {where}", tuple(first)),
        Samples("longest later one", tuple(later)),
    )


def _crowd(settings: ControlSettings, progress: Progress) -> tuple[Samples, Samples]:
    """Seconds of the longest plan, and of the longest lookups before one, while many requests wait
    for far tiers that have every second chunk of their prompts. Each has a prompt of its own, and
    near has room for all."""
    chunks = settings.waiting_tokens // settings.chunk_tokens
    size = min(settings.waiting, settings.chunks // max(1, chunks))
    crowd = [
        _Request(f"waiting {n}", [n, *([1] * (settings.waiting_tokens - 1))]) for n in range(size)
    ]
    probe, keys = _planner(settings), []
    for request in crowd:
        probe.arrived(request)
        keys += probe._requests[request.request_id].known_keys()[0]
    plans, lookups = [], []
    for i in range(settings.repeat):
        progress.say(f"{size:,} requests that wait for far tiers, {i + 1} of {settings.repeat}")
        planner = _planner(settings, keys[1::2])
        near = planner._books.catalog.near
        for key in keys[0::2]:
            near.room(key)
            near.filled(key)
        for request in crowd:
            planner.arrived(request)
        each = _steps_of_a_crowd(planner, crowd)
        plans.append(max(plan for plan, _ in each))
        lookups.append(max(asked for _, asked in each))
    return (
        Samples("longest plan beside a crowd that waits for far tiers", tuple(plans)),
        Samples("longest lookups of all of the crowd", tuple(lookups)),
    )


def _steps_of_a_crowd(planner: Planner, crowd: Sequence[_Request]) -> list[tuple[float, float]]:
    """Seconds of the plan of each step, and of the lookups of all that still wait before it."""
    waiting, times = list(crowd), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(_STEPS):
            began = time.perf_counter()
            begin = [request for request in waiting if not planner.lookup(request, 0).ask_again]
            asked = time.perf_counter() - began
            for request in begin:
                planner.finished(request.request_id, 0, [()])
                waiting.remove(request)
            began = time.perf_counter()
            plan = planner.plan_step((), forward=True)
            times.append((time.perf_counter() - began, asked))
            _answer(planner, plan)
    finally:
        gc.enable()
    return times


def _held_back(settings: ControlSettings, progress: Progress) -> Samples:
    """Seconds of a plan in which every request that runs has a save that finds no room."""
    times = []
    for i in range(settings.repeat):
        progress.say(f"saves that are held back, {i + 1} of {settings.repeat}")
        planner = _planner(settings, max_inflight=_CHUNK_BYTES)
        runs = []
        for n in range(settings.requests):
            request = _Request(f"running {n}", [n] * 4 * settings.chunk_tokens, prompt=1)
            planner.lookup(request, 0)
            planner.admitted(request.request_id, 0)
            runs.append((request.request_id, 0, request.num_tokens))
        planner.plan_step(runs, forward=True)
        each = []
        for _ in range(_STEPS):
            began = time.perf_counter()
            planner.plan_step(runs, forward=True)
            each.append(time.perf_counter() - began)
        times.append(statistics.median(each))
    return Samples("plan of one in which all saves are held back", tuple(times))


def _ends(settings: ControlSettings, progress: Progress) -> Samples:
    """Seconds of the end of a request whose chunks are all kept."""
    times = []
    for i in range(settings.repeat):
        progress.say(f"end {i + 1} of {settings.repeat}")
        planner, tokens = _planner(settings), [i] * settings.tokens
        _let_be_found(planner, tokens)
        request = _Request("ending", tokens)
        planner.admitted(request.request_id, planner.lookup(request, 0).tokens)
        began = time.perf_counter()
        planner.finished(request.request_id, settings.tokens, [request.blocks(0)])
        times.append(time.perf_counter() - began)
    return Samples("end of a request", tuple(times))


def _steps(settings: ControlSettings, progress: Progress) -> tuple[Samples, Samples, Samples]:
    """Seconds of a plan in which nothing is complete, of one in which every request has completed a
    chunk, and of the receipts of its saves."""
    chunk, plain, complete, received = settings.chunk_tokens, [], [], []
    room = replace(settings, chunks=max(settings.chunks, settings.requests * _STEPS))
    for i in range(settings.repeat):
        progress.say(f"steps {i + 1} of {settings.repeat}")
        planner = _planner(room)
        requests = [
            _Request(f"running {n}", [n] * chunk * (_STEPS + 2), prompt=1)
            for n in range(settings.requests)
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

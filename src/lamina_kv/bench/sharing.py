"""What one store that many engines share would have been worth to the requests of a trace."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lamina_kv.bench.engine import BenchError
from lamina_kv.bench.fleet import Fleet, FleetReplay, FleetShape, Keep, Routing, StoreShape
from lamina_kv.bench.progress import Progress
from lamina_kv.bench.replay import Pace
from lamina_kv.bench.trace import blocks_of
from lamina_kv.bench.trace_file import Trace, read_trace
from lamina_kv.values import GIB

E = TypeVar("E", bound=StrEnum)

_NAMES = {Keep.NOTHING: "no store", Keep.SHARED: "keep: shared", Keep.ALL: "keep: all"}


@dataclass(frozen=True, slots=True)
class SharingSettings:
    """What is asked.

    Attributes:
        path: the trace.
        engines: how many share the requests.
        host: capacities of each engine's host memory, as
            :func:`~lamina_kv.bench.trace.blocks_of` reads them.
        bandwidths: of the store, GB/s, infinite for no limit. There is one host capacity and one
            bandwidth, or as many of one as of the other; these belong together one by one.
        capacity: of the store.
        latency: seconds of each call of the store.
        keeps: what is compared.
        routings: likewise.
        pace: how fast each engine is.
        block_bytes: bytes of one block; 0 for what the trace says.

    Raises:
        ValueError: names the option and what it must be.
    """

    path: Path
    engines: int
    host: tuple[str, ...]
    bandwidths: tuple[float, ...]
    capacity: str
    latency: float
    keeps: tuple[Keep, ...]
    routings: tuple[Routing, ...]
    pace: Pace
    block_bytes: int = 0

    def __post_init__(self) -> None:
        if self.engines < 1:
            raise ValueError(f"--engines must be at least 1, got {self.engines}")
        for bandwidth in self.bandwidths:
            if not bandwidth > 0:
                raise ValueError(
                    f"--store-gb-per-second must be above 0, or inf for no limit, got {bandwidth:g}"
                )
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"--store-latency-ms must be at least 0, got {1e3 * self.latency:g}")
        if len({len(self.host), len(self.bandwidths)} - {1}) > 1:
            raise ValueError(
                "--host and --store-gb-per-second must have one value each, or equally many, got "
                f"{len(self.host)} and {len(self.bandwidths)}"
            )
        for size in (*self.host, self.capacity):
            blocks_of(size, 1, 1)

    @property
    def points(self) -> list[tuple[str, float]]:
        """What belongs together: a capacity of host memory and a bandwidth."""
        count = max(len(self.host), len(self.bandwidths))
        return [
            (self.host[i % len(self.host)], self.bandwidths[i % len(self.bandwidths)])
            for i in range(count)
        ]


def words(option: str, text: str, kind: type[E]) -> tuple[E, ...]:
    """The words of a list with commas, each once.

    Raises:
        ValueError: names the option and the words.
    """
    try:
        return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
    except ValueError:
        known = ", ".join(kind)
        raise ValueError(f"{option} must be some of {known}, got {text!r}") from None


@dataclass(frozen=True, slots=True)
class SharingPoint:
    """One fleet.

    Attributes:
        shape: the fleet.
        replay: what became of the trace.
        near: share of the blocks of all prompts that came from the engine's own host memory.
        store: share that came from the store.
        wait: seconds that a request which could begin has waited for the store while its engine
            computed nothing; mean.
        longest: the same, of all but one in a hundred.
        saved: prefill that was saved less all waits, as a share of the prefill of all prompts.
        first: seconds to the first token; mean.
    """

    shape: FleetShape
    replay: FleetReplay
    near: float
    store: float
    wait: float
    longest: float
    saved: float
    first: float

    @property
    def bandwidth(self) -> float:
        """GB/s of the store."""
        return self.shape.store.bandwidth / 1e9


def _point(trace: Trace, shape: FleetShape, replay: FleetReplay) -> SharingPoint:
    waits = sorted(replay.waits) or [0.0]
    near, store = replay.near / trace.blocks, replay.store / trace.blocks
    prefill = trace.blocks * trace.block_tokens / shape.pace.prefill
    return SharingPoint(
        shape,
        replay,
        near,
        store,
        fmean(waits),
        waits[int(0.99 * (len(waits) - 1))],
        near + store - sum(waits) / prefill,
        fmean(replay.firsts),
    )


@dataclass(frozen=True, slots=True)
class SharingReport:
    """What the replays found.

    Attributes:
        settings: what was asked.
        trace: the trace.
        points: one for each fleet.
    """

    settings: SharingSettings
    trace: Trace
    points: tuple[SharingPoint, ...]

    def of(self, routing: Routing) -> list[SharingPoint]:
        """The fleets whose requests are spread in one way."""
        return [point for point in self.points if point.shape.routing is routing]

    def private(self, shape: FleetShape) -> SharingPoint | None:
        """The same fleet without a store, if it was asked for."""
        return next(
            (
                point
                for point in self.of(shape.routing)
                if point.shape.near == shape.near and point.shape.keep is Keep.NOTHING
            ),
            None,
        )

    def as_json(self) -> str:
        """Everything, for a program."""
        trace, settings = self.trace, self.settings
        document: dict[str, Any] = {
            "bench": "sharing",
            "trace": {
                "requests": len(trace.requests),
                "blocks": trace.blocks,
                "different": trace.different,
                "block_tokens": trace.block_tokens,
                "block_bytes": trace.block_bytes,
            },
            "settings": {
                "engines": settings.engines,
                "latency": settings.latency,
                "prefill": settings.pace.prefill,
                "decode": settings.pace.decode,
                "running": settings.pace.running,
            },
            "points": [self._document(point) for point in self.points],
        }
        return json.dumps(document, indent=2) + "\n"

    def _document(self, point: SharingPoint) -> dict[str, Any]:
        shape, replay, size = point.shape, point.replay, self.trace.block_bytes
        limited = math.isfinite(point.bandwidth)
        return {
            "routing": shape.routing.value,
            "host_blocks": shape.near,
            "keep": shape.keep.value,
            "store_blocks": shape.store.capacity,
            "gb_per_second": point.bandwidth if limited else None,
            "found": {"host": point.near, "store": point.store},
            "written_bytes": replay.written * size,
            "written_again_bytes": replay.again * size,
            "read_bytes": replay.read * size,
            "gone": replay.gone,
            "evicted": replay.evicted,
            "waits": len(replay.waits),
            "wait_mean": point.wait,
            "wait_p99": point.longest,
            "wait_sum": sum(replay.waits),
            "saved": point.saved,
            "first_token_mean": point.first,
        }

    def as_table(self) -> RenderableType:
        """The same, for a person."""
        trace, settings, pace = self.trace, self.settings, self.settings.pace
        notes = (
            f"{len(trace.requests):,} requests, {trace.blocks:,} blocks of {trace.block_tokens} "
            f"tokens, {trace.different:,} different ones; {settings.engines} engines, "
            f"{pace.prefill:,g} tokens/s of prefill each.",
            "saved: prefill not computed less all waits, of all prefill. wait: of requests that "
            "could begin, while nothing is computed; mean and 99 %. first: first token, mean.",
        )
        tables = [self._table(routing) for routing in settings.routings]
        return Group(*tables, *(Text(note, style="dim") for note in notes))

    def _table(self, routing: Routing) -> Table:
        table = Table(title=f"Blocks of prompts, %: {routing}", title_justify="left")
        for name in ("host", "store", "keep"):
            table.add_column(name, no_wrap=True)
        for name in ("near", "store", "saved", "written", "read", "wait", "first"):
            table.add_column(name, justify="right", no_wrap=True)
        before = None
        for point in self.of(routing):
            shape, replay = point.shape, point.replay
            where = self.gibibytes(shape.near), _bandwidth(point)
            same, before = where == before, where
            table.add_row(
                *(("", "") if same else where),
                shape.keep.value,
                *(f"{100 * share:.1f}" for share in (point.near, point.store, point.saved)),
                *(self.gibibytes(blocks) for blocks in (replay.written, replay.read)),
                f"{_seconds(point.wait)}, {_seconds(point.longest)}",
                _seconds(point.first),
            )
        return table

    def gibibytes(self, blocks: int) -> str:
        """So many blocks, for a person."""
        size = blocks * self.trace.block_bytes / GIB
        return f"{size:,.0f} GiB" if size >= 10 or not size else f"{size:.2g} GiB"


def _bandwidth(point: SharingPoint) -> str:
    return f"{point.bandwidth:g} GB/s" if math.isfinite(point.bandwidth) else "no limit"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def measure(settings: SharingSettings, progress: Progress) -> SharingReport:
    """Replay the trace through every fleet.

    Raises:
        BenchError: if the file is no trace, or nobody says how large a block is.
    """
    progress.say(f"reading {settings.path}")
    try:
        trace = read_trace(settings.path, settings.block_bytes)
        settings = replace(settings, pace=settings.pace.of(trace))
        shapes = list(dict.fromkeys(_shapes(settings, trace)))
    except (OSError, ValueError) as error:
        raise BenchError(f"{settings.path}: {error}") from error
    points = []
    for number, shape in enumerate(shapes, 1):
        what = f"fleet {number} of {len(shapes)}: {shape.routing}, keep {shape.keep}"
        ended = progress.bar(what, trace.blocks)
        with _without_warnings():
            points.append(_point(trace, shape, Fleet(trace, shape, ended).run()))
    return SharingReport(settings, trace, tuple(points))


def _shapes(settings: SharingSettings, trace: Trace) -> Iterator[FleetShape]:
    """Every fleet that is asked for; ValueError if nobody says how large a block is."""
    if not trace.block_bytes:
        raise ValueError(
            "the trace does not say how large a block is, and a store moves bytes: give "
            "--block-size, in bytes"
        )

    def blocks(size: str) -> int:
        return blocks_of(size, trace.different, trace.block_bytes)

    for routing in settings.routings:
        for host, bandwidth in settings.points:
            for keep in settings.keeps:
                # Without a store it makes no difference how fast that is.
                limit = math.inf if keep is Keep.NOTHING else bandwidth * 1e9
                store = StoreShape(blocks(settings.capacity), limit, settings.latency)
                yield FleetShape(
                    settings.engines, blocks(host), routing, keep, store, settings.pace
                )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """A store that is too slow is what is asked about: what engines would warn of is no news."""
    log = logging.getLogger("lamina_kv.control")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def draw(report: SharingReport, path: Path) -> None:
    """Draw what is found by host capacity, and what is saved by bandwidth. Needs matplotlib.

    What is found is drawn of the largest bandwidth of each capacity, unless only bandwidths differ;
    what is saved, where there are limited ones.
    """
    from lamina_kv.bench.plots import Bars, draw_sharing

    found: dict[str, Bars] = {}
    saved: dict[str, list[tuple[float, float]]] = {}
    hosts = dict.fromkeys(report.gibibytes(point.shape.near) for point in report.points)
    limited = {p.shape.near for p in report.points if math.isfinite(p.bandwidth)}
    for routing in report.settings.routings:
        fastest: dict[tuple[str, Keep], SharingPoint] = {}
        for point in sorted(report.of(routing), key=lambda point: point.bandwidth):
            host, keep = report.gibibytes(point.shape.near), point.shape.keep
            fastest[host, keep] = point
            if keep is Keep.NOTHING or math.isfinite(point.bandwidth):
                name = f"{_NAMES[keep]}, {routing}, {host}"
                if point.shape.near in limited:
                    saved.setdefault(name, []).append((point.bandwidth, 100 * point.saved))
        found[f"Found, {routing}"] = {
            host: {
                _NAMES[keep]: (100 * fastest[host, keep].near, 100 * fastest[host, keep].store)
                for keep in report.settings.keeps
            }
            for host in hosts
        }
    draw_sharing({} if saved and len(hosts) == 1 else found, saved, path)

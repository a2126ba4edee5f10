"""What tiers of several sizes would have been worth to the requests of a trace.

The trace goes through Lamina's own planner and eviction, without an engine; beside it through
policies of the literature, in the same order of lookups and arrivals.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lamina_kv.bench.engine import BenchError
from lamina_kv.bench.policies import OPTIMUM, blocks_found, others
from lamina_kv.bench.progress import Progress
from lamina_kv.bench.replay import Engine, Pace
from lamina_kv.bench.trace_file import Trace, read_trace
from lamina_kv.quantities import size_of, time_of
from lamina_kv.values import GIB, SIZE, WrongValueError

_SHARE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%")
LAMINA = "Lamina"
_PLACES = {"host": "host memory"}


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """What is asked.

    Attributes:
        path: the trace.
        host: capacities of host memory, each as :func:`blocks_of` reads them.
        far: of each far tier likewise. Every tier has one capacity, or as many as the others that
            have several; these belong together one by one.
        pace: how fast the engine is.
        block_bytes: bytes of one block; 0 for what the trace says.
        engine: capacity of the engine's own cache, likewise; "0" for none.

    Raises:
        ValueError: names the option and what it must be.
    """

    path: Path
    host: tuple[str, ...]
    far: tuple[tuple[str, ...], ...]
    pace: Pace
    block_bytes: int = 0
    engine: str = "0"

    def __post_init__(self) -> None:
        for name, rate in (("prefill", self.pace.prefill), ("decode", self.pace.decode)):
            if not 0 < rate < math.inf:
                raise ValueError(f"--{name} must be a number of tokens a second, got {rate}")
        if self.pace.running < 1:
            raise ValueError(f"--running must be at least 1, got {self.pace.running}")
        lengths = {len(sizes) for sizes in (self.host, *self.far)}
        if len(lengths - {1}) > 1:
            raise ValueError(
                "--host and --far must have one capacity each, or equally many, got "
                + " and ".join(map(str, sorted(lengths)))
            )
        for size in (*self.host, *(size for sizes in self.far for size in sizes)):
            blocks_of(size, 1, 1)
        self.engine_blocks(1, 1)

    def engine_blocks(self, different: int, block_bytes: int) -> int:
        """Blocks of the engine's own cache; arguments and errors as those of :func:`blocks_of`."""
        return blocks_of(self.engine, different, block_bytes) if self.has_engine else 0

    @property
    def has_engine(self) -> bool:
        """Whether the engine has a cache of its own."""
        return self.engine.strip() != "0"

    @property
    def capacities(self) -> list[tuple[str, ...]]:
        """What belongs together: the capacity of each tier."""
        tiers = (self.host, *self.far)
        count = max(map(len, tiers))
        return [tuple(sizes[i if len(sizes) > 1 else 0] for sizes in tiers) for i in range(count)]


def blocks_of(size: str, different: int, block_bytes: int) -> int:
    """How many blocks a capacity is, at least one.

    Args:
        size: blocks as ``5000``, a share of the different blocks as ``3%``, or bytes as ``64GiB``.
        different: different blocks of the trace.
        block_bytes: bytes of one; 0 if nobody knows.

    Raises:
        ValueError: if ``size`` is none of these, or nobody knows how large a block is.
    """
    if match := _SHARE.fullmatch(size.strip()):
        return max(1, int(float(match[1]) * different / 100 + 1e-6))
    if size.strip().isdecimal() and int(size):
        return int(size)
    try:
        parsed = SIZE.parse(size)
    except WrongValueError:
        parsed = 0
    if not isinstance(parsed, int) or not parsed:
        raise ValueError(
            f'a capacity must be blocks such as "5000", a share of the different blocks such as '
            f'"3%", or a size such as "64GiB", got {size!r}'
        )
    if not block_bytes:
        raise ValueError(
            f"the trace does not say how large a block is, so {size} cannot be counted in blocks: "
            f"give --block-size, in bytes, or capacities in blocks or percent"
        )
    return max(1, parsed // block_bytes)


def parse_size(option: str, size: str) -> int:
    """Bytes, as a size of the configuration is written.

    Raises:
        ValueError: names the option.
    """
    try:
        parsed = SIZE.parse(int(size) if size.isdecimal() else size)
    except WrongValueError:
        raise ValueError(f"{option} must be {SIZE.words}, got {size!r}") from None
    assert isinstance(parsed, int), "sizes are integers"
    return parsed


@dataclass(frozen=True, slots=True)
class Point:
    """One capacity.

    Attributes:
        tiers: blocks of each tier, by name; host memory first.
        rates: share of the blocks of all prompts that were found again, by policy.
        parts: of Lamina's share, that of each tier.
        saved: seconds of prefill that were saved, by the tier that had the blocks.
        seconds: virtual seconds that the trace took.
        had: share of the blocks that the engine had itself. What tiers find comes on top.
    """

    tiers: Mapping[str, int]
    rates: Mapping[str, float]
    parts: Mapping[str, float]
    saved: Mapping[str, float]
    seconds: float
    had: float = 0.0

    @property
    def blocks(self) -> int:
        """Blocks of all tiers together, which is what the other policies have."""
        return sum(self.tiers.values())


@dataclass(frozen=True, slots=True)
class TraceReport:
    """What the replays found.

    Attributes:
        settings: what was asked; its pace is the one that was replayed.
        trace: the trace.
        points: one for each capacity, the smallest first.
        engine: blocks of the engine's own cache.
    """

    settings: TraceSettings
    trace: Trace
    points: tuple[Point, ...]
    engine: int = 0

    def as_json(self) -> str:
        """Everything, for a program."""
        trace, pace = self.trace, self.settings.pace
        document: dict[str, Any] = {
            "bench": "trace",
            "trace": {
                "requests": len(trace.requests),
                "blocks": trace.blocks,
                "different": trace.different,
                "block_tokens": trace.block_tokens,
                "block_bytes": trace.block_bytes,
                "most_found": self._most,
                "prefill_seconds": self._prefill,
                "prefill_measured": self._is_measured,
            },
            "settings": {
                "prefill": pace.prefill,
                "decode": pace.decode,
                "running": pace.running,
                "engine": self.engine,
            },
            "points": [
                {
                    "tiers": dict(point.tiers),
                    "blocks": point.blocks,
                    "found": dict(point.rates),
                    "found_by_tier": dict(point.parts),
                    "found_in_engine": point.had,
                    "saved_seconds_by_tier": dict(point.saved),
                    "seconds": point.seconds,
                }
                for point in self.points
            ],
            "answer": self.answer(),
            "worth": self.worth(),
        }
        return json.dumps(document, indent=2) + "\n"

    def as_table(self) -> RenderableType:
        """The same, for a person."""
        trace, pace = self.trace, self.settings.pace
        table = Table(title="Blocks found again, %", title_justify="left", title_style="bold")
        several = len(self.points[0].tiers) > 1
        table.add_column("capacity", no_wrap=True)
        table.add_column("by tier" if several else "of all", justify="right", no_wrap=True)
        for name in self.points[0].rates:
            table.add_column(name, justify="right", style="bold" if name == LAMINA else "")
        for point in self.points:
            lines = [
                (
                    f"{name} {self._size(blocks)}" if several else self._size(blocks),
                    f"{100 * point.parts[name]:.2f}" if several else self._share(blocks),
                )
                for name, blocks in point.tiers.items()
            ]
            sizes, beside = ("\n".join(column) for column in zip(*lines, strict=True))
            rates = (f"{100 * rate:.2f}" for rate in point.rates.values())
            table.add_row(sizes, beside, *rates)
        order = (
            "one request after the other"
            if pace.running == 1
            else f"up to {pace.running} requests at once, {pace.prefill:,g} tokens/s of prefill, "
            f"{pace.decode:,g} tokens/s of decode each"
        )
        notes = (
            f"{len(trace.requests):,} requests, {trace.blocks:,} blocks of {trace.block_tokens} "
            f"tokens, {trace.different:,} different ones; {order}.",
            f"Other policies have one tier as large as all of Lamina's together. {OPTIMUM} knows "
            f"the future: nothing can be better.",
            *self._said_of_engine(),
        )
        speed = (
            "as the server has measured it."
            if self._is_measured
            else f"at {pace.prefill:,g} tokens a second: --prefill says another speed."
        )
        prefill = f"All of it is {time_of(self._prefill)} of prefill, {speed}"
        said = [Text(self.answer()), Text(self.worth())]
        said += (Text(note, style="dim") for note in (*notes, prefill))
        return Group(table, self._by_tier(), *said)

    def _by_tier(self) -> Table:
        """What each tier finds, and what that saves."""
        table = Table(title="Worth of each tier", title_justify="left", title_style="bold")
        table.add_column("capacity", no_wrap=True)
        table.add_column("tier", no_wrap=True)
        for heading in ("found, %", "prefill saved", "of all, %"):
            table.add_column(heading, justify="right", no_wrap=True)
        for point in self.points:
            for name, blocks in point.tiers.items():
                saved = point.saved[name]
                table.add_row(
                    self._size(blocks),
                    name,
                    f"{100 * point.parts[name]:.2f}",
                    time_of(saved),
                    f"{100 * saved / self._prefill:.1f}" if self._prefill else "",
                )
        return table

    def _said_of_engine(self) -> list[str]:
        if not self.engine:
            return []
        least, most = (f"{100 * of(point.had for point in self.points):.1f}" for of in (min, max))
        had = least if least == most else f"{least} to {most}"
        return [
            f"The engine's own cache of {self._size(self.engine)} finds {had} % of all "
            f"blocks. What tiers find comes on top, and so does what other policies find."
        ]

    @property
    def _most(self) -> float:
        """Share of all blocks that a tier without bounds would find."""
        return self.trace.most_found / self.trace.blocks

    @property
    def _prefill(self) -> float:
        """Seconds of prefill without any tier."""
        pace = self.settings.pace
        return sum(pace.seconds(request, request.input_tokens) for request in self.trace.requests)

    @property
    def _is_measured(self) -> bool:
        """Whether the server that recorded the trace has measured its prefills, and that counts."""
        return self.settings.pace.measured and self.trace.prefill_rate > 0

    def answer(self) -> str:
        """What each capacity finds, where, and what that is worth, a sentence each."""
        said = []
        for point in self.points:
            sizes = " and ".join(
                f"{self._size(blocks)} of {_PLACES.get(name, name)}"
                for name, blocks in point.tiers.items()
            )
            found = f"{100 * point.rates[LAMINA]:.1f} %"
            if len(point.tiers) > 1:
                each = (f"{name} {100 * part:.1f}" for name, part in point.parts.items())
                found += f" ({', '.join(each)})"
            said.append(
                f"{sizes} would find {found} of all blocks again and save "
                f"{time_of(sum(point.saved.values()))} of prefill."
            )
        return (
            " ".join(said)
            + f" All prompts together take {time_of(self._prefill)} of prefill. "
            + ("Engine and tiers together cannot" if self.engine else "No tier can")
            + f" find more than {100 * self._most:.1f} % of their blocks."
        )

    def _share(self, blocks: int) -> str:
        return f"{100 * blocks / self.trace.different:.3g} %"

    def _size(self, blocks: int) -> str:
        if not self.trace.block_bytes:
            return f"{blocks:,} blocks"
        return size_of(blocks * self.trace.block_bytes)

    def worth(self) -> str:
        """What more capacity would be worth, in a sentence."""
        trace = self.trace
        if not trace.most_found:
            return "Nothing in this trace comes twice, so no tier can find it: record for longer."
        points = list({point.blocks: point for point in self.points}.values())
        if len(points) == 1:
            return (
                f"With {self._size(points[0].blocks)} {100 * points[0].rates[LAMINA]:.1f} % of all "
                f"blocks are found again; give several capacities to see what more is worth."
            )
        unit, name = (
            (GIB / trace.block_bytes, "GiB") if trace.block_bytes else (1000, "1,000 blocks")
        )
        parts = []
        for small, large in pairwise(points):
            gain = (large.rates[LAMINA] - small.rates[LAMINA]) / (large.blocks - small.blocks)
            tokens = gain * unit * trace.blocks * trace.block_tokens
            parts.append(
                f"{_digits(100 * gain * unit)} points of hit rate ({_digits(tokens)} tokens less "
                f"to compute) from {self._size(small.blocks)} to {self._size(large.blocks)}"
            )
        return f"Each {name} more is worth " + ", ".join(parts) + "."


def _digits(number: float) -> str:
    """Three digits, and a word for how many more there are."""
    for scale, word in ((1e9, " billion"), (1e6, " million")):
        if abs(number) >= scale:
            return f"{number / scale:.3g}{word}"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def measure(settings: TraceSettings, progress: Progress) -> TraceReport:
    """Replay the trace with every capacity.

    Raises:
        BenchError: if the file is no trace, or capacities cannot be counted in blocks.
    """
    progress.say(f"reading {settings.path}")
    try:
        trace = read_trace(settings.path, settings.block_bytes)
        tiers = [_tiers(sizes, trace) for sizes in settings.capacities]
        own = settings.engine_blocks(trace.different, trace.block_bytes)
    except (OSError, ValueError) as error:
        raise BenchError(f"{settings.path}: {error}") from error
    settings = replace(settings, pace=settings.pace.of(trace))
    points = [
        _point(trace, each, own, settings.pace, progress, f"{number} of {len(tiers)}")
        for number, each in enumerate(tiers, 1)
    ]
    points.sort(key=lambda point: point.blocks)
    return TraceReport(settings, trace, tuple(points), own)


def _tiers(sizes: Sequence[str], trace: Trace) -> dict[str, int]:
    names = ["host", *(f"far{number}" for number in range(1, len(sizes)))]
    if len(names) == 2:
        names[1] = "far"
    blocks = [blocks_of(size, trace.different, trace.block_bytes) for size in sizes]
    return dict(zip(names, blocks, strict=True))


def _point(
    trace: Trace, tiers: Mapping[str, int], own: int, pace: Pace, progress: Progress, which: str
) -> Point:
    capacity = sum(tiers.values())
    what = f"capacity {which}: {capacity:,} blocks"
    ended = progress.bar(what, trace.blocks)
    near, *_ = tiers.values()
    far = {name: blocks for name, blocks in tiers.items() if name != "host"}
    replay = Engine(trace, near, far, pace, ended, own).run()
    rates = {LAMINA: replay.blocks / trace.blocks}
    progress.say(f"{what}, other policies")
    for name, make in others(capacity, replay.schedule).items():
        rates[name] = blocks_found(make(), replay.schedule) / trace.blocks
    parts = {str(tier): blocks / trace.blocks for tier, blocks in replay.found.items()}
    saved = {str(tier): seconds for tier, seconds in replay.saved.items()}
    return Point(tiers, rates, parts, saved, replay.seconds, replay.had / trace.blocks)


def draw(report: TraceReport, path: Path) -> None:
    """Draw the hit rate of every policy against capacity, and beside it the prefill that each tier
    saves. Needs matplotlib."""
    from lamina_kv.bench.plots import draw_hit_rates

    block_bytes, points = report.trace.block_bytes, report.points
    sizes = [point.blocks * block_bytes / GIB if block_bytes else point.blocks for point in points]
    rates = {name: [point.rates[name] for point in points] for name in points[0].rates}
    saved = {name: [point.saved[name] for point in points] for name in points[0].tiers}
    draw_hit_rates(rates, sizes, "GiB" if block_bytes else "blocks", saved, path)

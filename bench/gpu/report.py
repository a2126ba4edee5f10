"""What sections have measured, beside what was promised: a table and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from rich.table import Table


class Verdict(StrEnum):
    """What a figure says of its promise."""

    PASS = "pass"
    FAIL = "FAIL"
    NOTED = "noted"
    """Nothing was promised."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a figure has to be.

    Attributes:
        limit: in the figure's unit.
        at_least: whether a smaller figure fails; else a larger one does.
    """

    limit: float
    at_least: bool = False

    def allows(self, value: float) -> bool:
        """Whether ``value`` keeps the promise; what is no number does not."""
        if math.isnan(value):
            return False
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        figure: what was measured.
        value: how much; a text if it is none of numbers.
        unit: of the value and the bound.
        bound: what was promised; None if nothing was.
    """

    figure: str
    value: float | str
    unit: str = ""
    bound: Bound | None = None

    @property
    def verdict(self) -> Verdict:
        """What the figure says."""
        if self.bound is None:
            return Verdict.NOTED
        kept = not isinstance(self.value, str) and self.bound.allows(self.value)
        return Verdict.PASS if kept else Verdict.FAIL


class State(StrEnum):
    """What became of a section."""

    RAN = "ran"
    BROKE = "broke"
    CUT = "cut short"
    """Its budget was used up."""
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A section that had its turn.

    Attributes:
        key: its letter.
        title: what it looks at.
        state: what became of it.
        budget: seconds that it could have.
        seconds: seconds that it took.
        rows: its figures, those before it broke or was cut short.
        why: why it did not run to its end.
    """

    key: str
    title: str
    state: State
    budget: float
    seconds: float
    rows: Sequence[Row]
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran to its end, and nothing failed."""
        failed = any(row.verdict is Verdict.FAIL for row in self.rows)
        return self.state is State.RAN and not failed


def table(outcomes: Sequence[Outcome]) -> Table:
    """All figures, for a reader."""
    table = Table("", "figure", "value", "unit", "bound", "verdict")
    for outcome in outcomes:
        title = f"{outcome.title} ({outcome.seconds:.0f} of {outcome.budget:.0f} s)"
        verdict = outcome.state.value if outcome.why else ""
        table.add_row(outcome.key, title, "", "", "", verdict, style="bold")
        if outcome.why:
            table.add_row("", outcome.why)
        for row in outcome.rows:
            value = row.value if isinstance(row.value, str) else f"{row.value:.4g}"
            bound = "" if row.bound is None else str(row.bound)
            table.add_row("", row.figure, value, row.unit, bound, row.verdict.value)
    return table


def write_json(path: Path, machine: Mapping[str, str], outcomes: Sequence[Outcome]) -> None:
    """Write everything, in one go: a reader never finds half of it.

    Args:
        path: the file.
        machine: what it ran on.
        outcomes: the sections so far.
    """
    sections = []
    for outcome in outcomes:
        section = asdict(outcome) | {"passed": outcome.passed}
        for entry, row in zip(section["rows"], outcome.rows, strict=True):
            entry["verdict"] = row.verdict
            if isinstance(row.value, float) and not math.isfinite(row.value):
                entry["value"] = str(row.value)
        sections.append(section)
    text = json.dumps({"machine": dict(machine), "sections": sections}, indent=1)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text + "\n")
    unfinished.replace(path)

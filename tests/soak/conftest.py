"""What a soak has come to, in one table at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

Note = Callable[[str, object], None]
"""Adds a line to the table: what, and how much. Numbers under one name are added up."""

_notes: dict[str, object] = {}


@pytest.fixture
def note() -> Note:
    def add(name: str, value: object) -> None:
        before = _notes.get(name)
        both = isinstance(before, int) and isinstance(value, int)
        _notes[name] = before + value if both else value  # type: ignore[operator]

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Called by pytest at the end."""
    if not _notes:
        return
    write = terminalreporter.write_line
    terminalreporter.section("soak")
    for name, value in _notes.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        write(f"{name:<60} {shown}")
    write("")
    write(f"{'':<60} {'passed':>8} {'failed':>8} {'minutes':>8}")
    tests: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            counts = tests.setdefault(report.nodeid.partition("[")[0], Counter())
            counts["passed" if outcome == "passed" else "failed"] += 1
    for phases in terminalreporter.stats.values():
        for report in phases:
            if isinstance(report, pytest.TestReport):
                tests.setdefault(report.nodeid.partition("[")[0], Counter())
                tests[report.nodeid.partition("[")[0]]["ms"] += int(report.duration * 1000)
    for name, counts in tests.items():
        minutes = counts["ms"] / 60_000
        test = name.rpartition("::")[2] if "Test" not in name else name.split("::")[1]
        write(f"{test:<60} {counts['passed']:>8} {counts['failed']:>8} {minutes:>8.1f}")

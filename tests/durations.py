"""How long tests take, and what is made of it: which test runs where and when, and how long a run
may take.

``durations.json`` has, for each file, the seconds of one case of each test function, and under
``""`` the mean of those that take less than :data:`WORTH_A_LINE`. ``make durations`` writes it.

With ``-n`` and no ``--dist``, a worker takes the longest piece of the suite that nobody has begun.
A piece is a file, because tests of a file share engines; a file that takes longer than
:data:`PIECE_SECONDS` is several pieces.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

RECORD = Path(__file__).with_name("durations.json")

WORTH_A_LINE = 0.3
"""Seconds. A function that takes less has no line of its own in the record."""

PIECE_SECONDS = 45.0
"""A file that takes longer is divided. What its tests share is then made once for each piece."""

UNKNOWN_SECONDS = 5.0
"""One test of a file that is not in the record: it starts early, because it may be long."""


@dataclass(frozen=True)
class Durations:
    """What is known of how long tests take.

    Attributes:
        files: seconds of one case, by file and function.
    """

    files: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path = RECORD) -> Durations:
        """What is recorded in ``path``; nothing if it is not there."""
        return cls(json.loads(path.read_text()) if path.exists() else {})

    @classmethod
    def of_tests(cls, seconds: Mapping[str, float]) -> Durations:
        """What is to be recorded of tests that took so long, by node id."""
        cases: dict[str, dict[str, list[float]]] = {}
        for node_id, duration in sorted(seconds.items()):
            file, function = _split(node_id)
            cases.setdefault(file, {}).setdefault(function, []).append(duration)
        files = {}
        for file, functions in cases.items():
            means = {function: _mean(took) for function, took in functions.items()}
            lines = {name: round(mean, 1) for name, mean in means.items() if mean >= WORTH_A_LINE}
            if rest := [
                took for name, all_ in functions.items() for took in all_ if name not in lines
            ]:
                lines[""] = round(_mean(rest), 3)
            files[file] = lines
        return cls(files)

    def save(self, path: Path = RECORD) -> None:
        """Write the record."""
        path.write_text(json.dumps(self.files, indent=1, sort_keys=True) + "\n")

    def __getitem__(self, node_id: str) -> float:
        """Seconds that a test is expected to take."""
        file, function = _split(node_id)
        functions = self.files.get(file)
        if not functions:
            return UNKNOWN_SECONDS
        if function in functions:
            return functions[function]
        return functions[""] if "" in functions else _mean(functions.values())


def pieces(node_ids: Sequence[str], durations: Durations) -> list[list[str]]:
    """The tests in what one worker runs in one go, in the order of ``node_ids``."""
    files: dict[str, list[str]] = {}
    for node_id in node_ids:
        files.setdefault(_split(node_id)[0], []).append(node_id)
    divided: list[list[str]] = []
    for tests in files.values():
        piece: list[str] = []
        for test in tests:
            if sum(durations[each] for each in piece) + durations[test] > PIECE_SECONDS and piece:
                divided.append(piece)
                piece = []
            piece.append(test)
        divided.append(piece)
    return divided


class LongestFirst(LoadScopeScheduling):
    """Hands out pieces, the longest first.

    Args:
        config: pytest's.
        log: xdist's.
        durations: what is known; by default what is recorded.
    """

    def __init__(self, config: pytest.Config, log: Any, durations: Durations | None = None) -> None:
        super().__init__(config, log)
        self._durations = Durations.load() if durations is None else durations
        self._piece_of: dict[str, str] = {}
        self._seconds: dict[str, float] = {}

    def schedule(self) -> None:
        if self.collection is None:
            collection = next(iter(self.registered_collections.values()))
            for piece in pieces(collection, self._durations):
                self._piece_of |= dict.fromkeys(piece, piece[0])
                self._seconds[piece[0]] = sum(self._durations[test] for test in piece)
        super().schedule()

    def _split_scope(self, nodeid: str) -> str:
        return self._piece_of[nodeid]

    def _assign_work_unit(self, node: Any) -> None:
        longest = max(self.workqueue, key=self._seconds.__getitem__)
        self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)


def _split(node_id: str) -> tuple[str, str]:
    """File and function of a test, without its parameters."""
    file, _, test = node_id.partition("::")
    return file, test.partition("[")[0]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


# -- what pytest is told -------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("durations")
    group.addoption(
        "--record-durations", action="store_true", help="write what tests took to durations.json"
    )
    group.addoption(
        "--budget",
        type=float,
        metavar="MINUTES",
        help="say in the end how much of it is used, and warn if it is more",
    )
    group.addoption(
        "--budget-since",
        type=float,
        metavar="SECONDS",
        help="when what the budget is for began, in seconds since 1970 (default: with pytest)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Watch(config), "durations-watch")


class Watch:
    """Notes what tests take, in the process that reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._began: float = config.getoption("budget_since") or time.time()
        self._seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        ran = exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}
        if ran and self._config.getoption("record_durations"):
            Durations.of_tests(self._seconds).save()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        budget: float | None = self._config.getoption("budget")
        if budget is None:
            return
        minutes = (time.time() - self._began) / 60
        terminalreporter.write_sep("=", "budget")
        terminalreporter.write_line(f"{minutes:.1f} of {budget:.0f} minutes are used")
        if minutes > budget:
            terminalreporter.write_line(
                "WARNING: that is more than there is, on a quiet machine with two cores. "
                "tests/README.md says what to do.",
                yellow=True,
            )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LongestFirst | None:
    return LongestFirst(config, log) if config.getoption("dist") == "load" else None

"""How the suite is divided among workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from durations import PIECE_SECONDS, UNKNOWN_SECONDS, Durations, LongestFirst, Watch, pieces

QUICK, LONG = "tests/test_quick.py", "tests/test_long.py"


def test_what_is_recorded_is_what_is_expected(tmp_path: Path) -> None:
    took = {f"{LONG}::test_a[{n}]": 10.0 + n for n in range(3)}
    took |= {f"{LONG}::test_b": 0.1, f"{LONG}::test_c": 0.03, f"{QUICK}::Class::test_d": 0.02}
    Durations.of_tests(took).save(tmp_path / "record")
    durations = Durations.load(tmp_path / "record")
    assert durations[f"{LONG}::test_a[7]"] == 11.0
    assert durations[f"{LONG}::test_b"] == durations[f"{LONG}::test_of_tomorrow"] == 0.065
    assert durations[f"{QUICK}::Class::test_d"] == 0.02


def test_a_file_that_is_not_recorded_may_be_long(tmp_path: Path) -> None:
    durations = Durations.load(tmp_path / "not there")
    assert durations[f"{LONG}::test_a"] == UNKNOWN_SECONDS


def test_a_new_test_of_a_file_of_long_ones_is_like_them() -> None:
    durations = Durations.of_tests({f"{LONG}::test_a": 10.0, f"{LONG}::test_b": 20.0})
    assert durations[f"{LONG}::test_of_tomorrow"] == 15.0


def test_a_file_is_one_piece_unless_it_is_long() -> None:
    third = PIECE_SECONDS / 3
    quick = [f"{QUICK}::test_{n}" for n in range(50)]
    long = [f"{LONG}::test_a[{n}]" for n in range(7)]
    durations = Durations.of_tests(dict.fromkeys(quick, 0.01) | dict.fromkeys(long, third))
    assert pieces(quick + long, durations) == [quick, long[:3], long[3:6], long[6:]]


def test_a_test_that_is_longer_than_a_piece_is_one() -> None:
    tests = [f"{LONG}::test_{n}" for n in range(3)]
    durations = Durations.of_tests(dict.fromkeys(tests, 10 * PIECE_SECONDS))
    assert pieces(tests, durations) == [[test] for test in tests]


class Worker:
    """A worker that is sent tests, and never begins them."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.sent: list[int] = []

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        self.sent += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def test_the_longest_piece_is_begun_first() -> None:
    quick = [f"{QUICK}::test_{n}" for n in range(50)]
    medium = [f"tests/test_medium.py::test_{n}" for n in range(3)]
    long = [f"{LONG}::test_{n}" for n in range(6)]
    everything = [*quick, *medium, *long]
    durations = Durations.of_tests(
        dict.fromkeys(quick, 0.01) | dict.fromkeys(medium, 2.0) | dict.fromkeys(long, 15.0)
    )
    config: Any = SimpleNamespace(
        getvalue=lambda name: ["popen", "popen"], option=SimpleNamespace(loadscopereorder=True)
    )
    scheduler = LongestFirst(config, None, durations)
    workers: list[Any] = [Worker("a"), Worker("b")]
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, everything)
    scheduler.schedule()
    a, b = ([everything[index] for index in worker.sent] for worker in workers)
    assert (a, b) == (long[:3], long[3:])
    for index in workers[0].sent[:2]:
        scheduler.mark_test_complete(workers[0], index)
    assert [everything[index] for index in workers[0].sent[3:]] == medium


@pytest.mark.parametrize(("budget", "warned"), [(11, False), (9, True)])
def test_a_run_that_takes_more_than_its_budget_says_so(budget: float, warned: bool) -> None:
    options = {"budget": budget, "budget_since": time.time() - 600, "record_durations": False}
    config: Any = SimpleNamespace(getoption=options.__getitem__)
    said: list[str] = []
    reporter: Any = SimpleNamespace(
        write_sep=lambda *args: None, write_line=lambda line, **markup: said.append(line)
    )
    Watch(config).pytest_terminal_summary(reporter)
    assert said[0] == f"10.0 of {budget} minutes are used"
    assert any("WARNING" in line for line in said) == warned

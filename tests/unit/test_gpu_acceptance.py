"""Promise: the acceptance run says what a GPU does, and finds faults where there are some.

Its parts that need no GPU run here, the checks of bytes and fences on the simulated device.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from gpu import acceptance
from gpu.lab import Bytes, Engine, Lab
from gpu.pages import Layout, PageModel, aliased, block_outermost, layer_outermost, layouts
from gpu.plan import Bench, Section, run_sections
from gpu.report import Bound, Outcome, Row, State, Verdict, table, write_json
from gpu.sections import bandwidth, bytes_moved, fences, host_costs, overlap, pinning
from lamina_kv.data.movers.crossover import Way
from lamina_kv.data.movers.cuda import CudaMover
from lamina_kv.data.movers.device import Event
from lamina_kv.geometry import CacheGeometry
from simulator.device import SimulatedDevice, SimulatedStream


class Unordered(SimulatedDevice):
    """Its streams wait for nothing."""

    def hold(self, stream: SimulatedStream, event: Event) -> None:
        pass


class SimulatedEngine(Engine):
    def __init__(self, geometry: CacheGeometry, *, ordered: bool) -> None:
        self.allocations = [
            torch.zeros(size, dtype=torch.uint8) for size in geometry.allocation_bytes
        ]
        kind = SimulatedDevice if ordered else Unordered
        self.device = kind(self.allocations, Random(0), copy_engines=True)
        self.mover = CudaMover(geometry, self.allocations, self.device)

    @property
    def streams(self) -> Sequence[SimulatedStream]:
        return self.device.streams

    def computing(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def delay(self, stream: Any, seconds: float) -> None:
        # Copies of the simulated device are slow: a delay must be long beside them here, too.
        self.device.launch(lambda: None, 1e4 * seconds, stream)

    def fill(self, memory: torch.Tensor, value: int) -> None:
        def fill() -> None:
            memory.fill_(value)

        self.device.launch(fill)

    def total(self, memory: torch.Tensor) -> Callable[[], int]:
        sums: list[int] = []
        self.device.launch(lambda: sums.append(int(memory.sum(dtype=torch.int64))))

        def wait() -> int:
            self.device.wait_for(lambda: bool(sums))
            return sums[0]

        return wait

    def read(self, allocation: int) -> Bytes:
        self.device.settle()
        return self.allocations[allocation].numpy().copy()

    def write(self, allocation: int, content: Bytes) -> None:
        self.allocations[allocation].copy_(torch.from_numpy(content))


class SimulatedLab(Lab):
    is_large = False
    device = torch.device("cpu")

    def pinner(self) -> SimulatedDevice:
        return SimulatedDevice([], Random(0))

    def open(self, geometry: CacheGeometry, *, ordered: bool = True) -> Engine:
        return SimulatedEngine(geometry, ordered=ordered)

    def programs(self, count: int) -> AbstractContextManager[object]:
        return contextlib.nullcontext()


class Clock:
    """Goes on when it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def bench(clock: Clock | None = None) -> Bench[Lab]:
    return Bench(SimulatedLab(), math.inf, clock or Clock())


# -- what is run ----------------------------------------------------------------------------------


def test_a_section_that_breaks_keeps_its_rows_and_stops_no_other() -> None:
    def breaks(_: Bench[Lab]) -> Generator[Row, None, None]:
        yield Row("before", 1)
        raise ValueError("no such card")

    def runs(_: Bench[Lab]) -> Generator[Row, None, None]:
        yield Row("after", 2)

    sections = [Section("A", "breaks", 5, breaks), Section("B", "runs", 5, runs)]
    first, second = run_sections(sections, bench(), 100)
    assert (first.state, first.why) == (State.BROKE, "ValueError: no such card")
    assert [row.figure for row in first.rows] == ["before"]
    assert not first.passed
    assert (second.state, second.passed) == (State.RAN, True)


def test_nothing_more_is_run_on_a_device_that_is_lost() -> None:
    def breaks(_: Bench[Lab]) -> Generator[Row, None, None]:
        raise RuntimeError("an illegal address")
        yield

    sections = [Section("A", "breaks", 5, breaks), Section("B", "is not run", 5, breaks)]
    _, second = run_sections(sections, bench(), 100, lambda: "lost")
    assert (second.state, second.why, second.passed) == (State.SKIPPED, "lost", False)


def test_each_section_has_its_budget_and_the_last_what_is_left_of_the_total() -> None:
    clock, given = Clock(), []

    def takes_all(run: Bench[Lab]) -> Generator[Row, None, None]:
        given.append(run.left)
        clock.now += run.left
        yield Row("time", 1)

    sections = [Section(key, "greedy", 10, takes_all) for key in "ABCD"]
    outcomes = list(run_sections(sections, bench(clock), 25))
    assert given == [10, 10, 5]
    assert [outcome.state for outcome in outcomes] == [State.RAN] * 3 + [State.SKIPPED]


def test_a_section_that_is_over_its_budget_is_cut_short_and_gives_back_what_it_has() -> None:
    clock, closed = Clock(), []

    def slow(_: Bench[Lab]) -> Generator[Row, None, None]:
        try:
            for number in range(3):
                clock.now += 4
                yield Row(str(number), number)
        finally:
            closed.append(clock.now)

    sections = [Section(key, "slow", 5, slow) for key in "AB"]
    for outcome in run_sections(sections, bench(clock), 100):
        assert (outcome.state, len(outcome.rows), outcome.passed) == (State.CUT, 2, False)
    assert closed == [8, 16]


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = acceptance.parse(["--budget", "60", "--out", "there", "--only", "D", "B"])
    assert (options.budget, options.out) == (60.0, Path("there"))
    assert [section.key for section in acceptance.chosen(options.only)] == ["B", "D"]
    everything = acceptance.parse([])
    assert everything.budget == sum(section.budget for section in acceptance.SECTIONS) <= 480
    for wrong in (["--budget", "0"], ["--budget", "nan"], ["--only", "Z"]):
        with pytest.raises(SystemExit):
            acceptance.parse(wrong)
    assert "leaves no time" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert acceptance.main(["--out", str(tmp_path / "out")]) == 1
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", [200.0, 20.0])
def test_the_command_runs_sections_and_writes_what_they_say(
    budget: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the simulated device; with too small a budget the last section is skipped, which fails."""

    def spends(bench: Bench[Lab]) -> Generator[Row, None, None]:
        yield Row("wrong bytes", bytes_moved.differing_bytes(bench.lab, some), "B", Bound(0))

    some = next(layouts(large=False))
    for name, answer in (("is_available", True), ("current_device", 0), ("get_device_name", "X1")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(acceptance, "CudaLab", lambda device: SimulatedLab())
    sections = (Section("A", "first", 10, spends), Section("B", "second", 100, spends))
    monkeypatch.setattr(acceptance, "SECTIONS", sections)
    before = threading.enumerate()
    status = acceptance.main(["--out", str(tmp_path), "--budget", str(budget)])
    timers = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    left = [timer for timer in timers if timer not in before and not timer.finished.is_set()]
    assert not left, "it would end this process later"
    written = json.loads((tmp_path / "acceptance.json").read_text())
    states = [(section["key"], section["state"]) for section in written["sections"]]
    ran = budget > 100
    assert states == [("A", "ran"), ("B", "ran" if ran else "skipped")]
    assert (status, written["machine"]["card"]) == (0 if ran else 1, "X1")
    assert "wrong bytes" in capsys.readouterr().out


def test_a_section_that_hangs_ends_the_process_with_a_trace() -> None:
    hangs = (
        "import time; from gpu import acceptance; acceptance._end_when_over(0.1); time.sleep(60)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", hangs],
        cwd=Path(acceptance.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert "a section hangs" in ended.stderr
    assert "time.sleep" in ended.stderr or "most recent call first" in ended.stderr


# -- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bound", "verdict"),
    [
        (0.9, Bound(0.9, at_least=True), Verdict.PASS),
        (0.89, Bound(0.9, at_least=True), Verdict.FAIL),
        (0, Bound(0), Verdict.PASS),
        (1, Bound(0), Verdict.FAIL),
        (math.nan, Bound(0), Verdict.FAIL),
        ("no answer", Bound(0), Verdict.FAIL),
        (7, None, Verdict.NOTED),
    ],
)
def test_verdicts(value: float | str, bound: Bound | None, verdict: Verdict) -> None:
    assert Row("figure", value, "", bound).verdict is verdict


def test_a_report_has_every_figure(tmp_path: Path) -> None:
    rows = (Row("speed", 50.0, "GB/s", Bound(45, at_least=True)), Row("nothing", math.nan))
    failed = Row("wrong bytes", 3, "B", Bound(0))
    outcomes = [
        Outcome("A", "fast", State.RAN, 5, 1, rows),
        Outcome("B", "wrong", State.RAN, 5, 1, (failed,)),
        Outcome("C", "late", State.SKIPPED, 5, 0, (), "no time"),
    ]
    assert [outcome.passed for outcome in outcomes] == [True, False, False]
    write_json(tmp_path / "a.json", {"card": "a card"}, outcomes)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    written = json.loads((tmp_path / "a.json").read_text())
    speed, nothing = written["sections"][0]["rows"]
    assert (speed["value"], speed["bound"]["limit"], speed["verdict"]) == (50.0, 45, "pass")
    assert nothing["value"] == "nan"
    assert written["sections"][2]["why"] == "no time"
    assert table(outcomes).row_count == 3 + 3 + 1


# -- C and D --------------------------------------------------------------------------------------


def test_the_model_of_pages_sees_one_byte() -> None:
    geometry = layer_outermost(24, 4)
    near = np.arange(geometry.object_bytes, dtype=np.uint8)
    model = PageModel(geometry, np.zeros(geometry.allocation_bytes[0], np.uint8), near)
    model.copy([1], np.array([2]), np.array([3]), to_engine=True)
    start = geometry.extent_offsets[1] + 2 * 24
    right = np.zeros(geometry.allocation_bytes[0], np.uint8)
    right[geometry.rows[1].offset + 3 * 24 :][:24] = near[start : start + 24]
    assert model.differing(right, near) == 0
    right[0] = 1
    assert model.differing(right, near) == 1


@pytest.mark.parametrize(
    "geometry",
    [
        layer_outermost(1, 12),
        layer_outermost(20000, 8, start=13),
        block_outermost(132, 6, 450),
        aliased(96, 12),
    ],
)
def test_a_mover_that_is_right_leaves_no_wrong_byte(geometry: CacheGeometry) -> None:
    assert bytes_moved.differing_bytes(SimulatedLab(), Layout("", geometry, 3)) == 0


def test_a_mover_that_copies_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = SimulatedDevice.copy

    def nearly(self: SimulatedDevice, *arguments: Any, to_engine: bool) -> None:
        *others, pairs = arguments
        if not to_engine and len(pairs):
            pairs = self.upload(others[0], np.roll(np.tile(np.arange(3), (2, 1)).T, 1, axis=0))
        copy(self, *others, pairs, to_engine=to_engine)

    monkeypatch.setattr(SimulatedDevice, "copy", nearly)
    layout = Layout("", layer_outermost(24, 12), 3)
    (row,) = bytes_moved.check(bench(), [layout])  # by kernel and by copy engine
    assert row.value > 0
    assert row.verdict is Verdict.FAIL


def test_layouts_are_checked_one_by_one() -> None:
    some = list(itertools.islice(layouts(large=False), 3))
    assert [row.verdict for row in bytes_moved.check(bench(), some)] == [Verdict.PASS] * 3
    assert len(list(layouts(large=True))) == len(list(layouts(large=False))) + 3


def test_rounds_of_fences_are_right_and_controls_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fences, "PAGE", 16)
    monkeypatch.setattr(fences, "ROUNDS", 40)
    run = bench()
    run.due = 1e9
    rows = {row.figure: row for row in fences.run(run)}
    assert {row.verdict for row in rows.values()} == {Verdict.PASS}
    assert rows["rounds"].value == 40
    assert sum("control" in figure for figure in rows) == 2


def test_a_control_that_sees_nothing_fails_its_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fences, "PAGE", 16)
    monkeypatch.setattr(fences, "ROUNDS", 5)
    monkeypatch.setattr(fences, "CONTROL_ROUNDS", 5)
    monkeypatch.setattr(SimulatedEngine, "delay", lambda *_: None)
    monkeypatch.setattr(Unordered, "hold", SimulatedDevice.hold)
    run = bench()
    run.due = 1e9
    rows = [row for row in fences.run(run) if "wait for no event" in row.figure]
    assert [row.verdict for row in rows] == [Verdict.FAIL]


@pytest.mark.parametrize("broken", ["save", "load"])
def test_a_mover_that_forgets_one_wait_is_found(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fences, "PAGE", 16)
    right = getattr(CudaMover, broken)

    def early(self: CudaMover, rows: Any, pairs: Any, after: Any, **options: Any) -> Any:
        event = self._device.record(self._device.stream(0))
        return right(self, rows, pairs, event, **options)

    monkeypatch.setattr(CudaMover, broken, early)
    engine = SimulatedLab().open(layer_outermost(16, fences.BLOCKS, rows=1))
    saves, loads = zip(*fences.rounds(engine, 30), strict=True)
    engine.close()
    assert (any(saves), any(loads)) == (broken == "save", broken == "load")


# -- E, G, H, I, K: that they run; their figures say nothing here ---------------------------------


@pytest.mark.parametrize(
    "section", [bandwidth.run, host_costs.run, overlap.layerwise, overlap.parked, pinning.run]
)
def test_sections_of_times_run_and_have_bounds(
    section: Callable[[Bench[Lab]], Generator[Row, None, None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "PAGES", (1024, 16 << 10))
    monkeypatch.setattr(host_costs, "ROUNDS", 3)
    run = bench()
    run.ceilings.update({"H2D": 1.0, "D2H": 1.0})
    rows = list(section(run))
    assert all(isinstance(row.value, float) and row.value >= 0 for row in rows)
    assert any(row.bound for row in rows)
    if section is bandwidth.run:
        assert sum("copy engine from" in row.figure for row in rows) == 2
        assert sum("kernel" in row.figure for row in rows) == 16


def test_the_crossover_is_where_the_copy_engine_stays_ahead() -> None:
    rates: bandwidth.Rates = {}
    for page, kernel, engine in ((8, 9.0, 9.5), (16, 9.0, 8.0), (32, 9.0, 9.0), (64, 8.0, 9.0)):
        rates[Way.KERNEL, "H2D", page << 10] = kernel
        rates[Way.COPY_ENGINE, "H2D", page << 10] = engine
        rates[Way.KERNEL, "D2H", page << 10] = 10 * kernel
        rates[Way.COPY_ENGINE, "D2H", page << 10] = engine
    assert bandwidth.crossover(rates, "H2D") == 32
    assert bandwidth.crossover(rates, "D2H") == math.inf
    alone = {key: rate for key, rate in rates.items() if key[0] is Way.KERNEL}
    assert math.isnan(bandwidth.crossover(alone, "H2D"))


def test_bandwidth_without_ceilings_is_no_share() -> None:
    assert math.isnan(bandwidth.share(10.0, None))
    assert bandwidth.share(10.0, 40.0) == 0.25

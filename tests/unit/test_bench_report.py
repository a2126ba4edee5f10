"""What a bench reports is what it measured: medians, ratios by repetition, verdicts, plain JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lamina_kv.bench.plots import draw_overlap, draw_ttft
from lamina_kv.bench.report import Machine, Report, duration
from lamina_kv.bench.samples import Samples, Target, Unit, paired, ratio

SLOW = Samples("recompute", (10.0, 8.0, 12.0))
FAST = Samples("hit", (0.1, 0.3, 0.2), floor=0.16)


def report(*targets: Target) -> Report:
    return Report(
        bench="test",
        title="A test",
        machine=Machine("a cpu", 2, 1 << 30, 0.5, {"python": "3.11"}),
        settings={"layers": 2, "dtype": "bfloat16"},
        samples=(SLOW, FAST),
        compared="against the floor",
        targets=targets,
        notes=("mind this",),
        speedups=True,
    )


def printed(made: Report) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(made.as_table())
    return console.export_text()


def test_median_and_range() -> None:
    assert (FAST.median, FAST.low, FAST.high) == (0.2, 0.1, 0.3)
    assert Samples("even", (1.0, 2.0, 4.0, 8.0)).median == 3.0


def test_nothing_measured_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="nothing was measured for 'empty'"):
        Samples("empty", ())


def test_ratios_are_taken_repetition_by_repetition() -> None:
    """On a machine that is twice as slow in one repetition the ratio stays what it is."""
    measured = Samples("measured", (1.2, 2.4, 1.2))
    floor = Samples("floor", (1.0, 2.0, 1.0))
    assert ratio("r", measured, floor).values == pytest.approx((1.2, 1.2, 1.2))


def test_repetitions_that_do_not_pair_up_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"repetitions"):
        paired("r", max, Samples("a", (1.0,)), Samples("b", (1.0, 2.0)))


@pytest.mark.parametrize(
    ("value", "at_most", "met"),
    [
        (1.0, True, True),
        (1.1, True, True),
        (1.2, True, False),
        (1.2, False, True),
        (1.0, False, False),
    ],
)
def test_a_target_judges_the_median(value: float, at_most: bool, met: bool) -> None:
    figure = Samples("figure", (value, 0.0, 99.0))
    assert Target(figure, Unit.RATIO, 1.1, at_most).met is met


def test_what_is_there_for_comparison_is_not_judged() -> None:
    assert Target(FAST, Unit.RATIO, None).met is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.34, "12.3 s"),
        (1.0, "1.00 s"),
        (0.0789, "78.9 ms"),
        (0.9996, "1000 ms"),
        (0.00012, "120 µs"),
        (-0.00003, "-30.0 µs"),
        (0.0, "0.00 µs"),
    ],
)
def test_durations_have_three_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_json_has_every_number() -> None:
    document = json.loads(report(Target(FAST, Unit.RATIO, 0.15)).as_json())
    assert document["bench"] == "test"
    assert document["settings"] == {"layers": 2, "dtype": "bfloat16"}
    assert document["machine"]["versions"] == {"python": "3.11"}
    assert document["samples"][0] == {
        "name": "recompute",
        "median": 10.0,
        "min": 8.0,
        "max": 12.0,
        "values": [10.0, 8.0, 12.0],
        "floor": None,
        "unit": "s",
    }
    (target,) = document["targets"]
    assert (target["limit"], target["limit_is"], target["met"]) == (0.15, "at most", False)
    assert document["notes"] == ["mind this"]


def test_the_table_says_what_was_missed() -> None:
    text = printed(report(Target(FAST, Unit.RATIO, 0.15), Target(FAST, Unit.RATIO, 0.25)))
    assert "missed" in text
    assert "met" in text
    assert "≤ 0.150x" in text
    assert re.search(r"\b50x", text), "ten seconds against 0.2 are a speed-up of 50"
    assert "mind this" in text


def test_a_limit_from_below_is_shown_as_one() -> None:
    text = printed(report(Target(Samples("t", (0.99,)), Unit.RATIO, 0.97, at_most=False)))
    assert "≥ 0.970x" in text
    assert "missed" not in text


@pytest.mark.parametrize(("busy", "warned"), [(0.5, False), (1.5, True)])
def test_a_busy_machine_is_no_place_to_measure(busy: float, warned: bool) -> None:
    made = replace(report(), machine=Machine("a cpu", 2, 1 << 30, busy, {}))
    assert ("The machine was busy" in printed(made)) is warned


def test_this_machine_describes_itself() -> None:
    machine = Machine.here()
    assert machine.cores >= 1
    assert machine.memory_bytes > 0
    assert machine.cpu
    assert machine.versions["python"].startswith("3.")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plots_are_files(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    made = report(Target(FAST, Unit.RATIO, 1.1), Target(SLOW, Unit.RATIO, None))
    for index, draw in enumerate((draw_ttft, draw_overlap)):
        path = tmp_path / f"plot-{index}{suffix}"
        draw(made, path)
        start = path.read_bytes()[:100]
        assert start.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in start

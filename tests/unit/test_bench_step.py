"""Promise: a decode step that completes chunks asks for the same few calls however many rows there
are, and the bench that says so runs without an engine and without a device."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lamina_kv.bench import step
from lamina_kv.bench.counted_device import Asked
from lamina_kv.bench.progress import Progress
from lamina_kv.bench.samples import Unit


@pytest.mark.parametrize(
    ("rows", "chunks", "repeat", "said"),
    [
        ((4, 0), 1, 1, "--rows must be at least 1 each, got 0"),
        ((4,), 0, 1, "--chunks must be at least 1, got 0"),
        ((4,), 1, 0, "--repeat must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    rows: tuple[int, ...], chunks: int, repeat: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        step.StepSettings(rows, chunks, repeat)


def test_calls_of_a_decode_step_do_not_depend_on_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_STEPS", 3)
    report = step.measure(step.StepSettings((3, 17), 2, 1), Progress(Console(file=io.StringIO())))
    counts = {
        target.figure.name: (target.figure.median, target.met)
        for target in report.targets
        if target.unit is Unit.COUNT
    }
    for rows in (3, 17):
        for what, promised in step.DECODE_CALLS.items():
            assert counts[f"decode, {rows} rows, device: {what}"] == (promised, True)
        assert counts[f"load, {rows} rows, device: {Asked.UPLOAD}"][0] == 1
    assert {name.partition(",")[0] for name in counts} == {"decode", "load"}, "idle asks nothing"

"""A parked request goes on when every row will be there before it is read, and not sooner."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lamina.data.early_release import Arrival, EarlyRelease

ROWS = 10


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def measured(row_seconds: float, waited: float = 0.0) -> EarlyRelease:
    """After one step in which the model took so long for each row."""
    clock = Clock()
    early = EarlyRelease(clock)
    early.step_begins(forward=True)
    clock.now += ROWS * row_seconds + waited
    early.step_ends(ROWS, waited)
    return early


def first_release(early: EarlyRelease, arrival: float) -> int:
    """Rows that are there when a load is released of which one arrives every so often."""
    return next(
        (n for n in range(ROWS + 1) if early.allows(Arrival(ROWS, n, n * arrival))), ROWS + 1
    )


@pytest.mark.parametrize("factor", [0.1, 0.5, 0.9, 1.0, 1.5, 3.0])
def test_every_row_is_there_when_it_is_read(factor: float) -> None:
    arrival, read = factor * 0.01, 0.01
    there = first_release(measured(read), arrival)
    assert 1 <= there < ROWS
    for row in range(there, ROWS):
        assert (row - there + 1) * arrival <= row * read + 1e-9
    if there > 1:  # one row sooner would have been too soon for one of them
        rows = range(there - 1, ROWS)
        assert any((row - there + 2) * arrival > row * read + 1e-9 for row in rows)


def test_what_is_faster_than_the_model_is_released_with_its_first_row() -> None:
    assert first_release(measured(0.01), 0.001) == 1


def test_nothing_is_released_before_anything_was_measured() -> None:
    assert not EarlyRelease().allows(Arrival(ROWS, ROWS - 1, 1e-9))
    assert not measured(0.01).allows(Arrival(ROWS, 0, 0.0))


def test_what_takes_the_models_cores_is_not_released_early() -> None:
    load = Arrival(ROWS, ROWS - 1, 0.001)
    assert measured(0.01).allows(load)
    assert not measured(0.01).allows(replace(load, busy=0.0008))
    assert measured(0.01).allows(replace(load, busy=0.0002))


def test_a_step_without_the_model_says_nothing() -> None:
    early = EarlyRelease()
    early.step_begins(forward=False)
    early.step_ends(ROWS, 0.0)
    assert not early.allows(Arrival(ROWS, ROWS - 1, 1e-9))


def test_what_the_model_has_waited_is_not_what_it_takes() -> None:
    assert first_release(measured(0.01, waited=9.0), 0.02) == first_release(measured(0.01), 0.02)


def test_who_had_to_wait_is_released_later_and_then_sooner_again() -> None:
    early = measured(0.01)
    usual = first_release(early, 0.01)
    early.waited(0.05)
    assert first_release(early, 0.01) > usual
    for _ in range(20):
        early.waited(0.0)
    assert first_release(early, 0.01) == usual

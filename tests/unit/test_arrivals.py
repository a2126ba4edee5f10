"""A request goes on when everything has ended that it waits for, and not before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lamina_kv.data.arrivals import Arrivals
from lamina_kv.data.load_pipeline import LoadRun, LoadStuck
from lamina_kv.plan import TransferReceipt


class Run(SimpleNamespace):
    """A load run of some requests."""

    stuck = expired = landed = waits = False
    given_up = ""

    def __init__(self, *requests: str) -> None:
        super().__init__()
        self.loads = [self._load(name) for name in requests]

    @staticmethod
    def _load(name: str) -> SimpleNamespace:
        return SimpleNamespace(order=SimpleNamespace(request_id=name), reason="")

    def receipts(self) -> list[str]:
        return [load.order.request_id for load in self.loads]

    @property
    def failed(self) -> bool:
        return any(load.reason for load in self.loads)

    def give_up(self, reason: str) -> None:
        self.given_up = reason
        self.landed = not self.stuck
        for load in self.loads:
            load.reason = reason

    def check(self) -> None:
        if self.given_up and self.stuck:
            raise LoadStuck(self.given_up)

    def land(self, patience: float | None = None) -> None:
        self.check()
        self.waits = True


class Rig:
    def __init__(self) -> None:
        self.receipts: list[TransferReceipt] = []
        self.arrivals = Arrivals(self.receipts.extend)

    def park(self, request: str) -> Any:
        run: Any = Run(request)
        self.arrivals.park(run)
        return run

    def finished(self, run: Run) -> None:
        self.arrivals.finished(run)  # type: ignore[arg-type]

    def collect(self) -> tuple[set[str], set[str], set[str]]:
        said = self.arrivals.collect()
        return set(said.arrived), set(said.failed), set(said.rejected)


@pytest.fixture
def rig() -> Rig:
    return Rig()


NOTHING: tuple[set[str], set[str], set[str]] = (set(), set(), set())


def test_a_load_that_has_landed_wakes_its_request_once(rig: Rig) -> None:
    run = rig.park("a")
    assert rig.collect() == NOTHING
    run.landed = True
    assert rig.collect() == ({"a"}, set(), set())
    assert rig.collect() == NOTHING
    assert rig.receipts == ["a"]
    assert rig.arrivals.is_empty


@pytest.mark.parametrize("first", ["load", "push"])
@pytest.mark.parametrize("fails", ["", "load", "push"])
def test_a_request_that_waits_for_two_things_goes_on_after_both(
    rig: Rig, first: str, fails: str
) -> None:
    run = rig.park("a")
    rig.arrivals.expect("a")

    def end(what: str) -> None:
        if what == "push":
            rig.arrivals.pushed("a", failed=fails == what)
            return
        run.landed = True
        run.loads[0].reason = "lost" if fails == what else ""

    end(first)
    assert rig.collect() == NOTHING, "nothing is said of it yet"
    end("push" if first == "load" else "load")
    failed = {"a"} if fails == "load" else set()
    assert rig.collect() == ({"a"}, failed, {"a"} if fails == "push" else set())
    assert rig.arrivals.is_empty


def test_a_load_that_is_late_is_given_up_and_harms_no_other(rig: Rig) -> None:
    late, other = rig.park("a"), rig.park("b")
    late.expired = True
    assert rig.collect() == ({"a"}, {"a"}, set())
    assert (late.given_up, other.given_up) == ("deadline", "")


def test_a_load_that_is_late_and_all_there_is_not_given_up(rig: Rig) -> None:
    run = rig.park("a")
    run.expired = run.landed = True
    assert rig.collect() == ({"a"}, set(), set())
    assert run.given_up == ""


def test_a_load_that_cannot_be_given_up_stops_the_engine(rig: Rig) -> None:
    run = rig.park("a")
    run.expired = run.stuck = True
    with pytest.raises(LoadStuck):
        rig.collect()


def test_one_that_is_stuck_keeps_no_other_from_being_given_up(rig: Rig) -> None:
    stuck, other = rig.park("a"), rig.park("b")
    stuck.stuck = True
    with pytest.raises(LoadStuck):
        rig.arrivals.give_up("closed", lambda: 0.0)
    assert other.given_up == "closed"


def test_slots_of_a_step_are_given_back_when_the_device_has_carried_it_out(rig: Rig) -> None:
    run = Run("a", "b")
    rig.finished(run)
    assert rig.collect() == NOTHING
    assert not rig.receipts
    rig.arrivals.land()
    assert run.waits
    run.landed = True
    assert rig.collect() == NOTHING, "nobody was parked"
    assert len(rig.receipts) == 2


def test_a_device_that_fails_under_what_the_model_has_read_stops_the_engine(rig: Rig) -> None:
    run, told = Run("a"), Run("b")
    told.loads[0].reason = "lost"
    rig.finished(run)
    rig.finished(told)
    run.landed = told.landed = True
    assert rig.collect() == (set(), {"b"}, set()), "it has not read that"
    run = Run("a")
    rig.finished(run)
    run.landed, run.loads[0].reason = True, "RuntimeError"
    with pytest.raises(LoadStuck, match="rows for a"):
        rig.collect()
    assert rig.receipts == ["a", "b", "a"]


def test_a_failed_load_of_a_step_is_told_at_once(rig: Rig) -> None:
    run = Run("a", "b")
    run.loads[1].reason = "lost"
    rig.finished(run)
    assert rig.collect() == (set(), {"b"}, set())


def test_what_it_is_told_is_what_it_reads() -> None:
    """The double has what the real one has."""
    for name in ("failed", "expired", "landed", "give_up", "land"):
        assert hasattr(LoadRun, name)

"""No row of a load is read before it is there: not by a layer that calls no hook, not in a graph
that is replayed without hooks, not by one of several passes through the layers. Where that cannot
be known any more nothing of the step is kept, and the engine stops.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf
from typing import Any

import pytest
from test_executor import PAGES, STRIDE, Rank, geometry, load, save

from lamina_kv.data import executor as executor_module
from lamina_kv.data.executor import Executor
from lamina_kv.data.load_pipeline import LoadStuck
from lamina_kv.data.movers import Fence
from lamina_kv.data.save_pipeline import SaveRun
from lamina_kv.data.step_loads import LayersDidNotWait, StepLoads
from lamina_kv.plan import LoadMode, Outcome, StepPlan

Patch = pytest.MonkeyPatch


@pytest.fixture
def rank() -> Iterator[Rank]:
    rank = Rank()
    rank.save(3, (7, 2))
    yield rank
    rank.executor.close()


class Pushes:
    """The pushes of a step, as the executor sees them."""

    moves_rows = True

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.failure: str | None = None

    def row_written(self, row: int) -> None:
        self.rows.append(row)

    def sweep(self, failure: str) -> None:
        self.failure = failure


LOAD, SAVE = load(2, (11, 5), timeout=inf), save(3, 4, (9, 8))
STEP = StepPlan(5, loads=(LOAD,), saves=(SAVE,))


def begin(rank: Rank, plan: StepPlan = STEP) -> Pushes:
    rank.executor.begin_step(plan)
    pushes = rank.executor._pushes = Pushes()  # type: ignore[assignment]
    rank.executor.start_loads()
    return pushes  # type: ignore[return-value]


def check_stopped(rank: Rank, pushes: Pushes, reason: str) -> None:
    """Nothing of the step is kept, and no other one begins."""
    receipts = {receipt.transfer: receipt for receipt in rank.settle(1)}
    assert receipts[SAVE.transfer].outcome is Outcome.FAILED
    assert pushes.failure == reason
    with pytest.raises(RuntimeError):
        rank.executor.begin_step(StepPlan(6))


# -- layers that do not wait ---------------------------------------------------------------------


@pytest.mark.parametrize("silent", [{0}, {1}, {2}, {0, 1, 2}])
def test_a_layer_that_does_not_wait_stops_the_engine(rank: Rank, silent: set[int]) -> None:
    """All of them: a graph that was replayed without hooks."""
    pushes = begin(rank)
    for index, layer in enumerate(rank.layers):
        if index not in silent:
            rank.executor.wait_layer(layer)
    with pytest.raises(LayersDidNotWait, match=f"layer.{min(silent)}.*load.mode"):
        rank.executor.end_step()
    check_stopped(rank, pushes, "LayersDidNotWait")


def test_that_a_layer_has_waited_in_another_step_does_not_count(rank: Rank) -> None:
    rank.run(STEP)
    rank.settle(2)
    begin(rank)
    with pytest.raises(LayersDidNotWait):
        rank.executor.end_step()


def test_a_layer_that_shares_its_row_with_one_that_waits_must_wait_too() -> None:
    shape = geometry()
    rows = [replace(row, layers=(f"{i}.full", f"{i}.index")) for i, row in enumerate(shape.rows)]
    rank = Rank(shape=replace(shape, rows=tuple(rows)))
    pushes = begin(rank)
    for row in rank.geometry.rows:
        rank.executor.wait_layer(row.layers[0])
    with pytest.raises(LayersDidNotWait, match=r"0\.index"):
        rank.executor.end_step()
    check_stopped(rank, pushes, "LayersDidNotWait")
    rank.executor.close()


def test_a_row_with_nothing_of_the_load_in_it_is_nobodys_to_wait_for() -> None:
    shape = geometry()
    rows = [replace(row, groups=(i % 2,)) for i, row in enumerate(shape.rows)]
    rank = Rank(shape=replace(shape, rows=tuple(rows)))
    begin(rank, StepPlan(5, loads=(LOAD,)))
    for row in rank.geometry.rows[::2]:
        rank.executor.wait_layer(row.layers[0])
    rank.executor.end_step()
    rank.executor.close()


def test_a_step_without_a_forward_waits_for_nobody(rank: Rank) -> None:
    rank.run(replace(STEP, forward=False), hooks=False)
    assert {receipt.outcome for receipt in rank.settle(2)} == {Outcome.DONE}


def test_a_forward_that_has_failed_is_not_blamed_on_its_layers(rank: Rank) -> None:
    begin(rank)
    rank.executor.wait_layer(rank.layers[0])
    rank.executor.fail_step("step_failed")
    rank.executor.end_step()
    receipts = {receipt.transfer: receipt for receipt in rank.settle(2)}
    assert receipts[SAVE.transfer].reason == "step_failed"


@pytest.mark.parametrize("asked_first", [True, False])
@pytest.mark.parametrize("drafted", [True, False])
def test_a_draft_model_runs_once_the_loads_are_finished_or_not_at_all(
    rank: Rank, drafted: bool, asked_first: bool
) -> None:
    expected = rank.pages((7, 2))
    rank.executor.drafts_follow(rank.layers)
    begin(rank)
    *target, draft = rank.layers
    for layer in target:
        rank.executor.wait_layer(layer)
    if asked_first:
        rank.executor.collect()
    else:
        rank.executor.finish_loads()
    assert rank.pages((11, 5)) == expected
    if drafted:
        rank.executor.wait_layer(draft)
    rank.executor.end_step()


@pytest.mark.parametrize("called", [[], [0, 2]])
def test_layers_before_the_drafts_must_wait(rank: Rank, called: list[int]) -> None:
    rank.executor.drafts_follow(rank.layers)
    pushes = begin(rank)
    for index in called:
        rank.executor.wait_layer(rank.layers[index])
    with pytest.raises(LayersDidNotWait):
        rank.executor.end_step()
    check_stopped(rank, pushes, "LayersDidNotWait")


def test_where_layers_do_not_call_all_is_there_before_the_forward(rank: Rank) -> None:
    expected = rank.pages((7, 2))
    rank.executor.load_before_forward()
    rank.mover.stall = threading.Event()
    timer = threading.Timer(0.05, rank.mover.stall.set)
    timer.start()
    begin(rank)
    assert rank.pages((11, 5)) == expected
    rank.executor.end_step()
    assert {receipt.outcome for receipt in rank.settle(2)} == {Outcome.DONE}


# -- layers that run several times in a step -----------------------------------------------------


def test_a_step_whose_layers_cannot_call_begins_when_all_is_there(rank: Rank) -> None:
    """It replays one graph of the whole model. The next step waits by its layers again."""
    expected = rank.pages((7, 2))
    rank.executor.begin_step(StepPlan(5, loads=(LOAD,)))
    rank.executor.start_loads(layers_call=False)
    assert rank.pages((11, 5)) == expected
    rank.executor.end_step()
    assert rank.settle(1)[0].outcome is Outcome.DONE
    rank.executor.begin_step(StepPlan(6, loads=(load(4, (12, 6)),)))
    rank.executor.start_loads()
    with pytest.raises(LayersDidNotWait):
        rank.executor.end_step()


def test_a_row_is_written_when_every_pass_has_written_its_part(rank: Rank) -> None:
    """Two passes, each for one of two blocks, as in micro-batches."""
    rank.executor.save_after_forward()
    assert not rank.executor.moves_rows
    pushes = begin(rank, StepPlan(5, saves=(save(3, 4, (9, 8)),)))
    for block in (9, 8):
        for row, layer in zip(rank.geometry.rows, rank.layers, strict=True):
            start = row.offset + block * STRIDE
            rank.cache[start : start + row.page_bytes] = 99
            rank.executor.layer_written(layer)
        assert rank.executor._saver.pool.await_idle(60)  # whoever copies now copies too early
    assert pushes.rows == []
    rank.executor.end_step()
    rank.settle(1)
    rank.run(StepPlan(0, loads=(load(4, (11, 5), slot=4),)))
    rank.settle(1)
    assert rank.pages((11, 5)) == [bytes([99]) * page for page in PAGES for _ in range(2)]


# -- copies that do not end ----------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: Patch) -> Iterator[Rank]:
    monkeypatch.setattr(executor_module, "LEAST_PATIENCE", 0.05)
    config = executor_module.LoadConfig.model_validate({"deadline": 0.05})
    rank = Rank(config)
    rank.save(3, (7, 2))
    rank.mover.stall = threading.Event()
    yield rank
    rank.mover.stall.set()
    rank.executor.close()


def test_the_forwards_wait_has_an_end_at_which_the_engine_stops(impatient: Rank) -> None:
    pushes = begin(impatient)
    with pytest.raises(LoadStuck, match="row 0 of the loads for r did not arrive"):
        impatient.executor.wait_layer(impatient.layers[0])
    with pytest.raises(LoadStuck):
        impatient.executor.end_step()
    check_stopped(impatient, pushes, "LoadStuck")


def test_memory_that_is_still_being_pinned_makes_no_copy_late(impatient: Rank) -> None:
    assert impatient.mover.stall is not None
    impatient.mover.stall.set()
    impatient.mover.pinning = threading.Event()
    threading.Timer(0.3, impatient.mover.pinning.set).start()
    impatient.run(StepPlan(0, loads=(LOAD,)))
    assert impatient.settle(1)[0].outcome is Outcome.DONE


@pytest.mark.parametrize("ends", [Executor.end_step, Executor.collect, Executor.finish_loads])
def test_so_have_all_other_waits_for_a_row(
    impatient: Rank, ends: Callable[[Executor], object]
) -> None:
    begin(impatient, StepPlan(5, loads=(LOAD,), forward=False))
    with pytest.raises(LoadStuck):
        ends(impatient.executor)
    with pytest.raises(LoadStuck):
        impatient.executor.begin_step(StepPlan(6))


def test_a_copy_that_has_begun_and_does_not_end_holds_nobody_for_ever(
    impatient: Rank, monkeypatch: Patch
) -> None:
    """Its blocks must not be used by anybody: it may go on at any time."""
    begun, load_row = threading.Event(), impatient.mover.load

    def noted(*arguments: Any, **options: Any) -> Fence:
        begun.set()
        return load_row(*arguments, **options)

    monkeypatch.setattr(impatient.mover, "load", noted)
    impatient.run(StepPlan(0, loads=(load(2, (11, 5), mode=LoadMode.PARKED, timeout=0.01),)))
    assert begun.wait(60)
    time.sleep(0.02)
    assert not impatient.executor.collect().arrived, "given up, and its copy may still end"
    time.sleep(0.06)
    with pytest.raises(LoadStuck, match="blocks of r"):
        impatient.executor.collect()
    with pytest.raises(LoadStuck):
        impatient.executor.begin_step(StepPlan(6))


# -- Lamina, broken ------------------------------------------------------------------------------


def nobody_is_missed(patch: Patch) -> None:
    patch.setattr(StepLoads, "_check_called", lambda loads, run: None)


def what_was_computed_is_kept(patch: Patch) -> None:
    patch.setattr(SaveRun, "poison", lambda saves, reason: None)


def the_next_step_begins(patch: Patch) -> None:
    begin_step = Executor.begin_step

    def careless(executor: Executor, plan: StepPlan) -> None:
        executor._loads.stopped = None
        begin_step(executor, plan)

    patch.setattr(Executor, "begin_step", careless)


def the_first_pass_counts(patch: Patch) -> None:
    patch.setattr(Executor, "save_after_forward", lambda executor: None)


def the_forward_begins_at_once(patch: Patch) -> None:
    patch.setattr(Executor, "load_before_forward", lambda executor: None)


BREAKS: list[tuple[Callable[[Patch], None], Callable[..., None]]] = [
    (nobody_is_missed, lambda rank: test_a_layer_that_does_not_wait_stops_the_engine(rank, {1})),
    (
        what_was_computed_is_kept,
        lambda rank: test_a_layer_that_does_not_wait_stops_the_engine(rank, {1}),
    ),
    (
        the_next_step_begins,
        lambda rank: test_a_layer_that_does_not_wait_stops_the_engine(rank, {1}),
    ),
    (the_first_pass_counts, test_a_row_is_written_when_every_pass_has_written_its_part),
    (the_forward_begins_at_once, test_where_layers_do_not_call_all_is_there_before_the_forward),
]


@pytest.mark.parametrize(("broken", "test"), BREAKS, ids=lambda part: part.__name__)
def test_a_broken_executor_is_seen(
    broken: Callable[[Patch], None],
    test: Callable[[Rank], None],
    rank: Rank,
    monkeypatch: Patch,
) -> None:
    broken(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(rank)

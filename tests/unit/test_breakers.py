"""A tier that keeps failing is taken out of use, each way on its own, and tried again."""

from __future__ import annotations

import logging

import pytest
from driven_planner import Engine, View, prompt

from lamina.config import BreakerConfig
from lamina.control.breakers import MAX_PAUSE, CircuitBreaker
from lamina.plan import LOAD_FAILED, LoadMode, Outcome, Receipt, TierName, TransferReceipt


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker("loads", BreakerConfig(failures=3, pause=10.0), clock)


def open_it(breaker: CircuitBreaker) -> None:
    for _ in range(3):
        breaker.judge(good=False)


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not(
    breaker: CircuitBreaker,
) -> None:
    for _ in range(5):
        breaker.judge(good=False)
        breaker.judge(good=False)
        breaker.judge(good=True)
    assert breaker.allows
    open_it(breaker)
    assert not breaker.allows


def test_after_the_pause_one_try_is_allowed_and_a_good_one_closes_it(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    open_it(breaker)
    clock.now = 9.9
    assert not breaker.allows
    clock.now = 10.0
    assert breaker.allows
    assert breaker.ordered()
    assert not breaker.allows
    breaker.judge(good=True, trying=True)
    assert breaker.allows
    assert not breaker.ordered()


def test_every_try_that_fails_doubles_the_pause_up_to_a_limit(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    open_it(breaker)
    pauses = []
    for _ in range(8):
        before = clock.now
        while not breaker.allows:
            clock.now += 1
        pauses.append(clock.now - before)
        breaker.ordered()
        breaker.judge(good=False, trying=True)
    assert pauses == [10, 20, 40, 80, 160, MAX_PAUSE, MAX_PAUSE, MAX_PAUSE]


@pytest.mark.parametrize("good", [True, False])
def test_what_was_ordered_before_it_opened_changes_nothing(
    breaker: CircuitBreaker, clock: Clock, good: bool
) -> None:
    open_it(breaker)
    breaker.judge(good)
    clock.now = 9.9
    assert not breaker.allows
    clock.now = 10.0
    breaker.ordered()
    breaker.judge(good)
    assert not breaker.allows
    breaker.judge(good=False, trying=True)
    clock.now = 29.9
    assert not breaker.allows
    clock.now = 30.0
    assert breaker.allows


def test_a_try_that_says_nothing_about_the_tier_may_be_made_again(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    open_it(breaker)
    clock.now = 10.0
    breaker.ordered()
    breaker.try_again()
    assert breaker.allows


# -- in the planner ------------------------------------------------------------------------


def on_disk(engine: Engine, *seeds: int) -> None:
    """Save one chunk of each prompt to disk, and forget the host's copy."""
    for seed in seeds:
        engine.save(View(f"save {seed}", prompt(40, seed)))
        engine.settle_writes()
    engine.planner._catalog.host.clear()


def load(engine: Engine, seed: int, outcome: Outcome | None, name: str = "load") -> int:
    """Look one prompt up, load what is hit, and answer; returns the tokens hit."""
    view = View(f"{name} {seed}", prompt(40, seed))
    hit = engine.planner.lookup(view, 0)
    engine.planner.admitted(view.request_id, hit.tokens)
    plan = engine.step()
    if outcome is not None:
        engine.answer(*(o.transfer for o in plan.loads), outcome=outcome)
        engine.planner.finished(view.request_id, 0, [])
    return hit.tokens


def test_a_disk_that_keeps_failing_is_not_asked_any_more_until_a_try_succeeds() -> None:
    engine = Engine(disk_slots=20)
    on_disk(engine, *range(8))
    assert [load(engine, seed, Outcome.FAILED) for seed in range(4)] == [32, 32, 32, 0]
    engine.now += 10
    assert load(engine, 4, Outcome.FAILED) == 32  # the try
    assert load(engine, 5, Outcome.DONE) == 0
    engine.now += 20
    assert load(engine, 5, Outcome.DONE) == 32
    assert load(engine, 6, Outcome.DONE) == 32


def test_a_try_is_one_parked_load_with_little_time() -> None:
    engine = Engine(disk_slots=20)
    on_disk(engine, *range(6))
    for seed in range(3):
        load(engine, seed, Outcome.FAILED)
    engine.now += 10
    first, second = View("first", prompt(40, 3)), View("second", prompt(40, 4))
    hit = engine.planner.lookup(first, 0)
    assert engine.planner.lookup(second, 0).tokens == 32, "both see it, one may take it"
    engine.planner.admitted("first", hit.tokens)
    assert engine.planner.lookup(second, 0).tokens == 0
    (order,) = engine.step().loads
    assert (order.mode, order.deadline) == (LoadMode.PARKED, 3.0)


def test_the_story_says_that_a_tier_is_out_of_use() -> None:
    engine = Engine(disk_slots=20)
    on_disk(engine, *range(5))
    for seed in range(3):
        load(engine, seed, Outcome.FAILED)
    view = View("later", prompt(40, 4))
    engine.planner.lookup(view, 0)
    assert engine.planner._requests["later"].story.reason == "tier_out_of_use"


def test_loads_that_do_not_end_in_time_count_once() -> None:
    engine = Engine({"breaker": {"failures": 2}}, disk_slots=20)
    on_disk(engine, *range(6))
    load(engine, 0, None)
    engine.wait(61)
    (late,) = engine.planner._transfers.live()
    engine.answer(late.id, outcome=Outcome.FAILED)
    assert load(engine, 1, Outcome.FAILED) == 32
    assert load(engine, 2, Outcome.FAILED) == 0


def test_a_disk_that_cannot_be_written_to_still_serves_what_it_holds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(disk_slots=20)
    on_disk(engine, 0)
    with caplog.at_level(logging.WARNING, "lamina.control"):
        for seed in range(1, 6):
            engine.save(View(f"s{seed}", prompt(40, seed)))
            engine.answer(*(w.transfer for w in engine.step().writes), outcome=Outcome.FAILED)
    assert [r.message.split(" ")[0] for r in caplog.records] == ["writes"]
    assert not engine.planner.has_work or engine.step().drop_disk
    engine.planner.gauges()
    gauges = engine.readings().gauges
    assert gauges["tier_in_use", ("disk", "write")] == 0
    assert gauges["tier_in_use", ("disk", "load")] == 1
    assert load(engine, 0, Outcome.DONE) == 32
    engine.now += 10
    assert len(engine.step().writes) == 1, "one try"
    assert not engine.step().writes


def test_after_a_good_try_the_backlog_is_written() -> None:
    engine = Engine(disk_slots=20)
    for seed in range(6):
        engine.save(View(f"s{seed}", prompt(40, seed)))
        engine.answer(*(w.transfer for w in engine.step().writes), outcome=Outcome.FAILED)
    engine.now += 10
    engine.settle_writes()
    assert len(engine.step().writes) == 2


def test_saves_that_fail_with_a_load_do_not_stop_saving() -> None:
    engine = Engine()
    for seed in range(5):
        view = View(f"r{seed}", prompt(40, seed))
        engine.planner.lookup(view, 0)
        engine.planner.admitted(view.request_id, 0)
        (save,) = engine.step((view.request_id, 40)).saves
        item = TransferReceipt(save.transfer, Outcome.FAILED, reason=LOAD_FAILED)
        engine.planner.receive([Receipt(0, (item,))])
    assert engine.planner._breakers.fills(TierName.HOST).closed


def test_saves_that_keep_failing_are_stopped_and_serving_goes_on() -> None:
    engine = Engine()
    for seed in range(5):
        view = View(f"r{seed}", prompt(40, seed))
        engine.planner.lookup(view, 0)
        engine.planner.admitted(view.request_id, 0)
        plan = engine.step((view.request_id, 40))
        assert len(plan.saves) == (1 if seed < 3 else 0)
        engine.answer(*(s.transfer for s in plan.saves), outcome=Outcome.FAILED)
    assert not engine.pool.held
    assert engine.count("saves_held_back", "tier_out_of_use") == 2


def test_a_try_from_two_tiers_ends_for_both() -> None:
    """The host is out of use, and the load that tries it fails by the disk's fault."""
    engine = Engine({"breaker": {"failures": 1}}, disk_slots=50)
    saves = engine.save(View("save", prompt(70))).saves
    engine.settle_writes()
    engine.planner._catalog.host.drop(saves[1].key)
    host = engine.planner._breakers.loads(TierName.HOST)
    host.judge(good=False)
    engine.now += 10
    hit = engine.planner.lookup(View("both", prompt(70)), 0)
    assert hit.tokens == 64
    engine.planner.admitted("both", hit.tokens)
    (order,) = engine.step().loads
    assert {chunk.tier for chunk in order.chunks} == set(TierName)
    bad = next(chunk.key for chunk in order.chunks if chunk.tier is TierName.DISK)
    engine.answer(order.transfer, outcome=Outcome.FAILED, bad=(bad,))
    assert host.allows, "it was not the host's fault, and the next one may try"


def test_what_only_a_dead_disk_has_is_kept_in_memory_again() -> None:
    engine = Engine(disk_slots=20)
    on_disk(engine, *range(5))
    for seed in range(3):
        load(engine, seed, Outcome.FAILED)
    view = View("hot", prompt(40, 4))
    assert engine.planner.lookup(view, 0).tokens == 0
    engine.planner.admitted("hot", 0)
    (save,) = engine.step(("hot", 40)).saves
    engine.answer(save.transfer)
    assert engine.planner.lookup(View("again", prompt(40, 4)), 0).tokens == 32


def test_a_try_that_was_too_slow_but_brought_something_has_worked() -> None:
    engine = Engine(disk_slots=20)
    on_disk(engine, *range(5))
    for seed in range(3):
        load(engine, seed, Outcome.FAILED)
    engine.now += 10
    view = View("long", prompt(40, 3))
    engine.planner.admitted("long", engine.planner.lookup(view, 0).tokens)
    (order,) = engine.step().loads
    late = TransferReceipt(order.transfer, Outcome.FAILED, moved_bytes=10, reason="deadline")
    engine.planner.receive([Receipt(0, (late,))])
    assert engine.planner._breakers.loads(TierName.DISK).closed


def test_what_failed_together_is_one_failure() -> None:
    engine = Engine(disk_slots=20)
    for seed in range(5):
        engine.save(View(f"s{seed}", prompt(40, seed)))
    engine.step()
    writes = list(engine.planner._transfers.live())
    items = tuple(TransferReceipt(w.id, Outcome.FAILED, reason="OSError") for w in writes)
    assert len(items) == 5
    engine.planner.receive([Receipt(0, items)])
    assert engine.planner._breakers.fills(TierName.DISK).closed


def test_loads_of_what_was_dropped_meanwhile_say_nothing_of_the_disk() -> None:
    engine = Engine({"breaker": {"failures": 1}}, disk_slots=20)
    on_disk(engine, 0)
    view = View("r", prompt(40, 0))
    engine.planner.admitted("r", engine.planner.lookup(view, 0).tokens)
    (order,) = engine.step().loads
    engine.planner._catalog.tiers[TierName.DISK].clear()
    engine.answer(order.transfer, outcome=Outcome.FAILED, bad=(order.chunks[0].key,))
    assert engine.planner._breakers.loads(TierName.DISK).closed


def test_one_long_step_is_not_held_against_what_waits_for_its_end() -> None:
    """A compilation, or a prefill on a slow machine, may take longer than any deadline."""
    engine = Engine()
    view = View("slow", prompt(40))
    engine.planner.lookup(view, 0)
    engine.planner.admitted("slow", 0)
    (save,) = engine.step(("slow", 40)).saves
    engine.now += 600
    engine.step()
    engine.answer(save.transfer)
    assert engine.planner.lookup(View("next", prompt(40)), 0).tokens == 32

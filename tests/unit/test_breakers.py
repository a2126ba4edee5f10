"""A tier that keeps failing is taken out of use, each way on its own, and tried again."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import pairwise
from math import inf

import pytest
from driven_planner import (
    CHUNK,
    CHUNK_BYTES,
    FAR,
    Engine,
    View,
    asks,
    inward,
    keys_of,
    outward,
    probes,
    prompt,
)

from lamina_kv.config import BreakerConfig
from lamina_kv.control.answers import LEAST_PATIENCE
from lamina_kv.control.breakers import DOUBT, MAX_PAUSE, Breakers, CircuitBreaker
from lamina_kv.control.probes import LEAST_PAUSE, LONGEST_PAUSE, MOST_WAITED
from lamina_kv.control.questions import LOOK_PLANS
from lamina_kv.control.transfers import Kind, Transfer, TransferTable
from lamina_kv.plan import (
    LOAD_FAILED,
    NEAR,
    Outcome,
    Receipt,
    TierName,
    TierReport,
    TransferReceipt,
)
from lamina_kv.tiers.contract import Fate


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


# -- by transfer ---------------------------------------------------------------------------


class Tiers:
    """Breakers that give up after one failure, and transfers to judge them by."""

    def __init__(self, clock: Clock) -> None:
        self.breakers = Breakers(BreakerConfig(failures=1, pause=10.0), clock, [FAR])
        self.transfers = TransferTable(1)

    def end(self, kind: Kind, reason: str = "", tier: TierName = FAR) -> Transfer:
        """One that has ended: well, or for a reason."""
        transfer = self.transfers.open(
            Transfer(
                kind,
                "",
                step=0,
                expires=0.0,
                size=1,
                tier=tier,
                trying=self.breakers.order(kind, tier),
            )
        )
        outcome = Outcome.FAILED if reason else Outcome.DONE
        transfer.apply(0, TransferReceipt(transfer.id, outcome, reason=reason))
        return transfer

    def judge(self, *transfers: Transfer) -> tuple[bool, bool]:
        """Returns whether the far tier is read, and written to."""
        self.breakers.judge(transfers)
        return self.breakers.reads(FAR).closed, self.breakers.fills(FAR).closed


@pytest.fixture
def tiers(clock: Clock) -> Tiers:
    return Tiers(clock)


@pytest.mark.parametrize("reason", [Fate.CORRUPT, Fate.LATE, Fate.REFUSED, Fate.DOWN])
def test_a_tier_is_judged_each_way_by_what_goes_that_way(tiers: Tiers, reason: str) -> None:
    assert tiers.judge(tiers.end(Kind.MOVE_OUT, reason)) == (True, False)
    assert tiers.judge(tiers.end(Kind.MOVE_IN, reason)) == (False, False)


def test_a_tier_that_does_not_answer_questions_is_not_read(tiers: Tiers) -> None:
    assert tiers.judge(tiers.end(Kind.ASK, Fate.LATE)) == (False, True)
    assert not tiers.breakers.readable(FAR)


def test_a_chunk_that_is_gone_says_nothing(tiers: Tiers, clock: Clock) -> None:
    """Others may have removed it; and a tier may know that and be unable to read."""
    assert tiers.judge(tiers.end(Kind.MOVE_IN, Fate.GONE)) == (True, True)
    tiers.judge(tiers.end(Kind.MOVE_IN, Fate.DOWN))
    clock.now += 10
    assert tiers.judge(tiers.end(Kind.MOVE_IN, Fate.GONE)) == (False, True)
    assert tiers.breakers.readable(FAR), "so that it may be tried again"
    assert tiers.judge(tiers.end(Kind.MOVE_IN)) == (True, True)


def test_loads_and_pushes_say_nothing_of_any_tier(tiers: Tiers) -> None:
    for kind in Kind.LOAD, Kind.PUSH, Kind.RECEIVE:
        assert tiers.judge(tiers.end(kind, "deadline", NEAR)) == (True, True)
    assert tiers.breakers.fills(NEAR).closed


def test_what_failed_together_is_one_failure_and_none_beside_a_success(clock: Clock) -> None:
    tiers = Tiers(clock)
    tiers.breakers = Breakers(BreakerConfig(failures=2, pause=10.0), clock, [FAR])
    late = [tiers.end(Kind.MOVE_IN, Fate.LATE) for _ in range(5)]
    assert tiers.judge(*late) == (True, True)
    assert tiers.judge(*late, tiers.end(Kind.MOVE_IN)) == (True, True)
    assert tiers.judge(*late) == (True, True)
    assert tiers.judge(*late) == (False, True)


# -- in the planner ------------------------------------------------------------------------


def far_only(engine: Engine, *seeds: int) -> None:
    """Save one chunk of each prompt to the far tier, and forget near's copy."""
    for seed in seeds:
        engine.save(View(f"save {seed}", prompt(40, seed)))
        engine.write_all()
    engine.forget_near()


def fetch(engine: Engine, seed: int, outcome: Outcome | None, name: str = "load") -> int:
    """Look one prompt up, and answer the moves that it waits for; returns the tokens that are
    loaded in the end."""
    view = View(f"{name} {seed}", prompt(40, seed))
    offer = engine.planner.lookup(view, 0)
    moves = inward(engine.step()) if offer.ask_again else ()
    if outcome is not None:
        engine.answer(*(move.transfer for move in moves), outcome=outcome)
        offer = engine.planner.lookup(view, 0)
        assert not offer.ask_again
        engine.planner.finished(view.request_id, 0, [])
    return offer.tokens


def kept(engine: Engine, seeds: Iterable[int]) -> list[bool]:
    """Which prompts a request would wait for, because a far tier has them."""
    answers = []
    for seed in seeds:
        view = View(f"kept {seed}", prompt(40, seed))
        answers.append(engine.planner.lookup(view, 0).ask_again)
        engine.planner.finished(view.request_id, 0, [])
    return answers


def broken(*, seeds: int = 8, **more: object) -> Engine:
    """An engine whose far tier has a chunk of some prompts, and has failed to deliver three."""
    engine = Engine(far_slots=20, **more)  # type: ignore[arg-type]
    far_only(engine, *range(seeds))
    assert [fetch(engine, seed, Outcome.FAILED) for seed in range(3)] == [0, 0, 0]
    return engine


def test_a_tier_that_keeps_failing_is_not_read_until_a_probe_goes_well() -> None:
    engine = broken()
    assert kept(engine, [3]) == [False]
    for _ in range(30):
        engine.probe(well=False)
        assert kept(engine, [3, 4]) == [False, False], "however long that takes"
    began = engine.now
    engine.probe(well=True)
    assert engine.now <= began + LONGEST_PAUSE
    assert [fetch(engine, seed, Outcome.DONE) for seed in (5, 6)] == [32, 32]


def test_whether_a_probe_is_needed_is_seen_before_anything_was_probed() -> None:
    """An engine that gets no answer tries when the pause is over."""
    engine = broken()
    engine.now += 10
    assert fetch(engine, 4, Outcome.FAILED) == 0
    engine.step()
    engine.now += 20
    assert fetch(engine, 5, Outcome.DONE) == 32
    assert fetch(engine, 6, Outcome.DONE) == 32


def test_one_failure_is_enough_after_a_probe_and_good_probes_are_believed_less_each_time() -> None:
    """The store answers, and does not deliver: requests must not wait for it once a second."""
    engine, tried = broken(seeds=18), []
    for _ in range(100):
        engine.probe(well=True)
        if kept(engine, [3]) == [True]:
            tried.append(engine.now)
            assert fetch(engine, 4, Outcome.FAILED, f"load {engine.now}") == 0
        engine.now += 1
    pauses = [after - before for before, after in pairwise(tried)]
    assert pauses[0] >= DOUBT * LONGEST_PAUSE - 1
    assert pauses == sorted(pauses)
    assert len(tried) <= 4


def test_a_tier_that_failed_after_a_probe_is_believed_after_several_good_ones_in_a_row() -> None:
    engine = broken()
    engine.probe(well=True)
    assert fetch(engine, 4, Outcome.FAILED) == 0
    for well in (*[True] * (DOUBT - 1), False, *[True] * (DOUBT - 1)):
        engine.probe(well=well)
        assert not engine.planner._books.breakers.reads(FAR).closed
    engine.probe(well=True)
    assert fetch(engine, 5, Outcome.DONE) == 32


def test_once_a_chunk_has_moved_it_takes_as_many_failures_as_ever() -> None:
    engine = broken(seeds=12)
    engine.probe(well=True)
    assert fetch(engine, 4, Outcome.DONE) == 32
    assert [fetch(engine, seed, Outcome.FAILED) for seed in (5, 6)] == [0, 0]
    assert kept(engine, [7]) == [True]


def test_a_tier_in_use_is_not_probed() -> None:
    engine = Engine(far_slots=20)
    far_only(engine, *range(4))
    for _ in range(20):
        engine.now += 1
        assert probes(engine.step()) == ()


def test_one_probe_is_under_way_however_long_it_takes_and_it_keeps_nobody_awake() -> None:
    engine = broken()
    asked = []
    for _ in range(1000):
        asked += probes(engine.step())
        engine.now += 1
        assert not engine.planner.has_work
    assert len(asked) == 1
    engine.answer(*asked)
    assert fetch(engine, 5, Outcome.DONE) == 32


def test_probes_become_rarer_up_to_one_a_second() -> None:
    engine, moments = broken(), []
    for _ in range(8):
        engine.probe(well=False)
        moments.append(engine.now)
    pauses = [after - before for before, after in pairwise(moments)]
    assert (pauses[0], max(pauses)) == (LEAST_PAUSE, LONGEST_PAUSE)
    assert pauses == sorted(pauses)


def test_a_tier_is_well_when_it_is_for_every_rank() -> None:
    engine = broken(ranks=2)
    (probe,) = probes(engine.step())
    engine.answer(probe, ranks=[0])
    assert kept(engine, [3]) == [False]
    engine.answer(probe, ranks=[1])
    assert kept(engine, [3]) == [True]


@pytest.mark.parametrize("well", [True, False])
def test_the_first_request_of_an_engine_that_was_idle_waits_for_a_probe(well: bool) -> None:
    """Nobody has probed while nothing ran."""
    engine = broken()
    engine.probe(well=False)
    engine.now += 60
    view = View("first", prompt(40, 5))
    assert engine.planner.lookup(view, 0).ask_again
    (probe,) = probes(engine.step())
    engine.answer(probe, outcome=Outcome.DONE if well else Outcome.FAILED)
    offer = engine.planner.lookup(view, 0)
    assert (offer.ask_again, offer.reason) == (
        (True, "miss") if well else (False, "tier_out_of_use")
    )
    assert len(inward(engine.step())) == well
    assert kept(engine, [6]) == [well]


def test_nobody_waits_long_for_a_probe_of_a_store_that_hangs() -> None:
    engine = broken()
    engine.probe(well=False)
    engine.now += 60
    view = View("first", prompt(40, 5))
    for _ in range(LOOK_PLANS):
        assert engine.planner.lookup(view, 0).ask_again
        engine.step()
    engine.now += LEAST_PATIENCE
    assert not engine.planner.lookup(view, 0).ask_again
    engine.now += MOST_WAITED
    assert kept(engine, [6]) == [False], "it hangs, as is known by now"


def test_a_question_that_is_answered_does_not_make_up_for_chunks_that_are_not_delivered() -> None:
    tier = {"kind": "disk", "name": FAR, "path": "/store", "capacity": "1GiB"}
    settings: dict[str, object] = {"tiers": [tier], "load": {"when": "always"}}
    engine = Engine(settings, tiers=[TierReport(FAR)])
    for seed in range(4):
        view = View(f"request {seed}", prompt(40, seed))
        offer = engine.planner.lookup(view, 0)
        assert offer.ask_again == (seed < 3)
        for ask in asks(engine.step()):
            engine.answer(ask.transfer, present=b"\1" * len(ask.keys))
        engine.planner.lookup(view, 0)
        moves = inward(engine.step())
        engine.answer(*(move.transfer for move in moves), outcome=Outcome.FAILED, reason=Fate.LATE)
        engine.planner.finished(view.request_id, 0, [])


def test_who_waits_for_chunks_of_a_tier_that_is_taken_out_of_use_waits_no_longer() -> None:
    engine = Engine({"breaker": {"failures": 1}}, far_slots=20)
    far_only(engine, *range(2))
    views = [View(f"request {seed}", prompt(40, seed)) for seed in range(2)]
    assert all(engine.planner.lookup(view, 0).ask_again for view in views)
    first, _ = inward(engine.step())
    engine.answer(first.transfer, outcome=Outcome.FAILED, reason=Fate.LATE)
    engine.step()
    assert [engine.planner.lookup(view, 0).ask_again for view in views] == [False, False]


def test_a_try_is_one_move() -> None:
    engine = Engine(far_slots=20)
    far_only(engine, *range(6))
    for seed in range(3):
        fetch(engine, seed, Outcome.FAILED)
    engine.now += 10
    views = [View("long", prompt(40, 3)), View("other", prompt(40, 4))]
    assert [engine.planner.lookup(view, 0).ask_again for view in views] == [True, True]
    assert len(inward(engine.step())) == 1
    assert inward(engine.step()) == ()


def test_the_offer_says_that_a_tier_is_out_of_use() -> None:
    engine = Engine(far_slots=20)
    far_only(engine, *range(5))
    for seed in range(3):
        fetch(engine, seed, Outcome.FAILED)
    assert engine.planner.lookup(View("later", prompt(40, 4)), 0).reason == "tier_out_of_use"


def test_moves_that_do_not_end_in_time_count_once() -> None:
    engine = Engine({"breaker": {"failures": 2}}, far_slots=20)
    far_only(engine, *range(6))
    fetch(engine, 0, None)
    engine.wait(61)
    (late,) = engine.planner._books.transfers.live()
    engine.answer(late.id, outcome=Outcome.FAILED)
    assert kept(engine, [1]) == [True]
    fetch(engine, 1, Outcome.FAILED)
    assert kept(engine, [2]) == [False]


def fail_writes(engine: Engine, seeds: Iterable[int]) -> list[int]:
    """Save chunks one after the other while none can be written; the slots that are void."""
    dropped: list[int] = []
    for seed in seeds:
        plans = engine.save(View(f"s{seed}", prompt(40, seed))), engine.step()
        dropped += (slot for plan in plans for orders in plan.tiers for slot in orders.drops)
        moves = [move.transfer for plan in plans for move in outward(plan)]
        engine.answer(*moves, outcome=Outcome.FAILED)
    return dropped


def test_a_tier_that_cannot_be_written_to_still_serves_what_it_holds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(far_slots=20)
    far_only(engine, 0)
    with caplog.at_level(logging.WARNING, "lamina_kv.control"):
        dropped = fail_writes(engine, range(1, 6))
    assert [r.message.split(" ")[0] for r in caplog.records] == ["writes"]
    assert dropped == [1, 1, 2], "what some rank may have written is void"
    assert not engine.planner.has_work
    engine.planner.gauges()
    gauges = engine.readings().gauges
    assert gauges["tier_in_use", (FAR, "write")] == 0
    assert gauges["tier_in_use", (FAR, "fetch")] == 1
    assert gauges["tier_in_use", (NEAR, "save")] == 1
    assert fetch(engine, 0, Outcome.DONE) == 32
    engine.now += 10
    assert len(outward(engine.step())) == 1, "one try"
    assert not outward(engine.step())


def test_after_a_good_try_the_backlog_is_written() -> None:
    engine = Engine(far_slots=20)
    fail_writes(engine, range(6))
    engine.now += 10
    engine.settle_moves()
    assert len(outward(engine.step())) == 3


@pytest.mark.parametrize("failures", [1, 2])
def test_what_could_not_be_written_is_tried_once_more_before_what_is_behind_it(
    failures: int,
) -> None:
    engine, tokens = Engine(far_slots=20, far={"max_inflight": 2 * CHUNK_BYTES}), prompt(6 * CHUNK)
    engine.save(View("a", tokens))
    for outcome in (Outcome.FAILED, Outcome.DONE if failures == 1 else Outcome.FAILED):
        moves = outward(engine.step())
        assert [move.key for move in moves] == keys_of(tokens)[:2]
        engine.answer(*(move.transfer for move in moves), outcome=outcome)
    engine.write_all()
    assert [engine.far.holds(key) for key in keys_of(tokens)] == [failures == 1] * 6


def test_what_could_not_be_written_and_near_has_lost_is_not_tried_again() -> None:
    engine = Engine(far_slots=20)
    engine.save(View("a", prompt(40)))
    (move,) = outward(engine.step())
    engine.near.drop(move.key)
    engine.answer(move.transfer, outcome=Outcome.FAILED)
    assert not outward(engine.step())
    assert not engine.count("writes_skipped", FAR, "evicted"), "the failure is counted"


def test_an_idle_engine_is_told_when_to_try_again_what_waits_to_be_written() -> None:
    engine = Engine(far_slots=20)
    assert engine.planner.write_wait == inf
    fail_writes(engine, range(6))
    assert (engine.planner.has_work, engine.planner.write_wait) == (False, LEAST_PAUSE)
    engine.now += LEAST_PAUSE
    assert (engine.planner.has_work, engine.planner.write_wait) == (True, 0.0)
    engine.step()
    assert not engine.planner.has_work, "a probe is under way"
    assert engine.planner.write_wait == LONGEST_PAUSE, "when to look what became of it"


@pytest.mark.parametrize("well", [True, False])
def test_what_waits_to_be_written_is_tried_once_more_when_the_engine_ends(well: bool) -> None:
    engine = Engine(far_slots=20)
    fail_writes(engine, range(6))
    engine.planner.hurry()
    assert engine.planner.has_work
    (try_,) = outward(engine.step())
    engine.answer(try_.transfer, outcome=Outcome.DONE if well else Outcome.FAILED)
    assert len(outward(engine.step())) == (3 if well else 0)
    assert engine.planner.has_work == well


def test_a_tier_that_is_out_of_use_is_asked_nothing() -> None:
    tier = {"kind": "disk", "name": FAR, "path": "/store", "capacity": "1GiB"}
    settings: dict[str, object] = {"breaker": {"failures": 1}, "tiers": [tier]}
    engine = Engine(settings, tiers=[TierReport(FAR)])
    assert engine.planner.lookup(View("a", prompt(40, 1)), 0).ask_again
    (question,) = asks(engine.step())
    engine.answer(question.transfer, outcome=Outcome.FAILED, reason=Fate.LATE)
    assert not engine.planner.lookup(View("b", prompt(40, 2)), 0).ask_again
    assert asks(engine.step()) == ()


def test_saves_that_fail_with_a_load_do_not_stop_saving() -> None:
    engine = Engine()
    for seed in range(5):
        view = View(f"r{seed}", prompt(40, seed))
        engine.planner.lookup(view, 0)
        engine.planner.admitted(view.request_id, 0)
        (save,) = engine.step((view.request_id, 40)).saves
        item = TransferReceipt(save.transfer, Outcome.FAILED, reason=LOAD_FAILED)
        engine.planner.receive([Receipt(0, (item,))])
    assert engine.planner._books.breakers.fills(NEAR).closed


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


def test_near_serves_what_it_holds_while_saves_fail() -> None:
    engine = Engine({"breaker": {"failures": 1}})
    engine.save(View("saved", prompt(40, 1)))
    engine.planner._books.breakers.fills(NEAR).judge(good=False)
    assert engine.planner.lookup(View("again", prompt(40, 1)), 0).tokens == 32


def test_what_only_a_dead_tier_has_is_kept_near_again() -> None:
    engine = Engine(far_slots=20)
    far_only(engine, *range(5))
    for seed in range(3):
        fetch(engine, seed, Outcome.FAILED)
    view = View("hot", prompt(40, 4))
    assert engine.planner.lookup(view, 0).tokens == 0
    engine.planner.admitted("hot", 0)
    (save,) = engine.step(("hot", 40)).saves
    engine.answer(save.transfer)
    assert engine.planner.lookup(View("again", prompt(40, 4)), 0).tokens == 32


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

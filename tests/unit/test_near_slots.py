"""Promise: nothing is saved or moved to a near slot that is not pinned yet, or never will be, and
neither a request nor a tier suffers from waiting for it.
"""

from __future__ import annotations

from driven_planner import CHUNK, CHUNK_BYTES, Engine, View, inward, keys_of, prompt

from lamina_kv.plan import NEAR

FIVE = prompt(5 * CHUNK + 1)


def slots(engine: Engine) -> list[int]:
    """Near slots that the next plan saves a request's chunks to."""
    plan = engine.step(("a", len(FIVE)))
    engine.answer(*(order.transfer for order in plan.saves))
    return [order.slot for order in plan.saves]


def started(engine: Engine) -> Engine:
    engine.planner.lookup(View("a", FIVE), 0)
    engine.planner.admitted("a", 0)
    return engine


def test_saves_wait_for_their_slots_and_are_not_overdue() -> None:
    engine = started(Engine(near_slots=10, near_ready=0))
    for _ in range(20):
        engine.now += 10
        assert slots(engine) == []
    engine.pin(3, 10)
    assert slots(engine) == [0, 1, 2]
    assert slots(engine) == [], "nothing goes while there will be room"
    engine.pin(10, 10)
    assert slots(engine) == [3, 4]
    assert engine.lookup(View("again", FIVE)).tokens == 5 * CHUNK
    readings = engine.readings()
    assert not [name for name in readings.counters if name[0] == "failures"]
    assert engine.planner._books.breakers.fills(NEAR).allows


def test_a_slot_is_used_when_every_rank_has_it() -> None:
    engine = started(Engine(ranks=2, near_slots=10, near_ready=2))
    engine.pin(10, 10, rank=1)
    assert slots(engine) == [0, 1]
    engine.pin(4, 10, rank=0)
    assert slots(engine) == [2, 3]
    engine.pin(4, 4, rank=0)
    assert engine.near.capacity == 4


def test_a_tier_that_ends_smaller_is_a_smaller_tier() -> None:
    engine = Engine(near_slots=100, near_ready=0)
    engine.pin(4, 4)
    engine.save(View("a", FIVE))
    other = prompt(3 * CHUNK + 1, seed=7)
    engine.save(View("b", other))
    assert {*engine.near.visible.values()} == {0, 1, 2, 3}
    assert engine.lookup(View("c", other)).tokens == 3 * CHUNK
    engine.planner.gauges()
    gauges = engine.readings().gauges
    assert gauges["tier_capacity_bytes", (NEAR,)] == 4 * CHUNK_BYTES


def test_a_request_waits_for_slots_to_move_near() -> None:
    engine = Engine(
        {"load": {"when": "always"}},
        near_slots=20,
        near_ready=0,
        far_slots=10,
        stored=dict(enumerate(keys_of(FIVE))),
    )
    view = View("a", FIVE)
    assert engine.planner.lookup(view, 0).ask_again
    plan = engine.step()
    assert not inward(plan)
    assert plan.outstanding, "an engine with nothing to run spins"
    engine.pin(2, 20)
    moves = inward(engine.settle_moves())
    assert [move.near for move in moves] == [0, 1]
    assert engine.planner.lookup(view, 0).ask_again
    engine.pin(20, 20)
    assert len(inward(engine.settle_moves())) == 3
    assert engine.planner.lookup(view, 0).tokens == 5 * CHUNK


def test_a_tier_that_is_off_holds_nobody_up() -> None:
    engine = Engine(
        {"load": {"when": "always"}},
        near_slots=20,
        near_ready=0,
        far_slots=10,
        stored=dict(enumerate(keys_of(FIVE))),
    )
    view = View("early", FIVE)
    assert engine.planner.lookup(view, 0).ask_again
    engine.step()
    engine.pin(0, 0)
    engine.step()
    offer = engine.planner.lookup(view, 0)
    assert (offer.ask_again, offer.tokens) == (False, 0)
    asks = [engine.planner.lookup(View("late", FIVE), 0) for _ in range(2)]
    assert (asks[-1].ask_again, asks[-1].tokens) == (False, 0)
    engine.planner.admitted("late", 0)
    assert not engine.step(("late", len(FIVE))).saves
    engine.planner.finished("late", len(FIVE), [View("late", FIVE).blocks()])
    assert not engine.planner.has_work

"""What an operator sizes tiers by: what hits have saved, how old evicted chunks were, who waits."""

from __future__ import annotations

import pytest
from driven_planner import CHUNK, FAR, Engine, View, inward, prompt

from lamina_kv import __version__
from lamina_kv.plan import NEAR


def test_how_an_engine_is_set_up_is_published_once() -> None:
    engine = Engine({"load": {"mode": "parked"}}, far_slots=5, saves=False)
    gauges = [series for series in engine.begun.gauges if series[0] == "config_info"]
    assert gauges == [
        ("config_info", (__version__, "host,disk", str(CHUNK), "auto", "parked", "yes", "no", "no"))
    ]
    engine.planner.gauges()
    assert not [name for name, _ in engine.readings().gauges if name == "config_info"]


def test_a_hit_saves_what_computing_it_is_predicted_to_take() -> None:
    engine = Engine()
    engine.save(View("a", prompt(2 * CHUNK + 1)))
    engine.readings()
    engine.planner.costs.computed(0, 2 * CHUNK, 3.0)
    offer = engine.lookup(View("b", prompt(2 * CHUNK + 1)))
    engine.planner.admitted("b", offer.tokens)
    engine.planner.plan_step([("b", offer.tokens, 2 * CHUNK + 1)], forward=True)
    engine.planner.finished("b", 2 * CHUNK + 1, [()])
    saved = {
        labels: amount
        for (name, labels), amount in engine.readings().counters.items()
        if name == "saved_seconds"
    }
    assert saved == {(NEAR,): pytest.approx(3.0)}


@pytest.mark.parametrize(("again", "idle"), [(False, 100), (True, 40)])
def test_an_eviction_says_for_how_long_its_chunk_was_not_used(again: bool, idle: float) -> None:
    engine = Engine(near_slots=1)
    engine.now = 5
    engine.save(View("a", prompt(CHUNK, seed=1)))
    engine.now = 65
    if again:
        engine.save(View("a again", prompt(CHUNK + 1, seed=1)))
    engine.now = 105
    engine.readings()
    engine.save(View("b", prompt(CHUNK, seed=2)))
    (age,) = engine.readings().observations["eviction_age_seconds", (NEAR,)]
    assert age == pytest.approx(idle, abs=1)


def test_a_chunk_that_is_dropped_or_failed_is_no_eviction() -> None:
    engine = Engine(near_slots=4)
    engine.save(View("a", prompt(CHUNK)))
    engine.readings()
    for key in list(engine.planner._books.catalog.near.visible):
        engine.planner._books.catalog.near.drop(key)
    assert not engine.readings().observations.get(("eviction_age_seconds", (NEAR,)))


def test_who_waits_for_a_far_tier_is_seen_and_so_is_how_long() -> None:
    engine = Engine({"load": {"when": "always"}}, near_slots=4, far_slots=10)
    engine.save(View("a", prompt(2 * CHUNK + 1, seed=1)))
    engine.settle_moves()
    for seed in (2, 3):
        engine.save(View(f"fills {seed}", prompt(2 * CHUNK + 1, seed=seed)))
        engine.settle_moves()
    engine.readings()
    view = View("again", prompt(2 * CHUNK + 1, seed=1))
    assert engine.planner.lookup(view, 0).ask_again
    assert _waiting(engine) == 1
    moves = inward(engine.step())
    engine.now += 2
    engine.answer(*(move.transfer for move in moves), seconds=0.5)
    assert engine.planner.lookup(view, 0).tokens == 2 * CHUNK
    assert _waiting(engine) == 0
    observations = engine.readings().observations
    assert observations["fetch_seconds", (FAR,)] == [0.5, 0.5]
    assert observations["fetch_wait_seconds", ()] == [pytest.approx(2, abs=0.1)]


def test_who_ends_while_it_waits_is_not_counted_any_more() -> None:
    engine = Engine({"load": {"when": "always"}}, near_slots=2, far_slots=10)
    engine.save(View("a", prompt(2 * CHUNK + 1, seed=1)))
    engine.settle_moves()
    engine.save(View("fills", prompt(2 * CHUNK + 1, seed=2)))
    engine.settle_moves()
    assert engine.planner.lookup(View("again", prompt(2 * CHUNK + 1, seed=1)), 0).ask_again
    assert _waiting(engine) == 1
    engine.planner.finished("again", 0, [()])
    assert _waiting(engine) == 0


def _waiting(engine: Engine) -> float:
    """Requests that wait for far tiers; what was published before is not published again."""
    engine.planner.gauges()
    return engine.meter._published_gauges["waiting_requests", ("fetch",)]

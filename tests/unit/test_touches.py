"""A store hears of every use of its chunks, from whichever tier they are loaded."""

from __future__ import annotations

from driven_planner import CHUNK, FAR, Engine, View, asks, keys_of, prompt

from lamina_kv.plan import ChunkKey, StepPlan, TierName, TierReport
from lamina_kv.tiers.reuse import Use
from lamina_kv.tiers.slots import SlotIndex
from lamina_kv.tiers.touches import MOST_KEPT, MOST_TOLD, Touches


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(20, "big"))


def told(plan: StepPlan) -> list[tuple[ChunkKey, int]]:
    return [use for orders in plan.tiers if orders.tier == FAR for use in orders.touches]


def test_a_store_hears_of_what_was_loaded_from_near() -> None:
    tokens = prompt(3 * CHUNK + 1)
    driven = Engine({"load": {"when": "always"}}, far_slots=20)
    driven.save(View("first", tokens))
    driven.write_all()
    driven.step()
    assert told(driven.step()) == []
    plan = driven.save(View("again", tokens))
    assert isinstance(driven.far, SlotIndex)
    places = [(each, driven.far.visible[each]) for each in keys_of(tokens)]
    assert told(plan) == places[::-1]
    assert told(driven.step()) == [], "each use once"
    assert not driven.planner.has_work


def test_a_store_hears_of_what_it_has_said_late() -> None:
    """It was asked when the request came, and had not answered when it was searched for first."""
    tokens, keyed = prompt(3 * CHUNK + 1), TierName("keyed")
    store = {"kind": "valkey", "name": keyed, "url": "valkey://store"}
    settings = {"tiers": [store], "load": {"when": "always"}}
    driven, view = Engine(settings, tiers=[TierReport(keyed)]), View("new", tokens)
    driven.planner.arrived(view)
    plans = [driven.step()]
    for ask in asks(plans[0]):
        driven.answer(ask.transfer, present=bytes([1] * len(ask.keys)))
    while driven.planner.lookup(view, 0).ask_again:
        plans.append(driven.settle_moves())
    driven.planner.admitted("new", 3 * CHUNK)
    plans += [driven.step(), driven.step()]
    uses = [use for plan in plans for orders in plan.tiers for use, _ in orders.touches]
    assert {*uses} == {*keys_of(tokens)}


def test_near_tells_nobody() -> None:
    index = SlotIndex(3, stored=False)
    index.room(key(1))
    index.filled(key(1))
    assert sum(1 for _ in index.use_prefix([key(1)], Use())) == 1
    assert index.touches() == ()


def test_a_plan_tells_a_bounded_number_of_uses_the_beginning_of_a_prefix_last() -> None:
    touches, places = Touches(), {key(number): number for number in range(MOST_TOLD + 2)}
    touches.add(list(places), [(key(99999), None)])
    places[key(99999)] = 7
    first = touches.take(places.get)
    assert [place for _, place in first] == [7, *range(MOST_TOLD + 1, 2, -1)]
    assert [place for _, place in touches.take(places.get)] == [2, 1, 0]
    assert touches.take(places.get) == ()


def test_what_is_gone_is_not_told_and_nothing_twice_in_one_plan() -> None:
    touches = Touches()
    touches.add([key(1), key(2)])
    touches.add([key(1), key(3)])
    assert touches.take({key(1): 1, key(2): 2}.get) == ((key(2), 2), (key(1), 1))


def test_of_more_requests_than_are_kept_the_oldest_are_forgotten() -> None:
    touches = Touches()
    for number in range(MOST_KEPT + 5):
        touches.add([key(number)])
    assert touches.take(lambda _: 0)[0] == (key(5), 0)

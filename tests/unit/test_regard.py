"""What a request says of its own chunks is honoured, within bounds."""

from __future__ import annotations

import random
from itertools import pairwise
from unittest.mock import patch

import pytest
from driven_planner import BLOCK, CHUNK, CHUNK_BYTES, FAR, Engine, View, keys_of, prompt
from test_eviction import NEVER, Tier
from test_eviction import keys_of as path_keys

from lamina_kv.control.requests import BoundaryState
from lamina_kv.control.shape import ChunkShape
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.plan import NEAR, StepPlan
from lamina_kv.tiers.regard import MOST_PIN_SECONDS, MOST_PRIORITY, USUAL, Regard

NOT_KEPT = Regard(keep=False)
PINNED = Regard(pin_seconds=60.0)
LAST = Regard(priority=-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"pin_seconds": -1.0},
        {"pin_seconds": MOST_PIN_SECONDS + 1},
        {"pin_seconds": float("nan")},
        {"priority": MOST_PRIORITY + 1},
        {"priority": -MOST_PRIORITY - 1},
    ],
)
def test_no_word_is_without_bounds(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Regard(**wrong)  # type: ignore[arg-type]


# -- not kept ------------------------------------------------------------------------------------


def test_what_is_not_worth_keeping_is_not_saved() -> None:
    engine = Engine(far_slots=10)
    assert not engine.save(View("a", prompt(100), regard=NOT_KEPT)).saves
    assert not engine.step().saves
    assert engine.lookup(View("b", prompt(100))).tokens == 0
    assert len(engine.save(View("c", prompt(100))).saves) == 3


def test_what_is_not_worth_keeping_is_loaded_all_the_same() -> None:
    engine = Engine()
    engine.save(View("a", prompt(100)))
    longer = prompt(100) + prompt(100, seed=1)
    plan = engine.save(View("b", longer, regard=NOT_KEPT))
    assert len(plan.loads) == 1
    assert not plan.saves
    assert len(engine.near.visible) == 3


def test_a_use_that_is_not_worth_keeping_keeps_nothing_longer() -> None:
    """A flood of requests that say so must not hold on to what they happen to find."""
    engine = Engine(near_slots=6, far_slots=1)
    engine.save(View("old", prompt(100)))
    engine.save(View("young", prompt(100, seed=1)))
    engine.write_all()
    again = View("again", prompt(100), regard=NOT_KEPT)
    engine.planner.arrived(again)
    engine.step()
    engine.save(again)
    engine.save(View("new", prompt(100, seed=2)))
    kept = engine.near.visible
    assert not any(key in kept for key in keys_of(prompt(100))[:3])
    assert all(key in kept for key in keys_of(prompt(100, seed=1))[:3])


def test_a_request_that_waits_and_is_not_worth_keeping_keeps_nothing_longer() -> None:
    engine = Engine(near_slots=6, far_slots=10)
    engine.save(View("old", prompt(100)))
    key = keys_of(prompt(100))[0]
    before = engine.near.uses(key)
    for name, regard, more in (("shy", NOT_KEPT, 0), ("usual", USUAL, 1)):
        view = View(name, prompt(100), regard=regard)
        for _ in range(2):
            engine.planner.arrived(view)
            engine.step()
            assert engine.near.uses(key) == before, "it has not begun"
        engine.planner.admitted(name, engine.planner.lookup(view, 0).tokens)
        engine.step()
        assert engine.near.uses(key) == before + more, "once, however often it was searched for"


def steps_of(kind: GroupKind, *, in_place: bool, regard: Regard) -> list[StepPlan]:
    """Plans of a request whose second group is of that kind, computed in one step."""
    window = 2 * CHUNK if kind is GroupKind.WINDOW else 0
    groups = Group(GroupKind.FULL, BLOCK), Group(kind, BLOCK, window, in_place=in_place)
    engine = Engine(shape=ChunkShape(CHUNK, groups, 0), leases_loads=True)
    tables = {0: [100, 101, 102, 103], 1: [200, 201, 202, 203]}
    view = View("a", prompt(2 * CHUNK + 1), tables=tables, regard=regard)
    engine.planner.admitted("a", engine.lookup(view).tokens)
    states = [BoundaryState("a", 1, 200, 2 * CHUNK)] if kind is GroupKind.STATE else []
    first = engine.planner.plan_step([("a", 0, 2 * CHUNK)], forward=True, states=states)
    return [first, engine.planner.plan_step([("a", 2 * CHUNK, 2 * CHUNK + 1)], forward=True)]


@pytest.mark.parametrize(
    ("kind", "in_place"),
    [
        (GroupKind.WINDOW, False),
        (GroupKind.WINDOW, True),
        (GroupKind.STATE, False),
        (GroupKind.STATE, True),
    ],
)
def test_no_kind_of_group_is_saved(kind: GroupKind, in_place: bool) -> None:
    usual = steps_of(kind, in_place=in_place, regard=Regard())
    assert {order.group for plan in usual for order in plan.saves} == {0, 1}
    plans = steps_of(kind, in_place=in_place, regard=NOT_KEPT)
    assert not any(plan.saves for plan in plans)


# -- pins ----------------------------------------------------------------------------------------


def flood(tier: Tier, *, requests: int = 100, regard: Regard = USUAL) -> None:
    """Requests that nobody repeats; five chunks each."""
    for number in range(requests):
        tier.ask([10_000 + number, 1, 2, 3, 4], regard)


def test_what_is_pinned_stays_until_its_time_is_over() -> None:
    tier, path = Tier(40), [1, 2, 3, 4, 5]
    tier.ask(path, PINNED)
    flood(tier)
    tier.now += 59.0
    flood(tier)
    assert tier.found(path) == 5
    tier.now += 2.0
    flood(tier)
    assert tier.found(path) == 0
    assert tier.index.pinned == 0


def test_a_pin_counts_from_the_last_use_and_from_its_end() -> None:
    tier, path = Tier(40), [1, 2, 3, 4, 5]
    use = tier.begin(path, PINNED)
    tier.run(path, use)
    tier.now += 50.0
    tier.end(path, use)
    tier.now += 50.0
    flood(tier)
    assert tier.found(path) == 5
    tier.ask([*path, 6])  # who says nothing takes no pin away, nor makes it longer
    assert tier.index.pinned == 5
    tier.ask(path, Regard(pin_seconds=1.0))  # nor does who pins for less long
    tier.now += 9.0
    flood(tier)
    assert tier.found(path) == 5
    tier.now += 2.0
    flood(tier)
    assert tier.found(path) == 0


def test_pins_have_a_quarter_of_a_tier_and_those_of_longest_ago_are_ordinary() -> None:
    tier = Tier(40)
    paths = [[number, 1, 2, 3] for number in range(5)]
    for path in paths:
        tier.ask(path, PINNED)
    assert tier.index.pinned == 10
    flood(tier)
    assert [tier.found(path) for path in paths] == [0, 0, 2, 4, 4]


@pytest.mark.parametrize("kinds", [1, 2])
def test_of_a_prompt_that_is_too_long_to_be_pinned_its_beginning_is(kinds: int) -> None:
    tier, path = Tier(40), list(range(20))
    if kinds == 2:
        tier.ask(path[:4])
    tier.ask(path, PINNED)
    assert tier.index.pinned == 10
    flood(tier)
    assert tier.found(path) == 10


def test_what_is_pinned_goes_where_nothing_else_may() -> None:
    tier = Tier(8)
    tier.ask([1, 2], PINNED)
    tier.ask([3, 4, 5, 6, 7, 8])
    for each in path_keys([3, 4, 5, 6, 7, 8]):
        tier.index.hold(each)
    for path in ([9], [10]):
        tier.ask(path)
        assert tier.found(path) == 1
        tier.index.hold(*path_keys(path))
    assert tier.index.pinned == 0


def test_a_pin_ends_with_a_use_of_low_priority() -> None:
    """As of a session that is over. What others have pinned behind the same beginning stays."""
    tier = Tier(80)
    for name in (5, 6):
        tier.ask([1, 2, name, 7, 8], PINNED)
    tier.ask([1, 2, 5, 7, 8, 9], LAST)
    assert tier.index.pinned == 5
    flood(tier)
    assert tier.found([1, 2, 5, 7, 8]) == 2
    assert tier.found([1, 2, 6, 7, 8]) == 5


def test_a_few_pins_do_not_hold_on_to_a_whole_tier() -> None:
    """What stands in front of a pin cannot go. Those who pin an end, and give back what is in front
    of it, hold no more than others."""
    tier = Tier(400)
    paths = [[number, *range(20)] for number in range(20)]
    for path in paths:
        tier.ask(path, PINNED)
        tier.ask(path[:-1], LAST)
    flood(tier, requests=500)
    assert sum(tier.found(path) for path in paths) <= 100


# -- priority ------------------------------------------------------------------------------------


def test_a_higher_priority_outlives_a_lower_one() -> None:
    """Seven users have as many documents each, and ask about them as often; there is room for a
    third of all."""
    chance, tier = random.Random(1), Tier(700)
    found = [0] * 7
    for number in range(21_000):
        path = [number % 7, chance.randrange(100), 1, 2]
        found[number % 7] += tier.ask(path, Regard(priority=number % 7 - 3))
    shares = [each / (3000 * 4) for each in found]
    assert all(low < high + 0.01 for low, high in pairwise(shares))
    assert shares[0] < 0.8 * shares[3]
    assert shares[6] > 2 * shares[3]


def test_priority_counts_before_anything_was_used_again() -> None:
    tier = Tier(40)
    for number in range(4):
        tier.ask([number, 1, 2, 3, 4], Regard(priority=number % 2))
    flood(tier, requests=9)
    found = [tier.found([number, 1, 2, 3, 4]) for number in range(4)]
    assert found[::2] == [0, 0]
    assert min(found[1::2]) >= 4, "all, but perhaps for the last chunk"
    flood(tier, requests=100)
    assert not any(tier.found([number, 1, 2, 3, 4]) for number in range(4))


def test_no_priority_keeps_for_ever_what_nobody_asks_for() -> None:
    tier = Tier(100)
    for number in range(20):
        tier.ask([number, 1, 2, 3, 4], Regard(priority=3))
    for number in list(range(1000, 1015)) * 40:
        tier.ask([number, 1, 2, 3, 4])
    flood(tier, requests=1000)
    assert sum(tier.found([number, 1, 2, 3, 4]) for number in range(20)) == 0


def test_what_stands_behind_a_beginning_does_not_go_with_its_priority() -> None:
    """One request of low priority that begins as all others do takes nothing of theirs along."""
    with patch("lamina_kv.tiers.eviction.SHORTEST_LESSON", NEVER):
        tier = Tier(40)
    for number in range(6):
        tier.ask([1, number, 2, 3], Regard(priority=2))
    tier.ask([1, 50], LAST)
    for number in range(30):
        tier.ask([60 + number])
    assert sum(tier.found([1, number, 2, 3]) for number in range(6)) == 24


# -- sessions ------------------------------------------------------------------------------------


def test_sessions_are_known_to_come_again() -> None:
    """Half of the requests begin a session and come again once, with a turn more; half are as long
    and do not. Only who is told can tell them apart at once."""
    assert found_of_sessions(told=True) > 1.1 * found_of_sessions(told=False)


def found_of_sessions(*, told: bool) -> int:
    chance, tier, found = random.Random(1), Tier(150), 0
    again: list[list[int]] = []
    for number in range(6000):
        if number % 2:
            tier.ask([number, 1, 2, 3, 4])
            continue
        session = Regard(session=told)
        path = [number, 1, 2, 3, 4]
        tier.ask(path, session)
        again.insert(chance.randrange(len(again) + 1), [*path, 5])
        if len(again) > 15:
            found += tier.ask(again.pop(), session)
    return found


# -- through the planner -------------------------------------------------------------------------


def test_what_is_pinned_is_so_in_every_tier_that_gets_it() -> None:
    engine = Engine(near_slots=16, far_slots=16)
    engine.save(View("a", prompt(100), regard=PINNED))
    engine.write_all()
    for seed in range(1, 9):
        engine.save(View(f"flood {seed}", prompt(100, seed=seed)))
        engine.write_all()
    for key in keys_of(prompt(100))[:3]:
        assert key in engine.near.visible
        assert engine.far.holds(key)
    engine.planner.gauges()
    gauges = engine.readings().gauges
    assert {gauges["tier_pinned_bytes", (tier,)] for tier in (NEAR, FAR)} == {3 * CHUNK_BYTES}


def test_what_comes_near_for_a_request_that_pins_is_pinned() -> None:
    engine = Engine({"load": {"when": "always"}}, near_slots=16, far_slots=100)
    engine.save(View("a", prompt(100)))
    engine.write_all()
    engine.forget_near()
    engine.save(View("b", prompt(100), regard=PINNED))
    for seed in range(1, 9):
        engine.save(View(f"flood {seed}", prompt(100, seed=seed)))
        engine.write_all()
    assert all(key in engine.near.visible for key in keys_of(prompt(100))[:3])

"""What several requests need is loaded into the engine once: the others are told to ask again, and
find it in the engine's prefix cache. Every wait has an end."""

from __future__ import annotations

import pytest
from driven_planner import CHUNK, Engine, View, blocks_of, inward, keys_of, prompt

from lamina_kv.control.offers import ASK_AGAIN, Offer
from lamina_kv.control.requests import PushParameters
from lamina_kv.control.shape import ChunkShape
from lamina_kv.control.sharing import Sharing
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.plan import LoadOrder, Outcome

DOCUMENT = prompt(6 * CHUNK)
SHARED = 6 * CHUNK


def engine(**load: object) -> Engine:
    settings = {"load": {"when": "always", "mode": "parked", "deadline": 20, **load}}
    driven = Engine(settings)
    driven.save(View("writer", [*DOCUMENT, 1]))
    return driven


def question(number: int, document: list[int] = DOCUMENT) -> View:
    return View(f"question {number}", [*document, *prompt(3, seed=100 + number)])


def ask(
    driven: Engine,
    view: View,
    floor: int = 0,
    sharing: Sharing = Sharing.PARKED,
    declined: str = "",
) -> Offer:
    return driven.planner.lookup(view, floor, sharing=sharing, declined=declined)


def load(driven: Engine, view: View, floor: int = 0) -> LoadOrder:
    """Let a request have its blocks; its load."""
    hit = ask(driven, view, floor)
    assert hit.tokens, hit
    driven.planner.admitted(view.request_id, hit.tokens)
    (order,) = driven.step().loads
    return order


def crowd(driven: Engine, count: int = 3) -> tuple[LoadOrder, list[View]]:
    """One loads, the others are told to ask again."""
    first, *others = [question(number) for number in range(count)]
    order = load(driven, first)
    assert [ask(driven, view).ask_again for view in others] == [True] * len(others)
    return order, others


def test_the_others_ask_again_until_it_is_there_and_load_nothing() -> None:
    driven = engine()
    order, others = crowd(driven, 8)
    for _ in range(5):
        driven.step()
        assert all(ask(driven, view) == ASK_AGAIN for view in others)
    driven.answer(order.transfer)
    answers = [ask(driven, view, SHARED) for view in others]
    assert [(hit.tokens, hit.ask_again) for hit in answers] == [(0, False)] * len(others)


def test_a_crowd_that_waits_costs_no_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = engine()
    _, others = crowd(driven)
    monkeypatch.setattr(driven.planner._loading, "lookup", None)
    assert all(ask(driven, view).ask_again for view in others)


def test_who_shares_the_beginning_loads_the_rest() -> None:
    driven = engine()
    longer = [*DOCUMENT, *prompt(4 * CHUNK, seed=3)]
    driven.save(View("another writer", [*longer, 1]))
    order, _ = crowd(driven)
    view = question(9, longer)
    assert ask(driven, view).ask_again
    driven.answer(order.transfer)
    assert ask(driven, view, SHARED).tokens == 4 * CHUNK


def test_nobody_waits_who_shares_nothing_or_has_it_already() -> None:
    driven, other = engine(), prompt(6 * CHUNK, seed=7)
    driven.save(View("another writer", [*other, 1]))
    crowd(driven)
    assert ask(driven, question(9, other)).tokens == SHARED
    salted = View("salted", [*DOCUMENT, 1], root_extra=b"salt")
    assert not ask(driven, salted).ask_again
    assert not ask(driven, question(10), SHARED).ask_again


def test_nobody_waits_where_the_engine_shares_nothing() -> None:
    driven = engine()
    crowd(driven)
    assert driven.planner.lookup(question(9), 0).tokens == SHARED


def test_a_request_that_may_not_hit_does_not_wait() -> None:
    driven = engine()
    crowd(driven)
    assert not ask(driven, question(9), declined="because").ask_again


def test_a_load_in_the_step_is_waited_for_where_its_blocks_are_found_when_the_step_is_over() -> (
    None
):
    driven = engine(mode="layerwise")
    order = load(driven, question(0))
    assert ask(driven, question(1)).tokens == SHARED
    assert ask(driven, question(2), sharing=Sharing.ALL).ask_again
    driven.answer(order.transfer)
    assert not ask(driven, question(2), SHARED, Sharing.ALL).ask_again


def test_nobody_who_is_short_waits_for_a_long_load() -> None:
    driven, longer = engine(), [*DOCUMENT, *prompt(60 * CHUNK, seed=3)]
    driven.save(View("another writer", [*longer, 1]))
    load(driven, question(0, longer))
    assert ask(driven, question(1)).tokens == SHARED
    assert ask(driven, question(2, longer)).ask_again


@pytest.mark.parametrize("end", ["aborted", "failed", "preempted"])
def test_if_nothing_is_left_to_share_the_next_one_loads_and_the_others_wait_for_it(
    end: str,
) -> None:
    driven = engine()
    order, (second, third, *_) = crowd(driven, 3)
    if end == "aborted":
        driven.planner.finished("question 0", 0, [()])
    elif end == "preempted":
        ask(driven, question(0), SHARED)
    else:
        driven.answer(order.transfer, outcome=Outcome.FAILED)
    again = load(driven, second)
    assert len(blocks_of(again)) == 6 * CHUNK // 16
    assert ask(driven, third).ask_again
    driven.answer(again.transfer)
    assert not ask(driven, third, SHARED).ask_again


def test_where_nothing_is_shared_in_the_end_nobody_waits_twice() -> None:
    driven = engine()
    order, (second, third) = crowd(driven, 3)
    driven.answer(order.transfer)
    assert load(driven, second)
    assert ask(driven, third).tokens == SHARED, "the engine had nothing of it"


def test_a_load_that_hangs_is_not_waited_for_longer_than_a_load_may_take() -> None:
    driven = engine(deadline=20)
    _, (second, third) = crowd(driven, 3)
    for _ in range(19):
        driven.now += 1
        driven.step()
    assert ask(driven, second).ask_again
    driven.now += 1
    driven.step()
    order = load(driven, second)
    assert order.timeout == 2.0, "it had its time, but for a try"
    assert ask(driven, third).tokens == SHARED, "and so had this one"


def test_who_has_waited_has_less_time_to_load() -> None:
    driven = engine(deadline=20)
    _, (second, _) = crowd(driven, 3)
    driven.now += 5
    driven.step()
    driven.planner.finished("question 0", 0, [()])
    assert load(driven, second).timeout == 15.0


def test_a_request_that_is_pushed_to_is_not_kept_waiting() -> None:
    driven = engine()
    crowd(driven)
    view = question(9)
    view.push = PushParameters("push", "host:1")
    assert not ask(driven, view).ask_again
    view = question(10)
    view.push = PushParameters("push", None)
    assert ask(driven, view).ask_again, "a prefill engine has crowds, too"


def test_who_joins_a_load_again_is_told_of_its_end_once() -> None:
    driven = engine()
    order, (second, _) = crowd(driven)
    (shared,) = driven.planner._shared._loads.values()
    for floor in (CHUNK, 2 * CHUNK, CHUNK):
        assert ask(driven, second, floor).ask_again
    assert len(shared.waiting) == 2
    driven.answer(order.transfer)
    hit = ask(driven, second, SHARED)
    assert (hit.tokens, hit.ask_again) == (0, False)


def test_a_waiting_request_whose_keys_change_waits_no_longer() -> None:
    driven = engine()
    _, (second, _) = crowd(driven, 3)
    driven.planner.reset()
    hit = ask(driven, second)
    assert (hit.tokens, hit.ask_again) == (0, False)


FULL, WINDOW = Group(GroupKind.FULL, 16), Group(GroupKind.WINDOW, 16, 2 * CHUNK)


def test_a_window_is_shared_at_the_end_of_the_load_only() -> None:
    settings = {"load": {"when": "always", "mode": "parked"}}
    driven = Engine(settings, shape=ChunkShape(CHUNK, (FULL, WINDOW)))
    tables = {0: list(range(40)), 1: list(range(40))}

    def view(name: str, tokens: list[int]) -> View:
        return View(name, tokens, tables=tables)

    driven.save(view("writer", [*DOCUMENT, 1]))
    assert load(driven, view("first", [*DOCUMENT, 2]))
    assert ask(driven, view("second", [*DOCUMENT, 3])).ask_again
    part = view("third", [*DOCUMENT[: 4 * CHUNK], 4])
    assert ask(driven, part).tokens == 4 * CHUNK


def test_models_of_windows_share_nothing() -> None:
    settings = {"load": {"when": "always", "mode": "parked"}}
    driven = Engine(settings, shape=ChunkShape(CHUNK, (WINDOW,)))
    tables = {0: list(range(40))}
    driven.save(View("writer", [*DOCUMENT, 1], tables=tables))
    assert load(driven, View("first", [*DOCUMENT, 2], tables=tables))
    assert ask(driven, View("second", [*DOCUMENT, 3], tables=tables)).tokens == SHARED


def test_what_is_far_comes_near_once_for_a_crowd_and_is_loaded_once() -> None:
    settings = {"load": {"when": "always", "mode": "parked"}}
    driven = Engine(settings, far_slots=100, stored=dict(enumerate(keys_of(DOCUMENT))))
    views = [question(number) for number in range(8)]
    moved = 0
    while all(ask(driven, view).ask_again for view in views):
        moved += len(inward(driven.settle_moves()))
    assert moved == 6
    order = load(driven, views[0])
    assert all(ask(driven, view).ask_again for view in views[1:])
    driven.answer(order.transfer)
    for view in views[1:]:
        assert ask(driven, view, SHARED).tokens == 0
        driven.planner.admitted(view.request_id, 0)
    assert driven.leases == 0

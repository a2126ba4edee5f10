"""What a waiting request needs comes near meanwhile: the first come first, never more than there is
room for, and nothing for those that wait no longer. Every wait has an end, and every pin, too."""

from __future__ import annotations

import pytest
from driven_planner import (
    BLOCK,
    CHUNK,
    CHUNK_BYTES,
    FAR,
    Engine,
    View,
    asks,
    drops,
    inward,
    keys_of,
    outward,
    pages_of,
    prompt,
)

from lamina_kv.control.answers import LEAST_PATIENCE
from lamina_kv.control.moving import LOOKS, LOOKS_OF_A_SEARCH
from lamina_kv.control.questions import LOOK_PLANS
from lamina_kv.control.shape import ChunkShape
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.keys import CHECKPOINT
from lamina_kv.plan import NEAR, ChunkKey, LoadMode, Move, Outcome, StepPlan, TierName, TierReport
from lamina_kv.tiers.hints import BELIEVED_SECONDS, MOST_UNANSWERED
from stores import stored_chunks

KEYED = TierName("keyed")


def engine(
    *prompts: list[int],
    near_slots: int = 12,
    far: dict[str, object] | None = None,
    **load: object,
) -> Engine:
    """An engine whose far tier has these prompts; its near tier is empty."""
    keys = [key for tokens in prompts for key in keys_of(tokens)]
    settings: dict[str, object] = {"load": {"when": "always", "deadline": 20, **load}}
    stored = dict(enumerate(dict.fromkeys(keys)))
    return Engine(settings, near_slots=near_slots, far_slots=200, far=far, stored=stored)


def arrive(driven: Engine, *moves: Move, outcome: Outcome = Outcome.DONE, **more: object) -> None:
    driven.answer(*(move.transfer for move in moves), outcome=outcome, **more)  # type: ignore[arg-type]


def asked(driven: Engine, view: View, floor: int = 0) -> bool:
    """Look a request up; whether it is told to ask again."""
    return driven.planner.lookup(view, floor).ask_again


def wait(driven: Engine, seconds: float) -> None:
    """Let time pass, not more than half a deadline at once."""
    while seconds > 0:
        driven.now += min(seconds, 5)
        seconds -= 5
        driven.step()


# -- before its turn -----------------------------------------------------------------------------


def test_what_a_request_needs_is_near_when_its_turn_comes() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens), View("waiting", tokens)
    driven.planner.arrived(view)
    moves = inward(driven.step())
    assert [move.key for move in moves] == keys_of(tokens)
    assert driven.planner.has_work
    arrive(driven, *moves)
    assert not driven.planner.has_work
    offer = driven.planner.lookup(view, 0)
    driven.planner.admitted("waiting", offer.tokens)
    (load,) = driven.step().loads
    assert [slot for slot, _, _ in pages_of(load)[::2]] == driven.slots("waiting")
    assert load.mode is LoadMode.LAYERWISE
    assert driven.count("fetch_bytes", FAR) == 4 * CHUNK_BYTES


def test_what_is_near_is_not_moved() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven = engine(tokens)
    driven.save(View("half", tokens[: 2 * CHUNK + 1]))
    driven.planner.arrived(View("waiting", tokens))
    assert len(inward(driven.step())) == 2


def test_while_near_is_full_nothing_comes_and_nothing_is_lost() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven = engine(tokens)
    slots = []
    for number in range(driven.near.capacity):  # everything is being read
        key = ChunkKey(bytes([number]) * 32)
        driven.near.room(key)
        driven.near.filled(key)
        slots.append(driven.near.hold(key))
    driven.planner.arrived(View("waiting", tokens))
    assert not inward(driven.step())
    for slot in slots:
        driven.near.release(slot)
    assert len(inward(driven.step())) == 4


def test_what_two_requests_need_is_moved_once() -> None:
    tokens = prompt(2 * CHUNK + 1)
    driven = engine(tokens)
    driven.planner.arrived(View("one", tokens))
    driven.planner.arrived(View("other", tokens))
    assert len(inward(driven.step())) == 2


def test_no_more_is_on_its_way_than_there_is_room_for() -> None:
    tokens = prompt(5 * CHUNK + 1)
    driven = engine(tokens, far={"max_inflight": 2 * CHUNK_BYTES})
    driven.planner.arrived(View("waiting", tokens))
    first = inward(driven.step())
    assert (len(first), len(inward(driven.step()))) == (2, 0)
    arrive(driven, first[0])
    assert len(inward(driven.step())) == 1


def test_a_chunk_that_is_larger_than_the_bound_goes_alone() -> None:
    tokens = prompt(3 * CHUNK + 1)
    driven = engine(tokens, far={"max_inflight": CHUNK_BYTES // 2})
    driven.planner.arrived(View("waiting", tokens))
    assert len(inward(driven.step())) == 1


def test_who_has_more_than_a_plan_looks_at_and_can_give_up_nothing_is_left_alone() -> None:
    """All of it is wanted by the request that has no room, too."""
    document, other = prompt((LOOKS + 4) * CHUNK, seed=1), prompt(60 * CHUNK + 1, seed=2)
    first, second = [*document, 1], [*document, *prompt(80 * CHUNK + 1, seed=3)]
    stored = dict(enumerate({key: None for tokens in (second, other) for key in keys_of(tokens)}))
    driven = Engine({"load": {"when": "always"}}, near_slots=640, far_slots=600, stored=stored)
    driven.planner.arrived(View("first", first))
    settle(driven)
    assert driven.planner.lookup(View("other", other), 0).ask_again
    settle(driven)
    assert driven.planner.lookup(view := View("second", second), 0).ask_again
    settle(driven)
    assert driven.planner.lookup(view, 0).ask_again, "it waits for room"
    driven.planner.finished("other", 0, [])
    settle(driven)
    assert driven.planner.lookup(view, 0).tokens == len(second) - 1


def settle(driven: Engine) -> None:
    """Let everything come near that may."""
    for _ in range(20):
        arrive(driven, *inward(driven.step()))


@pytest.mark.parametrize("end", ["admitted", "finished"])
def test_nothing_more_comes_for_one_that_waits_no_longer(end: str) -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens, far={"max_inflight": CHUNK_BYTES}), View("waiting", tokens)
    driven.planner.arrived(view)
    (move,) = inward(driven.step())
    if end == "admitted":
        driven.planner.lookup(view, 4 * CHUNK)
        driven.planner.admitted("waiting", 0)
    else:
        driven.planner.finished("waiting", 0, [()])
    arrive(driven, move)
    assert inward(driven.step()) == ()
    assert not driven.planner.has_work
    assert driven.leases == 0


def test_half_a_chunk_at_the_end_comes_whole() -> None:
    tokens = prompt(2 * CHUNK)
    driven = engine(tokens)
    view = View("waiting", tokens)  # one token is computed, so that half of a chunk is loaded
    driven.planner.arrived(view)
    assert len(inward(driven.settle_moves())) == 2
    assert driven.planner.lookup(view, 0).tokens == 2 * CHUNK - BLOCK


def test_who_arrives_twice_leaves_no_pin() -> None:
    tokens = prompt(2 * CHUNK + 1)
    driven, view = engine(tokens), View("waiting", tokens)
    driven.planner.arrived(view)
    driven.settle_moves()
    driven.planner.arrived(view)
    driven.settle_moves()
    driven.planner.finished("waiting", 0, [()])
    assert driven.leases == 0


# -- its turn ------------------------------------------------------------------------------------


def test_a_request_asks_again_until_all_of_its_hit_is_near() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens), View("a", tokens)
    assert asked(driven, view)
    assert driven.planner.has_work
    moves = inward(driven.step())
    assert [move.key for move in moves] == keys_of(tokens)
    for move in reversed(moves):
        assert asked(driven, view)
        arrive(driven, move)
    offer = driven.planner.lookup(view, 0)
    assert (offer.tokens, offer.ask_again) == (4 * CHUNK, False)
    assert driven.leases == 4, "pinned until it has its blocks"
    driven.planner.admitted("a", offer.tokens)
    (load,) = driven.step().loads
    driven.answer(load.transfer)
    assert driven.leases == 0
    assert driven.planner.hit_sources("a") == {FAR: 4 * CHUNK}


def test_what_came_for_it_before_its_turn_is_credited_to_the_tier_that_had_it() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens), View("a", tokens)
    driven.save(View("half", tokens[: CHUNK + 1]))
    driven.planner.arrived(view)
    driven.settle_moves()
    assert driven.planner.lookup(view, 0).taken == {NEAR: CHUNK, FAR: 3 * CHUNK}
    assert driven.planner.lookup(view, CHUNK).taken == {FAR: 3 * CHUNK}
    assert driven.planner.lookup(view, 0).taken == {NEAR: CHUNK, FAR: 3 * CHUNK}


def test_every_token_of_a_hit_that_came_near_has_one_source() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens), View("a", tokens)
    driven.lookup(view)
    assert asked(driven, view, 0) is False
    offer = driven.planner.lookup(view, CHUNK)
    driven.planner.admitted("a", offer.tokens)
    plan = driven.planner.plan_step([("a", 4 * CHUNK, len(tokens))], forward=True)
    driven.answer(*(load.transfer for load in plan.loads))
    driven.planner.finished("a", len(tokens), [view.blocks()])
    counters = driven.readings().counters
    assert counters["hit_tokens", ("engine",)] == CHUNK
    assert counters["hit_tokens", (FAR,)] == 3 * CHUNK
    assert counters["computed_tokens", ()] == 1


def test_who_may_not_wait_is_given_what_is_near() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens), View("a", tokens)
    driven.save(View("half", tokens[: CHUNK + 1]))
    offer = driven.planner.lookup(view, 0, may_wait=False)
    assert (offer.tokens, offer.ask_again) == (CHUNK, False)
    driven.planner.admitted("a", offer.tokens)
    assert inward(driven.step()) == ()


@pytest.mark.parametrize("lost", [True, False])
def test_what_fails_makes_the_hit_shorter(lost: bool) -> None:
    tokens = prompt(3 * CHUNK + 1)
    driven, view = engine(tokens), View("a", tokens)
    assert asked(driven, view)
    first, second, third = inward(driven.step())
    arrive(driven, first, third)
    arrive(driven, second, outcome=Outcome.FAILED, lost=lost)
    assert driven.planner.lookup(view, 0).tokens == CHUNK, "and does not wait for it again"
    driven.planner.admitted("a", CHUNK)
    assert drops(driven.step()) == ((second.far,) if lost else ())
    assert driven.count("failures", FAR, "fetch_test") == 1
    if lost:
        assert driven.lookup(View("b", tokens)).tokens == CHUNK
    else:
        assert asked(driven, View("b", tokens))


def test_a_damaged_chunk_is_forgotten_and_both_slots_come_back() -> None:
    tokens = prompt(CHUNK + 1)
    driven = engine(tokens)
    driven.planner.arrived(View("waiting", tokens))
    (move,) = inward(driven.step())
    arrive(driven, move, outcome=Outcome.FAILED, lost=True)
    assert drops(driven.step()) == (move.far,)
    assert driven.lookup(View("next", tokens)).tokens == 0
    assert driven.near.used == driven.far.used == 0


def test_what_was_computed_though_a_far_tier_has_it_is_kept_near() -> None:
    """Else a tier that is slow would keep a prompt that everybody sends from ever being near."""
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens), View("a", tokens)
    offer = driven.planner.lookup(view, CHUNK, may_wait=False)
    driven.planner.admitted("a", offer.tokens)
    plan = driven.step(("a", len(tokens)))
    assert driven.keys(plan) == keys_of(tokens)[1:], "but for what the engine had"
    driven.answer(*(save.transfer for save in plan.saves))
    assert outward(driven.step()) == ()


def test_nobody_waits_longer_than_the_offer_allows() -> None:
    tokens = prompt(3 * CHUNK + 1)
    driven, view = engine(tokens, deadline=20), View("a", tokens)
    assert asked(driven, view)
    (first, *_) = inward(driven.step())
    arrive(driven, first)
    wait(driven, 19)
    assert asked(driven, view)
    wait(driven, 1)
    offer = driven.planner.lookup(view, 0)
    assert (offer.tokens, offer.ask_again) == (CHUNK, False), "what has come is loaded"
    driven.planner.admitted("a", CHUNK)
    (load,) = driven.step().loads
    assert load.timeout == 2.0, "it had its time, but for a try"


def test_what_hangs_on_its_way_is_waited_for_once() -> None:
    tokens = prompt(3 * CHUNK + 1)
    driven = engine(tokens, deadline=20)
    assert asked(driven, View("a", tokens))
    driven.step()
    wait(driven, 21)
    view = View("b", tokens)
    assert asked(driven, view)
    driven.step()
    assert driven.planner.lookup(view, 0).tokens == 0


def test_what_no_tier_has_any_more_is_not_waited_for() -> None:
    tokens = prompt(3 * CHUNK + 1)
    driven, view = engine(tokens, far={"max_inflight": CHUNK_BYTES}), View("a", tokens)
    assert asked(driven, view)
    (first,) = inward(driven.step())
    _, second, third = keys_of(tokens)
    driven.far.lost(second, driven.far.hold(second))
    arrive(driven, first)
    (last,) = inward(driven.step())
    assert last.key == third
    arrive(driven, last)
    assert driven.planner.lookup(view, 0).tokens == CHUNK


def test_what_leaves_near_while_a_request_waits_comes_again() -> None:
    tokens = prompt(3 * CHUNK + 1)
    driven, view = engine(tokens), View("a", tokens)
    first, second, third = keys_of(tokens)
    driven.save(View("half", tokens[: CHUNK + 1]))
    assert asked(driven, view)
    driven.near.drop(first)
    assert [move.key for move in inward(driven.settle_moves())] == [first, second, third]
    assert driven.planner.lookup(view, 0).tokens == 3 * CHUNK


def test_what_came_near_for_a_request_stays_though_others_save() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens, near_slots=8), View("a", tokens)
    assert driven.lookup(view).tokens == 4 * CHUNK
    for seed in range(1, 9):
        driven.save(View(f"other {seed}", prompt(3 * CHUNK + 1, seed=seed)))
    assert driven.planner.lookup(view, 0).tokens == 4 * CHUNK


@pytest.mark.parametrize("how", ["preempted", "renamed", "reset", "declined"])
def test_pins_end_with_what_they_were_for(how: str) -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens), View("a", tokens)
    offer = driven.lookup(view)
    assert driven.leases == 4
    if how == "preempted":
        driven.planner.admitted("a", offer.tokens)
        (load,) = driven.step().loads
        driven.answer(load.transfer)
        driven.planner.lookup(view, 0)
    elif how == "renamed":
        driven.planner.lookup(View("a", tokens, root_extra=b"adapter"), 0)
    elif how == "reset":
        driven.planner.reset()
        driven.planner.lookup(view, 0)
    else:
        driven.planner.lookup(view, 0, declined="because")
        driven.planner.admitted("a", 0)
    assert driven.leases == 0


def test_nobody_waits_for_what_the_engine_has_by_now() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens), View("a", tokens)
    assert asked(driven, view)
    first, second, *rest = inward(driven.step())
    arrive(driven, *rest)
    assert asked(driven, view, CHUNK)
    assert not asked(driven, view, 2 * CHUNK), "the engine has computed what hangs"
    assert driven.planner.lookup(view, 2 * CHUNK).tokens == 2 * CHUNK
    assert not asked(driven, view, 4 * CHUNK)
    arrive(driven, first, second)
    driven.planner.admitted("a", 0)
    assert driven.leases == 0


def test_who_lacks_nothing_any_more_waits_for_nothing() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens, far={"max_inflight": CHUNK_BYTES}), View("a", tokens)
    assert asked(driven, view)
    (move,) = inward(driven.step())
    assert not asked(driven, view, 4 * CHUNK)
    arrive(driven, move)
    assert inward(driven.step()) == ()
    assert driven.leases == 0


def test_one_that_was_preempted_waits_for_far_tiers_again() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens), View("a", tokens)
    driven.planner.admitted("a", driven.lookup(view).tokens)
    (load,) = driven.step().loads
    driven.answer(load.transfer)
    driven.forget_near()
    assert asked(driven, view), "it is far again"
    assert driven.lookup(view).tokens == 4 * CHUNK


def test_one_that_waited_does_not_wait_again_for_what_comes_up_later() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens), View("a", tokens)
    assert asked(driven, view)
    moves = inward(driven.step())
    arrive(driven, *moves[:2])
    arrive(driven, *moves[2:], outcome=Outcome.FAILED)
    for _ in range(5):
        assert driven.planner.lookup(view, 0).tokens == 2 * CHUNK
        assert inward(driven.step()) == ()


def test_the_load_of_one_that_has_waited_has_less_time() -> None:
    tokens = prompt(2 * CHUNK + 1)
    driven, view = engine(tokens, deadline=20), View("a", tokens)
    assert asked(driven, view)
    moves = inward(driven.step())
    wait(driven, 5)
    arrive(driven, *moves)
    driven.planner.admitted("a", driven.planner.lookup(view, 0).tokens)
    (load,) = driven.step().loads
    assert load.timeout == 15.0


# -- room near -----------------------------------------------------------------------------------


def served(driven: Engine, view: View) -> int:
    """Chunks of a hit that a request loads; nothing is leased when it has them."""
    tokens = driven.lookup(view).tokens
    driven.planner.admitted(view.request_id, tokens)
    (load,) = driven.settle_moves().loads
    driven.answer(load.transfer)
    return tokens // CHUNK


def test_a_hit_that_fits_into_near_is_served_whole() -> None:
    tokens = prompt(11 * CHUNK + 1)
    driven = engine(tokens)
    assert served(driven, View("a", tokens)) == 11
    assert driven.leases == 0


def test_a_hit_larger_than_near_is_served_in_part() -> None:
    tokens = prompt(40 * CHUNK + 1)
    driven = engine(tokens, near_slots=32)
    assert served(driven, View("a", tokens)) == 30, "two slots are left for what is saved meanwhile"
    assert driven.leases == 0


def test_a_hit_is_served_in_part_if_others_use_the_rest_of_near() -> None:
    tokens = prompt(11 * CHUNK + 1)
    driven = engine(tokens)
    for number in range(4):
        key = ChunkKey(bytes([number]) * 32)
        driven.near.room(key)
        driven.near.filled(key)
        driven.near.hold(key)
    assert served(driven, View("a", tokens)) == 8
    assert driven.near.leased == 4


def test_a_large_hit_takes_what_came_early_for_others() -> None:
    early, large = prompt(5 * CHUNK + 1), prompt(11 * CHUNK + 1, seed=1)
    driven = engine(early, large)
    driven.planner.arrived(View("early", early))
    driven.settle_moves()
    assert driven.leases == 5
    assert served(driven, View("large", large)) == 11
    assert served(driven, View("early", early)) == 5
    assert driven.leases == 0


def test_while_others_wait_a_large_hit_waits_for_its_turn() -> None:
    """It was not the first, so that it takes nothing from the other, and is served whole then."""
    first, large = prompt(5 * CHUNK + 1), prompt(11 * CHUNK + 1, seed=1)
    driven = engine(first, large, far={"max_inflight": CHUNK_BYTES})
    views = View("first", first), View("large", large)
    for view in views:
        assert asked(driven, view)
    while asked(driven, views[0]):
        assert asked(driven, views[1])
        driven.settle_moves()
    assert served(driven, views[0]) == 5
    assert served(driven, views[1]) == 11
    assert driven.leases == 0


def test_those_who_came_last_leave_what_has_come_for_the_first() -> None:
    first, last = prompt(5 * CHUNK + 1), prompt(5 * CHUNK + 1, seed=1)
    driven = engine(first, last)
    driven.planner.arrived(View("first", first))
    driven.planner.arrived(View("last", last))
    moves = inward(driven.step())
    assert len(moves) == 6, "half of the slots"
    arrive(driven, *moves)
    assert inward(driven.step()) == ()
    driven.planner.admitted("first", driven.planner.lookup(View("first", first), 0).tokens)
    assert len(inward(driven.step())) == 4


def test_who_came_for_later_gives_way_to_whose_turn_it_is() -> None:
    early, late = prompt(5 * CHUNK + 1), prompt(5 * CHUNK + 1, seed=1)
    driven = engine(early, late)
    driven.planner.arrived(View("early", early))
    driven.settle_moves()
    assert driven.leases == 5
    assert served(driven, View("late", late)) == 5, "its turn came first"
    assert driven.lookup(View("early", early)).tokens == 5 * CHUNK


def test_several_that_need_more_than_there_is_are_served_one_after_the_other() -> None:
    prompts = [prompt(4 * CHUNK + 1, seed=seed) for seed in range(3)]
    driven = engine(*prompts, far={"max_inflight": CHUNK_BYTES})
    views = [View(f"request {n}", tokens) for n, tokens in enumerate(prompts)]
    served: list[str] = []
    for _ in range(100):
        for view in views:
            if view.request_id in served:
                continue
            offer = driven.planner.lookup(view, 0)
            if not offer.ask_again:
                assert offer.tokens == 4 * CHUNK
                driven.planner.admitted(view.request_id, offer.tokens)
                served.append(view.request_id)
        plan = driven.settle_moves()
        driven.answer(*(load.transfer for load in plan.loads))
    assert served == ["request 0", "request 1", "request 2"]
    assert driven.leases == 0


def test_two_that_each_need_all_there_is_do_not_wait_for_each_other() -> None:
    """Each has something near of two tiers, so that neither could go on."""
    first, last = prompt(6 * CHUNK + 1), prompt(6 * CHUNK + 1, seed=1)
    driven = engine(first, last, far={"max_inflight": CHUNK_BYTES})
    views = [View("first", first), View("last", last)]
    for view in views:
        driven.planner.arrived(view)
    for _ in range(40):
        assert driven.now == 0
        if not asked(driven, views[0]):
            break
        asked(driven, views[1])
        driven.settle_moves()
    assert driven.planner.lookup(views[0], 0).tokens == 6 * CHUNK


def test_what_many_need_takes_its_room_once() -> None:
    document = prompt(6 * CHUNK)
    driven = engine(document)
    views = [View(f"question {n}", [*document, n]) for n in range(20)]
    assert all(asked(driven, view) for view in views)
    driven.settle_moves()
    assert [driven.planner.lookup(view, 0).tokens for view in views] == [6 * CHUNK] * 20
    assert driven.near.leased == 6
    for view in views:
        driven.planner.finished(view.request_id, 0, [()])
    assert driven.leases == 0


def test_what_many_need_stays_until_the_last_of_them_has_it() -> None:
    document = prompt(6 * CHUNK)
    driven = engine(document)
    views = [View(f"question {n}", [*document, n]) for n in range(3)]
    assert all(asked(driven, view) for view in views)
    driven.settle_moves()
    for left in (2, 1, 0):
        driven.planner.finished(views[left].request_id, 0, [()])
        for seed in range(1, 5):
            driven.save(View(f"other {left} {seed}", prompt(3 * CHUNK + 1, seed=seed)))
        assert all(driven.planner.lookup(view, 0).tokens == 6 * CHUNK for view in views[:left])


# -- several tiers, and tiers that do not answer ---------------------------------------------------


def two_tiers(
    *stored: list[int],
    near_slots: int = 12,
    groups: tuple[Group, ...] = (Group(GroupKind.FULL, BLOCK),),
    **load: object,
) -> Engine:
    """An engine with a far tier that has these prompts, and one that finds chunks by key."""
    tiers = [
        {"kind": "disk", "name": name, "path": f"/{name}", "capacity": "1GiB"}
        for name in (FAR, KEYED)
    ]
    settings = {"tiers": tiers, "load": {"when": "always", "deadline": 20, **load}}
    keys = dict(enumerate(key for tokens in stored for key in keys_of(tokens)))
    reports = [TierReport(FAR, 100, stored_chunks(keys, keys=True)), TierReport(KEYED)]
    shape = ChunkShape(CHUNK, groups)
    return Engine(settings, near_slots=near_slots, tiers=reports, shape=shape)


def tell(driven: Engine, plan: StepPlan, *known: ChunkKey) -> None:
    for ask in asks(plan):
        driven.answer(ask.transfer, present=bytes(key in known for key in ask.keys))


def test_a_tier_that_finds_chunks_by_key_is_asked_for_all_of_a_prompt_at_once() -> None:
    tokens = prompt(5 * CHUNK + 1)
    driven, view = two_tiers(), View("a", tokens)
    assert asked(driven, view)
    plan = driven.step()
    (ask,) = asks(plan)
    assert set(ask.keys) == set(keys_of(tokens))
    tell(driven, plan, *keys_of(tokens)[:3])
    assert asked(driven, view)
    moves = inward(driven.step())
    assert [move.key for move in moves] == keys_of(tokens)[:3]
    arrive(driven, *moves)
    assert driven.planner.lookup(view, 0).tokens == 3 * CHUNK
    assert driven.planner.hit_sources("a") == {KEYED: 3 * CHUNK}


@pytest.mark.parametrize("answers", [True, False])
def test_nobody_waits_long_for_an_answer(answers: bool) -> None:
    """A busy engine's steps are long: then it waits for what one plan asks, and no longer."""
    tokens = prompt(3 * CHUNK + 1)
    driven, view = two_tiers(when="auto"), View("a", tokens)
    assert asked(driven, view)
    plan = driven.step()
    driven.now += LEAST_PATIENCE
    assert asked(driven, view), "no answer can be there yet"
    if answers:
        tell(driven, plan, *keys_of(tokens)[:1])
    driven.step()
    assert LOOK_PLANS == 2
    assert asked(driven, view) == answers


def test_an_idle_engine_waits_for_an_answer_however_fast_its_steps_are() -> None:
    driven, view = two_tiers(when="auto"), View("a", prompt(3 * CHUNK + 1))
    for _ in range(10):
        assert asked(driven, view)
        driven.step()
    driven.now += LEAST_PATIENCE
    assert not asked(driven, view)


def test_an_answer_is_waited_for_as_long_as_answers_take_if_it_is_worth_that() -> None:
    """A bucket that answers in 100 ms: nothing is found there by who waits for 20."""
    driven = two_tiers(near_slots=40, when="auto")
    first, second = (prompt(12 * CHUNK + 1, seed=seed) for seed in (1, 2))
    driven.planner.costs.computed(0, 12 * CHUNK, 2.0)
    assert asked(driven, View("a", first))
    (ask,) = asks(driven.step())
    driven.answer(ask.transfer, present=bytes(len(ask.keys)), seconds=0.1)
    assert asked(driven, View("b", second))
    (ask,) = asks(driven.step())
    driven.step()
    driven.now += 0.07
    assert asked(driven, View("b", second)), "4 % of the two seconds that computing it would take"
    driven.now += 0.02
    assert not asked(driven, View("b", second))
    driven.answer(ask.transfer, present=b"\1" * len(ask.keys), seconds=0.1)
    view = View("c", prompt(12 * CHUNK + 1, seed=3))
    assert asked(driven, view)
    for _ in range(3):
        driven.step()
    driven.now += 0.15
    assert asked(driven, view), "it had what was asked for, so that the wait is worth more"
    driven.now += 0.1
    assert not asked(driven, view), "no answer takes so long"


def test_who_loads_always_waits_until_a_tier_has_answered() -> None:
    driven, view = two_tiers(when="always"), View("a", prompt(3 * CHUNK + 1))
    assert asked(driven, view)
    plan = driven.step()
    for _ in range(10):
        driven.step()
    driven.now += 10
    assert asked(driven, view)
    tell(driven, plan)
    assert not asked(driven, view)


def test_an_engine_that_makes_no_plan_does_not_wait_for_ever() -> None:
    driven, view = two_tiers(deadline=20), View("a", prompt(3 * CHUNK + 1))
    for _ in range(2):
        assert asked(driven, view)
        driven.now += 10
    assert not asked(driven, view)


def test_a_question_that_is_not_answered_is_not_asked_again_at_once() -> None:
    driven, view = two_tiers(), View("a", prompt(3 * CHUNK + 1))
    assert asked(driven, view)
    (ask,) = asks(driven.step())
    driven.answer(ask.transfer, outcome=Outcome.FAILED)
    assert driven.planner.lookup(view, 0).tokens == 0
    assert not asked(driven, View("b", prompt(3 * CHUNK + 1)))
    assert asks(driven.step()) == ()


def test_few_questions_are_unanswered_at_a_time_and_the_others_are_asked_together() -> None:
    driven = two_tiers()
    sent = []
    for seed in range(10):
        asked(driven, View(f"request {seed}", prompt(CHUNK + 1, seed=seed)))
        sent += asks(driven.step())
    assert [len(ask.keys) for ask in sent] == [1] * MOST_UNANSWERED
    driven.answer(sent[0].transfer, present=b"\0")
    (ask,) = asks(driven.step())
    assert len(ask.keys) == 10 - MOST_UNANSWERED


def test_a_tier_that_leaves_questions_unanswered_does_not_keep_the_engine_awake() -> None:
    driven = two_tiers(deadline=20)
    for seed in range(10):
        asked(driven, View(f"request {seed}", prompt(CHUNK + 1, seed=seed)))
        driven.step()
    wait(driven, 21)
    assert not driven.planner.has_work


def test_what_a_tier_says_it_has_comes_near_before_its_request_s_turn() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven = two_tiers()
    driven.planner.arrived(View("a", tokens))
    plan = driven.step()
    assert inward(plan) == ()
    tell(driven, plan, *keys_of(tokens))
    assert [move.key for move in inward(driven.settle_moves())] == keys_of(tokens)
    assert driven.planner.lookup(View("a", tokens), 0).tokens == 4 * CHUNK


def test_one_answer_does_not_end_the_wait_for_another() -> None:
    first, last = prompt(2 * CHUNK + 1), prompt(2 * CHUNK + 1, seed=1)
    driven = two_tiers()
    driven.planner.arrived(View("first", first))
    earlier = driven.step()
    driven.planner.arrived(View("last", last))
    later = driven.step()
    tell(driven, earlier, *keys_of(first))
    assert len(inward(driven.settle_moves())) == 2
    tell(driven, later, *keys_of(last))
    assert len(inward(driven.settle_moves())) == 2


def test_what_was_promised_and_is_gone_is_not_believed_again() -> None:
    tokens = prompt(3 * CHUNK + 1)
    driven, view = two_tiers(), View("a", tokens)
    assert asked(driven, view)
    tell(driven, driven.step(), *keys_of(tokens))
    assert asked(driven, view)
    moves = inward(driven.step())
    arrive(driven, moves[0], moves[2])
    arrive(driven, moves[1], outcome=Outcome.FAILED, lost=True, reason="gone")
    assert driven.planner.lookup(view, 0).tokens == CHUNK
    driven.planner.finished("a", 0, [()])
    again = View("b", tokens)
    assert driven.lookup(again).tokens == CHUNK


def test_a_chunk_comes_from_the_first_tier_that_has_it() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = two_tiers(tokens[: 2 * CHUNK]), View("a", tokens)
    assert asked(driven, view)
    tell(driven, driven.step(), *keys_of(tokens))
    assert asked(driven, view)
    plan = driven.settle_moves()
    moved = {orders.tier: [move.key for move in orders.inward] for orders in plan.tiers}
    assert moved == {FAR: keys_of(tokens)[:2], KEYED: keys_of(tokens)[2:]}
    assert driven.planner.lookup(view, 0).taken == {FAR: 2 * CHUNK, KEYED: 2 * CHUNK}


def test_what_a_tier_said_at_the_start_of_a_wait_holds_until_its_end() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = two_tiers(), View("a", tokens)
    object.__setattr__(driven.planner._moves._lanes[KEYED].far, "bound", CHUNK_BYTES)
    assert asked(driven, view)
    tell(driven, driven.step(), *keys_of(tokens))
    driven.now = BELIEVED_SECONDS - 2
    assert asked(driven, view)
    for _ in range(4):
        plan = driven.step()
        driven.now += 1
        arrive(driven, *inward(plan))
        assert len(inward(plan)) == 1
    assert driven.planner.lookup(view, 0).tokens == 4 * CHUNK


def test_a_busy_tier_does_not_end_the_search_ahead_in_others() -> None:
    busy, other = prompt(4 * CHUNK + 1), prompt(2 * CHUNK + 1, seed=1)
    driven = two_tiers(busy, near_slots=100)
    object.__setattr__(driven.planner._moves._lanes[FAR].far, "bound", CHUNK_BYTES)
    queued = LOOKS // LOOKS_OF_A_SEARCH + 1  # more than one plan searches for
    for number in range(queued):
        driven.planner.arrived(View(f"busy {number}", busy))
    driven.planner.arrived(View("other", other))
    plans = [driven.step()]
    tell(driven, plans[0], *keys_of(busy), *keys_of(other))
    plans += [driven.step() for _ in range(3)]
    moved = {
        (orders.tier, move) for plan in plans for orders in plan.tiers for move in orders.inward
    }
    assert {move.key for tier, move in moved if tier == KEYED} == {*keys_of(other)}
    (first,) = [move for tier, move in moved if tier == FAR]
    arrive(driven, first)
    assert [move.key for move in inward(driven.step())] == keys_of(busy)[1:2], "it goes on"


def test_a_tier_that_is_busy_holds_up_no_other() -> None:
    slow, fast = prompt(4 * CHUNK + 1), prompt(2 * CHUNK + 1, seed=1)
    driven = two_tiers(slow, near_slots=100)
    lane = driven.planner._moves._lanes[FAR]
    assert lane.far.bound > 0
    object.__setattr__(lane.far, "bound", CHUNK_BYTES)
    assert asked(driven, View("slow", slow))
    assert len(inward(driven.step())) == 1
    assert asked(driven, View("fast", fast))
    tell(driven, driven.step(), *keys_of(fast))
    assert asked(driven, View("fast", fast))
    assert [orders.tier for orders in driven.settle_moves().tiers] == [KEYED]
    assert driven.planner.lookup(View("fast", fast), 0).tokens == 2 * CHUNK


@pytest.mark.parametrize("sparse", ["window", "state"])
def test_a_tier_is_asked_for_what_is_only_needed_at_the_end(sparse: str) -> None:
    kind = Group(GroupKind.STATE, CHUNK) if sparse == "state" else Group(GroupKind.WINDOW, 16, 33)
    driven, tokens = two_tiers(groups=(Group(GroupKind.FULL, 16), kind)), prompt(3 * CHUNK + 1)
    view = View("a", tokens, tables={0: list(range(7)), 1: [9] if sparse == "state" else [9] * 7})
    driven.planner.arrived(view)
    full, ends = driven.planner._requests["a"].known_keys()
    for key in full:
        driven.near.room(key)
        driven.near.filled(key)
    driven.planner._moves.forget("a")  # as if it was looked up at once
    assert asked(driven, view)
    tell(driven, driven.step(), *ends)
    assert asked(driven, view)
    assert [move.key for move in inward(driven.settle_moves())] == ends[-1:]
    offer = driven.planner.lookup(view, 0)
    driven.planner.admitted("a", offer.tokens)
    assert offer.tokens == 3 * CHUNK
    assert len(driven.step().loads[0].pages) == 2


def test_nothing_comes_near_for_a_prompt_whose_first_window_nobody_has() -> None:
    groups = Group(GroupKind.FULL, 16), Group(GroupKind.WINDOW, 16, 2 * CHUNK)
    tokens = prompt(2 * CHUNK + 1)
    view = View("a", tokens, tables={0: list(range(5)), 1: list(range(5))})
    for missing, brought in ((1, 1), (0, 0)):
        driven = two_tiers(groups=groups)
        driven.planner.arrived(View("probe", tokens, tables=view.tables))
        full, windows = driven.planner._requests["probe"].known_keys()
        driven.planner.finished("probe", 0, [[], []])
        for key in full:
            driven.near.room(key)
            driven.near.filled(key)
        driven.planner.arrived(view)
        tell(driven, driven.step(), *(key for i, key in enumerate(windows) if i != missing))
        assert len(inward(driven.step())) == brought, f"of windows, {missing} is missing"


# -- tiers that fail -----------------------------------------------------------------------------


def test_nothing_comes_from_a_tier_that_is_out_of_use() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven = engine(tokens)
    for seed in range(3):
        view = View(f"waiting {seed}", tokens)
        assert asked(driven, view)
        arrive(driven, *inward(driven.step()), outcome=Outcome.FAILED)
        assert driven.planner.lookup(view, 0).tokens == 0
    view = View("after", tokens)
    offer = driven.planner.lookup(view, 0)
    assert (offer.tokens, offer.ask_again, offer.reason) == (0, False, "tier_out_of_use")
    driven.planner.arrived(View("later", tokens))
    assert inward(driven.step()) == ()


def test_one_that_waits_when_its_tier_goes_out_of_use_waits_no_longer() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens, far={"max_inflight": CHUNK_BYTES}), View("a", tokens)
    assert asked(driven, view)
    for _ in range(3):
        arrive(driven, *inward(driven.step()), outcome=Outcome.FAILED)
    driven.step()
    assert driven.planner.lookup(view, 0).tokens == 0
    assert driven.now == 0


def priced(*prompts: list[int], far: float) -> Engine:
    """An engine with a far tier that has these prompts; four chunks of it take so many seconds, and
    a second to be computed."""
    stored = dict(enumerate(key for tokens in prompts for key in keys_of(tokens)))
    driven = Engine({"load": {"deadline": 20}}, far_slots=50, stored=stored)
    costs = driven.planner.costs
    costs.loaded(NEAR, 4 * CHUNK_BYTES, 1e-3)
    costs.loaded(FAR, 4 * CHUNK_BYTES, far)
    costs.computed(0, 4 * CHUNK, 1.0)
    return driven


def test_a_tier_is_not_slow_because_the_engine_asks_late() -> None:
    prompts = [prompt(4 * CHUNK + 1, seed=seed) for seed in range(2)]
    driven = priced(*prompts, far=0.1)
    view = View("a", prompts[0])
    assert asked(driven, view)
    moves = inward(driven.step())
    driven.now += 0.05
    arrive(driven, *moves, seconds=0.05)
    wait(driven, 5)  # a full batch: nobody asks
    driven.planner.admitted("a", driven.planner.lookup(view, 0).tokens)
    (load,) = driven.step().loads
    assert load.timeout > 0.9, "what its request waited for the engine is not taken from it"
    driven.answer(load.transfer)
    took = driven.planner.costs.load_seconds(FAR, 4 * CHUNK_BYTES)
    assert took is not None
    assert 0.05 <= took < 0.1
    assert asked(driven, View("b", prompts[1]))


def test_what_hangs_on_its_way_can_be_saved() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven, view = engine(tokens, near_slots=50), View("a", tokens)
    assert asked(driven, view)
    moves = inward(driven.step())
    wait(driven, 25)
    driven.planner.admitted("a", driven.planner.lookup(view, 0).tokens)
    plan = driven.step(("a", len(tokens)))
    assert driven.keys(plan) == keys_of(tokens)
    driven.answer(*(save.transfer for save in plan.saves))
    assert driven.planner.lookup(View("b", tokens), 0).tokens == 4 * CHUNK
    arrive(driven, *moves)
    assert driven.planner.lookup(View("c", tokens), 0).tokens == 4 * CHUNK
    driven.planner.finished("a", len(tokens), [view.blocks()])
    assert (driven.near.used, driven.leases) == (4, 0), "what was late is not shown"


def test_a_tier_is_tried_with_one_chunk_and_then_in_use_again() -> None:
    tokens = prompt(4 * CHUNK + 1)
    driven = engine(tokens)
    for seed in range(3):
        assert asked(driven, View(f"waiting {seed}", tokens))
        arrive(driven, *inward(driven.step()), outcome=Outcome.FAILED)
        driven.planner.finished(f"waiting {seed}", 0, [()])
    driven.now += 60
    view = View("tries", tokens)
    assert asked(driven, view)
    (move,) = inward(driven.step())
    arrive(driven, move)
    assert driven.planner.lookup(view, 0).tokens == CHUNK
    assert driven.lookup(View("next", tokens)).tokens == 4 * CHUNK


def test_a_move_that_hangs_gives_its_slots_back_when_it_ends() -> None:
    tokens = prompt(2 * CHUNK + 1)
    driven, view = engine(tokens), View("a", tokens)
    assert asked(driven, view)
    moves = inward(driven.step())
    driven.planner.finished("a", 0, [()])
    wait(driven, 21)
    assert not driven.planner.has_work
    assert driven.near.used == 2, "something may still be written there"
    arrive(driven, *moves, outcome=Outcome.FAILED)
    assert driven.near.used == driven.leases == 0


def test_what_was_saved_reaches_every_tier_that_lacks_it() -> None:
    tokens = prompt(2 * CHUNK + 1)
    driven = two_tiers()
    driven.save(View("writer", tokens))
    plan = driven.step()
    written = {orders.tier: [move.key for move in orders.outward] for orders in plan.tiers}
    assert written == {FAR: keys_of(tokens), KEYED: keys_of(tokens)}
    assert driven.near.leased == 2
    arrive(driven, *outward(plan))
    assert driven.leases == 0
    assert driven.far.used == 2


def test_writes_and_reads_do_not_share_a_bound() -> None:
    tokens = prompt(2 * CHUNK + 1)
    driven = engine(tokens, far={"max_inflight": CHUNK_BYTES})
    driven.save(View("writer", prompt(2 * CHUNK + 1, seed=1)))
    driven.planner.arrived(View("a", tokens))
    plan = driven.step()
    assert (len(outward(plan)), len(inward(plan))) == (1, 1)


def test_what_comes_near_after_a_reset_is_not_found_before_the_weights_are_back() -> None:
    tokens = prompt(CHUNK + 1)
    driven = engine(tokens)
    driven.planner.arrived(View("waiting", tokens))
    moves = inward(driven.step())
    driven.planner.reset()
    arrive(driven, *moves)
    assert driven.planner.lookup(View("next", tokens), 0).tokens == 0
    driven.planner.begin(CHECKPOINT)
    assert driven.planner.lookup(View("last", tokens), 0).tokens == CHUNK


def test_a_plan_looks_at_no_more_than_it_may() -> None:
    tokens = prompt(300 * CHUNK + 1)
    driven, view = engine(near_slots=1000), View("a", tokens)
    for key in keys_of(tokens)[:-1]:
        driven.near.room(key)
        driven.near.filled(key)
    driven.far.room(keys_of(tokens)[-1])
    driven.far.filled(keys_of(tokens)[-1])
    assert asked(driven, view)
    driven.step()
    assert driven.near.leased == LOOKS
    driven.settle_moves()
    assert driven.planner.lookup(view, 0).tokens == 300 * CHUNK

"""What a planner keeps of prompts when a tier is full."""

from __future__ import annotations

import random

import pytest
from driven_planner import (
    CHUNK,
    CHUNK_BYTES,
    FAR,
    Engine,
    View,
    inward,
    keys_of,
    outward,
    prompt,
)

from lamina_kv.control.lanes import MOST_CONSIDERED
from lamina_kv.control.saving import Unsaved
from lamina_kv.plan import NEAR, TierName, TierReport, TransferId
from lamina_kv.tiers.slots import SlotIndex
from stores import stored_chunks


def found(engine: Engine, tokens: list[int]) -> int:
    """Chunks of a prompt that a request would find, and that no chunk is missing in front of."""
    keys = keys_of(tokens)
    return next((n for n, key in enumerate(keys) if key not in engine.near.visible), len(keys))


def test_a_prompt_that_is_one_chunk_too_long_is_found_again_but_for_its_end() -> None:
    engine, tokens = Engine(near_slots=100), prompt(101 * CHUNK + 1)
    engine.save(View("first", tokens))
    assert engine.lookup(View("second", tokens)).tokens == 100 * CHUNK
    engine.save(View("third", tokens))
    assert engine.lookup(View("fourth", tokens)).tokens == 100 * CHUNK


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 4, 16])
def test_a_prompt_that_is_much_too_long_keeps_its_beginning(step: int, late: int) -> None:
    """A prompt of 150 chunks in 100 slots, so many a step, whose receipts come so many steps
    late."""
    engine, tokens = Engine(near_slots=100), prompt(150 * CHUNK + 1)
    view = View("a", tokens)
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    under_way: list[list[TransferId]] = []
    for end in range(step, 150 + step, step):
        plan = engine.step(("a", min(end, 150) * CHUNK))
        under_way.append([order.transfer for order in plan.saves])
        if len(under_way) > late:
            engine.answer(*under_way.pop(0))
    for transfers in under_way:
        engine.answer(*transfers)
    engine.planner.finished("a", 150 * CHUNK, [view.blocks()])
    engine.answer(*(order.transfer for order in engine.step().saves))
    assert found(engine, tokens) >= 98


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 3, 8, 40])
def test_requests_at_once_that_do_not_quite_fit_lose_their_ends(step: int, late: int) -> None:
    """Sixteen of 40 chunks in 600 slots, whose prompts are computed so many chunks a step, and
    whose receipts come so many steps late."""
    engine = Engine(near_slots=600)
    views = [View(f"request {n}", prompt(40 * CHUNK + 1, seed=10 * n + 1)) for n in range(16)]
    for view in views:
        engine.planner.lookup(view, 0)
        engine.planner.admitted(view.request_id, 0)
    under_way: list[list[TransferId]] = []
    for end in range(step, 40 + step, step):
        computed = min(end, 40) * CHUNK
        plan = engine.step(*((view.request_id, computed) for view in views))
        under_way.append([order.transfer for order in plan.saves])
        if len(under_way) > late:
            engine.answer(*under_way.pop(0))
    for view in views:
        engine.planner.finished(view.request_id, 40 * CHUNK, [view.blocks()])
    for transfers in under_way:
        engine.answer(*transfers)
    engine.answer(*(order.transfer for order in engine.step().saves))
    assert sum(found(engine, view.token_ids) for view in views) >= 590
    assert engine.near.used == 600


def test_a_chunk_whose_predecessor_is_not_kept_is_not_saved() -> None:
    engine, tokens = Engine(near_slots=10), prompt(4 * CHUNK)
    engine.planner.lookup(View("a", tokens), 0)
    engine.planner.admitted("a", 0)
    plan = engine.step(("a", 2 * CHUNK))
    engine.answer(*(order.transfer for order in plan.saves))
    gone = keys_of(tokens)[1]
    engine.near.drop(gone)
    assert not engine.step(("a", 3 * CHUNK)).saves
    assert not engine.step(("a", 3 * CHUNK)).saves
    assert engine.count("saves_held_back", Unsaved.NO_PREFIX) == 1
    engine.save(View("b", tokens[: 2 * CHUNK]))
    assert len(engine.step(("a", 4 * CHUNK)).saves) == 2, "it is kept by now"


@pytest.mark.parametrize("leased", [False, True])
def test_a_chunk_for_which_nothing_may_go_yet_is_saved_once_something_may(leased: bool) -> None:
    """All that stands in host memory stands in front of a chunk that is still being saved, or
    loaded."""
    engine = Engine(near_slots=2)
    for name, seed in (("a", 1), ("b", 2)):
        engine.planner.lookup(View(name, prompt(4 * CHUNK, seed)), 0)
        engine.planner.admitted(name, 0)
    engine.answer(*(order.transfer for order in engine.step(("a", CHUNK)).saves))
    (last,) = engine.step(("a", 2 * CHUNK)).saves
    if leased:
        engine.answer(last.transfer)
        engine.near.lease(last.slot)
    assert not engine.step(("b", CHUNK)).saves
    if leased:
        engine.near.release(last.slot)
    else:
        engine.answer(last.transfer)
    assert len(engine.step(("b", CHUNK)).saves) == 1
    assert engine.count("saves_held_back", Unsaved.IN_USE) == 1


def test_what_a_store_of_others_may_have_is_a_predecessor() -> None:
    keyed = TierName("keyed")
    settings = {"tiers": [{"kind": "disk", "name": keyed, "path": "/k", "capacity": "1GiB"}]}
    engine, tokens = Engine(settings, near_slots=10, tiers=[TierReport(keyed)]), prompt(4 * CHUNK)
    engine.planner.lookup(View("a", tokens), 0, may_wait=False)
    engine.planner.admitted("a", 0)
    plan = engine.step(("a", 2 * CHUNK))
    engine.answer(*(order.transfer for order in plan.saves))
    engine.write_all()
    engine.wait(100)  # nobody knows by now whether it is still there
    engine.near.drop(keys_of(tokens)[1])
    assert len(engine.step(("a", 3 * CHUNK)).saves) == 1


def crowd(engine: Engine, requests: int) -> None:
    """Requests of one chunk each that share nothing."""
    for number in range(requests):
        engine.save(View(f"crowd {number}", prompt(40, seed=100 + number)))
        engine.write_all()


def test_the_beginning_of_a_prompt_outlives_its_end_in_every_tier() -> None:
    engine, tokens = Engine({"load": {"when": "always"}}, near_slots=6, far_slots=6), prompt(130)
    engine.save(View("a", tokens))
    engine.write_all()
    crowd(engine, 4)
    for index in engine.near, engine.far:
        assert isinstance(index, SlotIndex)
        kept = [key in index.visible for key in keys_of(tokens)]
        assert kept == sorted(kept, reverse=True)
        assert 0 < sum(kept) < 4


def test_what_comes_near_keeps_what_is_known_of_it_far() -> None:
    engine, tokens = Engine({"load": {"when": "always"}}, near_slots=20, far_slots=100), prompt(97)
    for number in range(3):
        engine.save(View(f"request {number}", tokens))
        engine.write_all()
    uses = engine.far.uses(keys_of(tokens)[0])
    engine.forget_near()
    engine.planner.arrived(View("again", tokens))
    assert len(inward(engine.settle_moves())) == 3
    assert uses > 1
    assert engine.near.uses(keys_of(tokens)[0]) > uses - 1
    assert {NEAR, FAR} >= engine.lookup(View("again", tokens)).taken.keys()


def test_a_request_that_comes_back_is_not_another_use() -> None:
    """After a preemption it finds what it had computed itself."""
    engine, view = Engine(near_slots=6), View("a", prompt(100))
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    plan = engine.step(("a", 100))
    engine.answer(*(order.transfer for order in plan.saves))
    engine.save(view)  # its blocks were taken away
    assert engine.near.uses(keys_of(view.token_ids)[0]) == 1
    engine.save(View("b", view.token_ids))
    assert engine.near.uses(keys_of(view.token_ids)[0]) == 2


def test_a_request_whose_adapter_changes_while_it_waits_uses_other_chunks() -> None:
    engine = Engine(far_slots=20)
    for adapter in (b"old", b"new"):
        engine.save(View(f"first {adapter!r}", prompt(100), root_extra=adapter))
        engine.planner.arrived(View("a", prompt(100), root_extra=adapter))
        offer = engine.lookup(View("a", prompt(100), root_extra=adapter))
    engine.planner.admitted("a", offer.tokens)
    (key, *_), *_ = engine.planner._requests["a"].known_keys()
    assert engine.near.uses(key) == 2


@pytest.mark.parametrize("turns", [2, 3, 5])
def test_conversations_that_fit_are_found_again_whole(turns: int) -> None:
    """Twenty in turn, each of which is followed by another one when it is over; the tier holds all
    that are alive, and half as much again."""
    live, per_turn = 20, 2
    engine = Engine(near_slots=live * turns * per_turn * 3 // 2)
    lost = 0
    for number in range(6 * live * turns):
        seat, turn = number % live, number // live % turns
        whose = 1000 + seat * 100 + number // (live * turns)
        tokens = prompt(turns * per_turn * CHUNK + 1, seed=whose)
        view = View(f"{whose} {turn}", tokens[: (turn + 1) * per_turn * CHUNK + 1])
        offer = engine.planner.lookup(view, 0).tokens
        lost += turn * per_turn * CHUNK - offer
        engine.save(view)
    assert lost == 0


def test_documents_outlive_questions_and_prompts_that_nobody_repeats() -> None:
    """The mixed load of ``bench/peers``, six schedules: 24 questions about eight documents of eight
    chunks, and six prompts that share nothing, in room for thirteen documents. Before each the
    documents are computed once more, as far as they were lost. The least recently used chunk is one
    of a document that nobody has asked about for a while."""
    engine, chance = Engine({"load": {"when": "always"}}, near_slots=105), random.Random(100)
    documents = [prompt(8 * CHUNK, seed=number) for number in range(8)]
    lost, asks = 0, [True] * 24 + [False] * 6
    for schedule in range(6):
        for number, document in enumerate(documents):
            engine.save(View(f"{schedule}, document {number}", [*document, 1]))
        chance.shuffle(asks)
        for number, ask in enumerate(asks, 100 * schedule + 100):
            begin = chance.choice(documents) if ask else prompt(8 * CHUNK, seed=number)
            view = View(f"request {number}", begin + prompt(CHUNK, seed=1000 + number))
            found = engine.lookup(view).tokens // CHUNK
            lost += ask and schedule > 0 and 8 - found
            engine.save(view)
    assert lost < 8, "less than one document"


def far_chunks(engine: Engine, tokens: list[int]) -> int:
    """Chunks of a prompt that a new process would find."""
    keys = keys_of(tokens)
    return next((n for n, key in enumerate(keys) if not engine.far.holds(key)), len(keys))


def test_what_is_still_to_be_written_is_given_up_last_and_counted() -> None:
    """Ten prompts of 40 chunks go through 100 slots, and a disk that takes half of what is saved.
    What it takes is of use, and what it does not is counted."""
    engine = Engine(near_slots=100, far_slots=1000, far={"max_inflight": 2 * CHUNK_BYTES})
    prompts = [prompt(40 * CHUNK + 1, seed=10 * n + 1) for n in range(10)]
    for number, tokens in enumerate(prompts):
        view = View(f"request {number}", tokens)
        engine.planner.lookup(view, 0)
        engine.planner.admitted(view.request_id, 0)
        for end in range(4, 44, 4):
            plan = engine.step((view.request_id, end * CHUNK))
            engine.answer(*(each.transfer for each in (*plan.saves, *outward(plan))))
        engine.planner.finished(view.request_id, 40 * CHUNK, [view.blocks()])
    engine.write_all()
    assert isinstance(engine.far, SlotIndex)
    counters = engine.readings().counters
    written = len(engine.far.visible)
    skipped = sum(n for (name, _), n in counters.items() if name == "writes_skipped")
    assert written + skipped == 400
    assert written >= 240
    assert sum(far_chunks(engine, tokens) for tokens in prompts) == written, "all is of use"


def test_near_gives_up_what_is_written_before_what_is_not() -> None:
    engine = Engine(near_slots=4, far_slots=100, far={"max_inflight": CHUNK_BYTES})
    for number in range(2):
        engine.save(View(f"old {number}", prompt(40, seed=number + 1)))
    old = set(engine.near.visible)
    engine.step()  # of one is known that it is not written yet
    (waiting,) = next(iter(engine.planner._moves._lanes.values()))._backlog
    engine.answer(*[t.id for t in engine.planner._books.transfers.live()])
    for number in range(2, 5):
        engine.save(View(f"new {number}", prompt(40, seed=number + 1)))
    assert old & engine.near.visible.keys() == {waiting}


def test_a_chunk_that_is_saved_again_is_spared_for_every_tier_that_lacks_it() -> None:
    tiers = [
        TierReport(TierName(name), 100, stored_chunks({}, keys=True)) for name in ("one", "two")
    ]
    settings = [
        {"kind": "disk", "name": tier.name, "path": "/", "capacity": "1GiB", "max_inflight": 1}
        for tier in tiers
    ]
    engine = Engine({"tiers": settings}, tiers=tiers)
    engine.save(View("before", prompt(40, seed=1)))
    assert len(outward(engine.step())) == 2, "both tiers have enough to do"
    (key,) = keys_of(prompt(40))
    for number in range(2):
        engine.near.drop(key)
        engine.save(View(f"request {number}", prompt(40)))
    assert engine.near._spared == {engine.near.slot(key): 2}


def test_what_near_has_lost_waits_for_nothing_and_is_counted() -> None:
    engine = Engine(near_slots=20, far_slots=100)
    engine.save(View("a", prompt(10 * CHUNK)))
    engine.forget_near()
    assert engine.count("writes_skipped", FAR, "evicted") == 10
    assert not outward(engine.step())
    assert not engine.planner.has_work


def test_what_waits_while_the_tier_is_out_of_use_goes_by_its_worth_and_not_by_its_age() -> None:
    """A prompt that many use is saved before a tier fails; then a crowd goes through near."""
    settings: dict[str, object] = {"breaker": {"failures": 1, "pause": 100}}
    engine = Engine(settings, near_slots=12, far_slots=100)
    engine.planner._books.breakers.fills(FAR).judge(good=False)
    shared = prompt(4 * CHUNK + 1)
    for number in range(20):
        engine.save(View(f"request {number}", shared))
        engine.save(View(f"crowd {number}", prompt(2 * CHUNK + 1, seed=100 + number)))
    engine.wait(101)
    engine.write_all()
    assert all(engine.far.holds(key) for key in keys_of(shared))
    written = [key for key in engine.near.visible if engine.far.holds(key)]
    assert len(written) == len(engine.near.visible), "and so is all else that near has kept"


def test_a_plan_looks_at_some_of_what_waits_to_be_written_and_later_ones_at_the_rest() -> None:
    chunks = MOST_CONSIDERED + 10
    engine = Engine(near_slots=chunks, far_slots=300)
    engine.save(View("a", prompt(chunks * CHUNK)))
    assert [len(outward(engine.step())) for _ in range(3)] == [MOST_CONSIDERED, 10, 0]

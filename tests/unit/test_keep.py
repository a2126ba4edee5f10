"""What a tier is given: everything, only what a second request uses, or nothing."""

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
    inward,
    keys_of,
    outward,
    prompt,
)

from lamina_kv.control.second_uses import LOOKS
from lamina_kv.engines.hand_off import HandOff
from lamina_kv.plan import ChunkKey, Outcome, TierName, TierReport
from lamina_kv.tiers.hints import BELIEVED_SECONDS
from lamina_kv.tiers.regard import Regard
from lamina_kv.tiers.reuse import Worth
from stores import stored_chunks


def keeping(keep: str, **more: object) -> Engine:
    """An engine whose far tier keeps so much, and is always read."""
    settings: dict[str, object] = {"load": {"when": "always"}}
    return Engine(settings, far_slots=600, far={"keep": keep}, **more)  # type: ignore[arg-type]


def written(engine: Engine) -> list[ChunkKey]:
    """Chunks that reach the far tier now, in that order."""
    keys: list[ChunkKey] = []
    for _ in range(100):
        moves = outward(engine.step())
        keys += [move.key for move in moves]
        engine.answer(*(move.transfer for move in moves))
    return keys


def begin(engine: Engine, view: View, floor: int = 0) -> None:
    """A request gets its blocks."""
    offer = engine.lookup(view, floor)
    engine.planner.admitted(view.request_id, offer.tokens)


def serve(engine: Engine, view: View) -> list[ChunkKey]:
    """A request is served, and everything goes well; returns what reaches the far tier."""
    begin(engine, view)
    plan = engine.step((view.request_id, view.num_tokens))
    moves = outward(plan)
    engine.answer(*(each.transfer for each in (*plan.loads, *plan.saves, *moves)))
    engine.planner.finished(view.request_id, view.num_tokens, [view.blocks()])
    return [move.key for move in moves] + written(engine)


def run(engine: Engine, *progress: tuple[str, int]) -> None:
    """A step whose loads and saves go well."""
    plan = engine.step(*progress)
    engine.answer(*(order.transfer for order in (*plan.loads, *plan.saves)))


TOKENS = prompt(4 * CHUNK + 1)


def test_everything_goes_to_a_tier_that_keeps_all() -> None:
    engine = keeping("all")
    engine.save(View("a", TOKENS))
    assert written(engine) == keys_of(TOKENS)


def test_what_one_request_has_used_goes_to_no_tier_that_keeps_what_is_shared() -> None:
    engine = keeping("shared")
    engine.save(View("a", TOKENS))
    assert written(engine) == []
    assert not engine.planner.has_work


def test_what_a_second_request_finds_goes_there_from_its_beginning() -> None:
    engine, longer = keeping("shared"), TOKENS[: 3 * CHUNK] + prompt(2 * CHUNK, seed=1)
    engine.save(View("a", TOKENS))
    found = serve(engine, View("b", longer))
    assert found == keys_of(TOKENS)[:3], "neither has the other's end"
    found = serve(engine, View("c", longer + prompt(CHUNK, seed=2)))
    assert found == keys_of(longer)[3:], "a later turn, and not its own end"


def test_what_a_second_request_finds_in_the_engine_goes_there() -> None:
    engine = keeping("shared")
    engine.save(View("a", TOKENS))
    begin(engine, View("b", TOKENS), floor=2 * CHUNK + CHUNK // 2)
    assert written(engine) == keys_of(TOKENS), "a part in the engine, the rest from host memory"
    engine = keeping("shared", loads=False)
    engine.save(View("a", TOKENS))
    begin(engine, View("b", TOKENS), floor=2 * CHUNK + CHUNK // 2)
    assert written(engine) == keys_of(TOKENS)[:2]


@pytest.mark.parametrize("late", [False, True])
def test_what_two_requests_compute_at_the_same_time_goes_there(late: bool) -> None:
    """The second one comes while the first one's saves are on their way, or when they are there."""
    engine, views = keeping("shared"), [View("a", TOKENS), View("b", TOKENS, first_block=50)]
    for view in views:
        begin(engine, view)
    plan = engine.step(*([("a", 4 * CHUNK)] if late else [("a", 4 * CHUNK), ("b", 4 * CHUNK)]))
    assert len(plan.saves) == 4, "each chunk is saved once"
    assert outward(engine.step()) == ()
    engine.answer(*(order.transfer for order in plan.saves))
    if late:
        assert written(engine) == []
        assert not engine.step(("b", 4 * CHUNK)).saves
    assert written(engine) == keys_of(TOKENS)


def test_what_is_computed_again_after_near_gave_it_up_goes_there() -> None:
    engine = keeping("shared", near_slots=4)
    engine.save(View("a", TOKENS))
    engine.save(View("b", prompt(4 * CHUNK + 1, seed=1)))
    assert written(engine) == []
    engine.save(View("c", TOKENS + prompt(CHUNK, seed=2)))
    assert written(engine) == keys_of(TOKENS)[:4]


def test_what_a_request_shares_goes_there_at_once() -> None:
    engine = keeping("shared")
    engine.save(View("a", TOKENS, regard=Regard(share=True)))
    assert written(engine) == keys_of(TOKENS)


def test_what_a_request_computes_up_to_a_boundary_it_has_not_found() -> None:
    """The engine had the first chunk and a part of the second one, and nothing was to be loaded
    behind that."""
    engine, floor = keeping("shared", leases_loads=True), CHUNK + BLOCK
    hand_off = HandOff(engine.planner, boundary=CHUNK, limit=8)
    saves = []
    for view, start in ((View("a", TOKENS[:floor]), 0), (View("b", TOKENS, first_block=50), floor)):
        assert hand_off.admit(view, start).start == start
        plan = hand_off.plan([(view.request_id, start, view.num_tokens)], forward=True)
        saves += [save.transfer for save in plan.saves]
    assert len(saves) == len(TOKENS) // CHUNK
    engine.answer(*saves)
    assert written(engine) == keys_of(TOKENS)[:1]


def test_a_request_that_is_not_worth_keeping_is_no_second_use() -> None:
    engine = keeping("shared")
    engine.save(View("a", TOKENS))
    engine.save(View("b", TOKENS, regard=Regard(keep=False)))
    assert written(engine) == []


def test_what_a_request_saves_when_it_ends_is_used_once() -> None:
    engine, view = keeping("shared"), View("a", TOKENS)
    begin(engine, view)
    run(engine, ("a", 2 * CHUNK))
    engine.planner.finished("a", 4 * CHUNK, [view.blocks()])
    run(engine)
    assert [engine.near.uses(key) for key in keys_of(TOKENS)] == [1] * 4
    assert written(engine) == []


@pytest.mark.parametrize("how", ["preempted", "distrusted"])
def test_a_request_shares_nothing_with_itself(how: str) -> None:
    engine, view = keeping("shared"), View("a", TOKENS)
    begin(engine, view)
    run(engine, ("a", 2 * CHUNK))
    engine.spoil(view, how)
    if how == "preempted":
        begin(engine, view)
    run(engine, ("a", 4 * CHUNK))
    run(engine, ("a", 4 * CHUNK))
    assert written(engine) == []
    begin(engine, View("b", TOKENS))
    assert written(engine) == keys_of(TOKENS)


def test_what_a_second_request_uses_while_it_is_not_near_goes_nowhere() -> None:
    engine = keeping("shared")
    engine.save(View("a", TOKENS))
    engine.near.drop(keys_of(TOKENS)[-1])
    assert serve(engine, View("b", TOKENS[: 2 * CHUNK + 1])) == keys_of(TOKENS)[:2]


def test_what_the_engine_has_and_others_use_teaches_a_shared_tier_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two prompts take turns in a tier for one, and the engine has both of them all the time."""
    learnt = []
    monkeypatch.setattr(Worth, "used", lambda _, kind, age, chunks: learnt.append(chunks))
    engine = Engine({"load": {"when": "always"}}, far_slots=4, far={"keep": "shared"})
    prompts = TOKENS, prompt(4 * CHUNK + 1, seed=1)
    for seed, tokens in enumerate(prompts):
        engine.save(View(f"first {seed}", tokens))
    came = []
    for turn in range(6):
        begin(engine, View(f"{turn}", prompts[turn % 2]), floor=4 * CHUNK)
        came += written(engine)
        engine.planner.finished(f"{turn}", 4 * CHUNK, [()])
    assert len(came) > 8, "some came back"
    assert learnt == []


def test_a_tier_that_keeps_nothing_is_read() -> None:
    stored = dict(enumerate(keys_of(TOKENS)))
    engine = keeping("nothing", stored=stored)
    begin(engine, View("a", TOKENS))
    engine.planner.finished("a", 4 * CHUNK, [()])
    for number in range(2):
        engine.save(View(f"other {number}", prompt(4 * CHUNK, seed=1)))
    assert written(engine) == []
    engine.forget_near()
    engine.planner.arrived(View("b", TOKENS))
    assert [move.key for move in inward(engine.settle_moves())] == keys_of(TOKENS)


def test_what_comes_from_one_tier_goes_to_another_that_keeps_what_is_shared() -> None:
    names = [TierName("disk"), TierName("shared")]
    stored = stored_chunks(dict(enumerate(keys_of(TOKENS))), keys=True)
    tiers = [
        TierReport(names[0], 100, stored),
        TierReport(names[1], 100, stored_chunks({}, keys=True)),
    ]
    entries = [
        {"kind": "disk", "name": name, "path": "/", "capacity": "1GiB", "keep": keep}
        for name, keep in zip(names, ("all", "shared"), strict=True)
    ]
    engine = Engine({"tiers": entries, "load": {"when": "always"}}, tiers=tiers)
    assert serve(engine, View("a", TOKENS)) == keys_of(TOKENS)


def test_a_plan_offers_some_of_what_is_shared_and_later_ones_the_rest() -> None:
    engine, tokens = keeping("shared", near_slots=600), prompt((LOOKS + 10) * CHUNK + 1)
    engine.save(View("a", tokens))
    begin(engine, View("b", tokens))
    assert [len(outward(engine.step())) for _ in range(3)] == [LOOKS, 10, 0]


def test_what_failed_to_be_written_is_tried_once_more() -> None:
    engine = Engine(far_slots=20, far={"keep": "shared", "max_inflight": 2 * CHUNK_BYTES})
    engine.save(View("a", TOKENS))
    begin(engine, View("b", TOKENS))
    moves = outward(engine.step())
    engine.answer(*(move.transfer for move in moves), outcome=Outcome.FAILED)
    assert written(engine) == keys_of(TOKENS)
    assert engine.count("writes_skipped", FAR, "evicted") == 0


def test_a_store_that_was_emptied_gets_back_what_is_near_and_used() -> None:
    entry = {"kind": "disk", "name": "keyed", "path": "/", "capacity": "1GiB"}
    report = TierReport(TierName("keyed"))
    engine = Engine({"tiers": [entry], "load": {"when": "always"}}, tiers=[report])
    held: set[ChunkKey] = set()

    def settle(*progress: tuple[str, int]) -> None:
        for _ in range(9):
            plan = engine.step(*progress)
            for ask in asks(plan):
                engine.answer(ask.transfer, present=bytes(key in held for key in ask.keys))
            held.update(move.key for move in outward(plan))
            orders = (*plan.loads, *plan.saves, *outward(plan))
            engine.answer(*(order.transfer for order in orders))
            progress = ()
        assert not engine.planner.has_work

    engine.save(View("a", TOKENS))
    settle()
    assert held == {*keys_of(TOKENS)}
    held.clear()
    engine.now += 2 * BELIEVED_SECONDS
    begin(engine, View("b", TOKENS))
    settle(("b", len(TOKENS)))
    assert held == {*keys_of(TOKENS)}


def test_an_idle_engine_offers_what_was_computed_twice() -> None:
    engine = keeping("shared", loads=False)
    for name in ("a", "b"):
        begin(engine, View(name, TOKENS))
    plan = engine.step(("a", len(TOKENS)), ("b", len(TOKENS)))
    for name in ("a", "b"):
        engine.planner.finished(name, len(TOKENS), [View(name, TOKENS).blocks()])
    engine.answer(*(save.transfer for save in plan.saves))
    assert engine.planner.has_work
    assert written(engine) == keys_of(TOKENS)
    assert not engine.planner.has_work

"""A plan costs the same however many requests wait, are held back or have ended. What is counted
is work: chunks that are looked at, block tables that are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from driven_planner import (
    BLOCK,
    CHUNK,
    CHUNK_BYTES,
    Engine,
    View,
    inward,
    keys_of,
    prompt,
)

from lamina_kv.control.hits import HitFinder
from lamina_kv.control.loading import LOOKED, LOOKED_OF_AN_END
from lamina_kv.control.moving import MovePlanner
from lamina_kv.control.push.inbound import Inbound
from lamina_kv.control.push.target import PushTarget
from lamina_kv.control.requests import PushParameters, RequestRecord
from lamina_kv.control.saving import Unsaved
from lamina_kv.control.shape import ChunkShape
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.plan import ChunkKey
from lamina_kv.push.cards import EngineCard, RankCard, RowCard, SenderCard
from lamina_kv.push.letters import Letter, Opened
from lamina_kv.push.messages import NO_EPOCH, Absent, Announce, Attempt, Fenced
from lamina_kv.tiers.eviction import Runs
from lamina_kv.tiers.slots import SlotIndex

BOUND = 1000
"""Chunks that may be looked at for one plan."""

Counts = Counter[str]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Counts looks at chunks, by what is asked."""
    counts = Counts()

    def counted(kind: type[Any], name: str) -> None:
        plain: Callable[..., object] = getattr(kind, name)

        def call(*arguments: object, **others: object) -> object:
            counts[name] += 1
            return plain(*arguments, **others)

        monkeypatch.setattr(kind, name, call)

    for name in ("find", "holds"):
        counted(SlotIndex, name)
    counted(MovePlanner, "_bring_next")
    counted(Runs, "used")
    counted(RequestRecord, "known_keys")
    search = HitFinder.search

    def searched(finder: HitFinder, record: RequestRecord) -> Iterator[ChunkKey | int]:
        """What is near is looked at by the dozen, and said how much that was."""
        for found in search(finder, record):
            counts["search"] += found if isinstance(found, int) else 1
            yield found

    monkeypatch.setattr(HitFinder, "search", searched)
    return counts


def engine(*far: list[int], near_slots: int = 3000, **settings: object) -> Engine:
    """An engine whose far tier has these prompts; its near tier is empty.

    Args:
        far: prompts.
        near_slots: slots of the near tier.
        settings: more keys of the far tier's configuration.
    """
    keys = dict.fromkeys(key for tokens in far for key in keys_of(tokens))
    return Engine(
        {"load": {"when": "always"}},
        near_slots=near_slots,
        far_slots=20_000,
        far=settings,
        stored=dict(enumerate(keys)),
    )


def queue(engine: Engine, requests: int, tokens: list[int]) -> list[View]:
    views = [View(f"waiting {n}", [*tokens, 10**6 + n]) for n in range(requests)]
    for view in views:
        engine.planner.arrived(view)
    return views


def plans(engine: Engine, looks: Counts) -> Iterator[int]:
    """Looks of one plan after the other, until nothing is looked at any more."""
    for _ in range(10_000):
        looks.clear()
        engine.step()
        yield looks.total()
        if not looks:
            return
    raise AssertionError("it never ends")


def test_requests_that_wait_for_what_is_near_are_looked_at_little_by_little(
    looks: Counts,
) -> None:
    driven, tokens = engine(), prompt(64 * CHUNK)
    driven.save(View("writer", [*tokens, 1]))
    driven.write_all()
    queue(driven, 200, tokens)
    each = list(plans(driven, looks))
    assert max(each) <= BOUND
    assert sum(each) >= 200 * 64, "each is looked at"
    looks.clear()
    driven.step()
    assert not looks, "and then never again"


def test_requests_that_find_nothing_are_looked_at_little_by_little(looks: Counts) -> None:
    driven = engine()
    queue(driven, 2000, prompt(8 * CHUNK))
    assert max(plans(driven, looks)) <= BOUND


@pytest.mark.parametrize("windows", [False, True])
def test_a_long_prompt_is_looked_at_in_several_plans(looks: Counts, windows: bool) -> None:
    full, window = Group(GroupKind.FULL, BLOCK), Group(GroupKind.WINDOW, BLOCK, 8 * CHUNK)
    driven, tokens = engine(), prompt(1200 * CHUNK)
    if windows:
        shape = ChunkShape(CHUNK, (full, window))
        driven = Engine(near_slots=3000, far_slots=3000, shape=shape)
    driven.save(View("writer", [*tokens, 1], tables={0: [1] * 2401, 1: [1] * 2401}))
    driven.write_all()
    queue(driven, 1, tokens)
    each = list(plans(driven, looks))
    assert max(each) <= BOUND
    assert sum(each) >= 1200


def test_of_a_long_queue_what_the_first_need_comes_first() -> None:
    near, far = prompt(64 * CHUNK), prompt(4 * CHUNK, seed=1)
    driven = engine(far, max_inflight=2 * CHUNK_BYTES)
    driven.save(View("writer", [*near, 1]))
    driven.write_all()
    queue(driven, 30, near)
    driven.planner.arrived(View("far", [*far, 1]))
    moved: list[ChunkKey] = []
    for _ in range(200):
        moved += [move.key for move in inward(driven.settle_moves())]
    assert moved == keys_of(far), "each once, in the order of the prompt"


def test_what_vanishes_while_it_is_looked_for_does_not_come() -> None:
    tokens = prompt(6 * CHUNK)
    driven = engine(tokens, max_inflight=CHUNK_BYTES)
    queue(driven, 1, tokens)
    (first,) = inward(driven.step())
    keys = keys_of(tokens)
    assert first.key == keys[0]
    driven.far.lost(keys[2], driven.far.hold(keys[2]))
    driven.answer(first.transfer)
    later = [move.key for _ in range(5) for move in inward(driven.settle_moves())]
    assert later == keys[1:2]
    assert not driven.planner.has_work


def crowd(driven: Engine, prompts: Sequence[list[int]]) -> list[View]:
    """Requests that wait, with prompts of their own."""
    views = [View(f"request {n}", [*tokens, 1]) for n, tokens in enumerate(prompts)]
    for view in views:
        driven.planner.arrived(view)
    return views


@pytest.mark.parametrize("near_slots", [3000, 300, 20])
def test_a_crowd_that_waits_for_far_tiers_costs_a_plan_a_bounded_number_of_looks(
    looks: Counts, near_slots: int
) -> None:
    """However little room there is near for what they wait for."""
    prompts = [prompt(16 * CHUNK, seed=seed) for seed in range(400)]
    driven = engine(*prompts, near_slots=near_slots, max_inflight=40 * CHUNK_BYTES)
    views = crowd(driven, prompts)
    plan = driven.step()
    for _ in range(100):
        for view in views:
            assert driven.planner.lookup(view, 0).tokens in (0, 16 * CHUNK, near_slots // 2 * CHUNK)
        looks.clear()
        driven.answer(*(move.transfer for move in inward(plan)))
        plan = driven.step()
        assert looks.total() <= BOUND


def test_a_crowd_that_waits_for_far_tiers_is_looked_up_little_by_little(looks: Counts) -> None:
    """An engine asks for all that wait, one after the other."""
    prompts = [prompt(64 * CHUNK, seed=seed) for seed in range(150)]
    driven = engine(*prompts)
    views = crowd(driven, prompts)
    begun, longest = set(), 0
    while len(begun) < len(views):
        looks.clear()
        for view in views:
            assert driven.planner.lookup(view, 0).ask_again
        longest = max(longest, looks["find"])
        new = {name for name, arrival in driven.planner._moves._arrivals.items() if arrival.waits}
        assert new > begun, "nobody is passed over for ever"
        begun = new
        driven.step()
    assert longest <= 4 * (LOOKED + 64)
    looks.clear()
    for view in views:
        driven.planner.lookup(view, 0)
    assert looks["find"] == 0, "who waits costs nothing but a question"


def test_waits_that_all_end_at_once_are_looked_up_little_by_little() -> None:
    prompts = [prompt(16 * CHUNK, seed=seed) for seed in range(400)]
    driven = engine(*prompts)
    left = crowd(driven, prompts)
    for _ in range(20):
        assert all(driven.planner.lookup(view, 0).ask_again for view in left)
        driven.step()
    driven.wait(100)
    ended = []
    while left:
        over = [view for view in left if not driven.planner.lookup(view, 0).ask_again]
        assert over, "nobody waits for ever"
        ended.append(len(over))
        for view in over:
            driven.planner.finished(view.request_id, 0, [()])
            left.remove(view)
        driven.step()
    assert max(ended) <= LOOKED // LOOKED_OF_AN_END + 1
    assert sum(ended) == 400


class Tables(View):
    """Counts how often its block table is read."""

    reads = 0

    def blocks(self, group: int = 0) -> Sequence[int]:
        type(self).reads += 1
        return super().blocks(group)


@pytest.mark.parametrize("why", [Unsaved.MAX_INFLIGHT, Unsaved.IN_USE])
def test_saves_that_are_held_back_are_not_looked_at(looks: Counts, why: Unsaved) -> None:
    Tables.reads = 0
    settings: dict[str, object] = {}
    if why is Unsaved.MAX_INFLIGHT:
        settings = {"save": {"max_inflight": CHUNK_BYTES}}
    driven = Engine(settings, near_slots=1 if why is Unsaved.IN_USE else 100)
    names = [f"running {n}" for n in range(20)]
    for number, name in enumerate(names):
        driven.planner.lookup(Tables(name, prompt(50 * CHUNK, seed=number)), 0)
        driven.planner.admitted(name, 0)
    runs = [(name, 0, 50 * CHUNK) for name in names]
    assert len(driven.planner.plan_step(runs, forward=True).saves) == 1
    reads = Tables.reads
    looks.clear()
    for _ in range(3):
        driven.planner.plan_step(runs, forward=True)
    assert (Tables.reads, looks.total()) == (reads, 0)
    assert driven.count("saves_held_back", why) == len(names), "each is counted once"


def test_saves_that_were_held_back_go_on_when_there_is_room() -> None:
    driven = Engine({"save": {"max_inflight": CHUNK_BYTES}})
    view = View("running", prompt(3 * CHUNK))
    driven.planner.lookup(view, 0)
    driven.planner.admitted("running", 0)
    saved = []
    for _ in range(4):
        plan = driven.planner.plan_step([("running", 0, 3 * CHUNK)], forward=True)
        saved += driven.keys(plan)
        driven.answer(*(order.transfer for order in plan.saves))
    assert saved == keys_of(view.token_ids)


def test_the_end_of_a_long_request_touches_its_runs_and_not_its_chunks(looks: Counts) -> None:
    driven, tokens = engine(), prompt(2000 * CHUNK)
    view = View("long", tokens)
    driven.planner.lookup(view, 0)
    driven.planner.admitted("long", 0)
    plan = driven.step(("long", len(tokens)))
    driven.answer(*(order.transfer for order in plan.saves))
    driven.write_all()
    looks.clear()
    driven.planner.finished("long", len(tokens), [view.blocks()])
    assert looks["used"] <= 4
    assert looks.total() + sum(plans(driven, looks)) <= 10
    oldest, *_, youngest = driven.near._runs
    saved = [order.slot for order in plan.saves]
    assert {oldest, youngest} == {saved[-1], saved[0]}, "the end is given up first"


def test_a_document_of_as_many_runs_as_chunks_is_used_little_by_little(looks: Counts) -> None:
    """After a restart nothing is known of what stands behind what."""
    tokens = prompt(1000 * CHUNK)
    driven = engine([*tokens, 1])
    view = View("first", [*tokens, 1])
    hit = driven.lookup(view)
    looks.clear()
    driven.planner.admitted("first", hit.tokens)
    each = [looks.total(), *plans(driven, looks)]
    assert max(each) <= BOUND
    driven.planner.finished("first", 0, [view.blocks()])
    for _ in range(40):
        driven.step()
    looks.clear()
    view = View("second", [*tokens, 1])
    hit = driven.planner.lookup(view, 0)
    driven.planner.admitted("second", hit.tokens)
    assert 0 < looks["used"] <= 20, "by now it is known"


class Looked(dict[ChunkKey, int]):
    """Counts what is looked up.

    Attributes:
        looks: how often.
    """

    looks = 0

    def __contains__(self, key: object) -> bool:
        self.looks += 1
        return super().__contains__(key)


def test_a_hit_that_is_near_is_looked_at_once_while_its_request_waits() -> None:
    driven, tokens = engine(), prompt(200 * CHUNK)
    near = driven.planner._books.catalog.near
    for key in keys_of(tokens):
        near.room(key)
        near.filled(key)
    near._visible = looked = Looked(near._visible)
    view = View("waits", tokens)
    driven.lookup(view)
    assert looked.looks >= 199
    before = looked.looks
    for _ in range(10):
        assert driven.lookup(view).loaded
    assert looked.looks - before <= 20


class NoWalk(dict[str, RequestRecord]):
    """A dictionary in which one may look, and which nobody may walk."""

    def _walked(self) -> Any:
        raise AssertionError("every request was looked at")

    __iter__ = keys = values = items = _walked


def test_a_lookup_looks_at_no_other_request() -> None:
    driven = engine()
    views = queue(driven, 3, prompt(4 * CHUNK))
    driven.planner._requests = NoWalk(driven.planner._requests)
    for view in views:
        driven.planner.lookup(view, 0)
    driven.planner.admitted(views[0].request_id, 0)
    driven.planner.lookup(views[1], 0)


# -- pushes ----------------------------------------------------------------------------------

PUSHES = 50


def pushing(name: str) -> Engine:
    row = RowCard(0, 64, 64, 1, (0,))
    ranks = (RankCard(0, b"", 100_000, (row,)),)
    return Engine({"push": {}}, card=EngineCard(name, b"", False, (("full", BLOCK, 0),), ranks))


def push_to(engine: Engine, number: int, prefill: str | None) -> View:
    view = View(f"request {number}", prompt(4 * CHUNK, seed=number), first_block=100 * number)
    view.push = PushParameters(f"push {number}", prefill)
    engine.planner.arrived(view)
    engine.now += 1
    return view


class NoWalkOfReservations(dict[str, int]):
    """A dictionary in which one may look, and which nobody may walk."""

    def _walked(self) -> Any:
        raise AssertionError("every prompt was looked at")

    __iter__ = keys = values = items = _walked


def test_a_prompt_without_a_destination_looks_at_no_other() -> None:
    driven = pushing("P")
    source = driven.pushes._source
    undelivered = source._undelivered
    undelivered._reserved = NoWalkOfReservations(undelivered._reserved)
    for number in range(PUSHES):
        view = push_to(driven, number, None)
        assert not driven.planner.lookup(view, 0).ask_again
        driven.planner.admitted(view.request_id, 0)
    assert len(undelivered._reserved) == PUSHES


class NoWalkOfPrompts(list[tuple[RequestRecord, float]]):
    """A list to which one may add, and which nobody may walk."""

    def __iter__(self) -> Any:
        raise AssertionError("every prompt was looked at")


def test_what_its_prefill_engine_does_not_have_looks_at_no_other() -> None:
    driven = pushing("D")
    target = driven.pushes._target
    driven.pushes.take_news([Opened("P", "P", SenderCard("P", False, ()))])
    views = [push_to(driven, number, "P") for number in range(PUSHES)]
    absent = [Letter("P", Absent(Attempt(f"push {n}", NO_EPOCH))) for n in range(PUSHES)]
    driven.pushes.take_news(absent)
    driven.wait(2)
    target._backlog._prompts = NoWalkOfPrompts()
    for view in views:
        driven.planner.lookup(view, 0)
    assert len(target._backlog._prompts) == 1, "one at a time, while nobody knows how long it takes"


def parking() -> tuple[Engine, PushTarget]:
    """A decode engine to which many prompts are on their way."""
    driven = pushing("D")
    target = driven.pushes._target
    driven.pushes.take_news([Opened("P", "P", SenderCard("P", False, ()))])
    for number in range(PUSHES):
        view = push_to(driven, number, "P")
        driven.planner.admitted(view.request_id, driven.planner.lookup(view, 0).tokens)
    return driven, target


def test_fences_of_many_pushes_cost_one_look_at_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driven, target = parking()
    letters = driven.pushes.drain_letters()
    attempts = [
        letter.message.attempt for letter in letters if isinstance(letter.message, Announce)
    ]
    looks, plain = Counts(), PushTarget._unfenced

    def counted(self: PushTarget, address: str) -> list[Inbound]:
        looks["all"] += 1
        return plain(self, address)

    monkeypatch.setattr(PushTarget, "_unfenced", counted)
    driven.pushes.take_news([Letter("P", Fenced(attempt, clean=True)) for attempt in attempts])
    assert len(target.give_ups) == len(attempts) == PUSHES
    assert looks["all"] <= 1

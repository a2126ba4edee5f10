"""A plan costs the same however many requests wait, are held back or have ended. What is counted
is work: chunks that are looked at, block tables that are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from driven_planner import BLOCK, CHUNK, CHUNK_BYTES, Engine, View, prompt

from lamina.control.catalog import TierCatalog
from lamina.control.eviction import SharedOutlivesSingle
from lamina.control.push_inbound import Inbound
from lamina.control.push_target import PushTarget
from lamina.control.requests import ChunkShape, PushParameters, RequestRecord
from lamina.geometry import Group, GroupKind
from lamina.plan import ChunkKey
from lamina.push.cards import EngineCard, RankCard, RowCard, SenderCard
from lamina.push.letters import Fate, Letter, Lost, Opened
from lamina.push.messages import NO_EPOCH, Absent, Announce, Attempt, Fenced

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
        counted(TierCatalog, name)
    counted(SharedOutlivesSingle, "touch")
    counted(RequestRecord, "known_keys")
    return counts


def engine(**disk: object) -> Engine:
    settings = {"disk": {"path": "/store", "capacity": "1GiB", **disk}, "load": {"when": "always"}}
    return Engine(settings, host_slots=3000, disk_slots=3000)


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


def test_requests_that_wait_for_what_is_in_host_memory_are_looked_at_little_by_little(
    looks: Counts,
) -> None:
    driven, tokens = engine(), prompt(64 * CHUNK)
    driven.save(View("writer", [*tokens, 1]))
    driven.settle_writes()
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
        driven = Engine(host_slots=3000, disk_slots=3000, shape=shape)
    driven.save(View("writer", [*tokens, 1], tables={0: [1] * 2401, 1: [1] * 2401}))
    driven.planner._catalog.host.clear()
    driven.save(View("writer again", [*tokens, 1], tables={0: [1] * 2401, 1: [1] * 2401}))
    list(plans(driven, looks))
    queue(driven, 1, tokens)
    each = list(plans(driven, looks))
    assert max(each) <= BOUND
    assert sum(each) >= 1200


def test_of_a_long_queue_the_first_are_fetched_first() -> None:
    driven = engine(fetch_ahead=2 * CHUNK_BYTES)
    in_host, on_disk = prompt(64 * CHUNK), prompt(4 * CHUNK, seed=1)
    driven.save(View("writer", [*on_disk, 1]))
    while driven.planner.has_work:
        driven.settle_writes()
    driven.planner._catalog.host.clear()
    driven.save(View("writer", [*in_host, 1]))
    while driven.planner.has_work:
        driven.settle_writes()
    queue(driven, 30, in_host)
    driven.planner.arrived(View("on disk", [*on_disk, 1]))
    fetched: list[ChunkKey] = []
    for _ in range(200):
        orders = driven.step().fetches
        fetched += [order.key for order in orders]
        driven.answer(*(order.transfer for order in orders))
    record = driven.planner._requests["on disk"]
    assert fetched == record.known_keys()[0], "each once, in the order of the prompt"


def test_what_vanishes_while_it_is_looked_for_is_not_fetched() -> None:
    driven, tokens = engine(fetch_ahead=CHUNK_BYTES), prompt(6 * CHUNK)
    driven.save(View("writer", [*tokens, 1]))
    while driven.planner.has_work:
        driven.settle_writes()
    catalog = driven.planner._catalog
    assert catalog.disk is not None
    catalog.host.clear()
    (view,) = queue(driven, 1, tokens)
    (first,) = driven.step().fetches
    keys = driven.planner._requests[view.request_id].known_keys()[0]
    assert first.key == keys[0]
    catalog.disk.drop(keys[2])
    later: list[ChunkKey] = []
    driven.answer(first.transfer)
    while orders := driven.step().fetches:
        later += [order.key for order in orders]
        driven.answer(*(order.transfer for order in orders))
    assert later == keys[1:2]
    assert not driven.planner.has_work


def test_a_chunk_that_a_load_reads_from_disk_is_not_fetched_beside_it() -> None:
    driven, tokens = engine(), prompt(4 * CHUNK)
    driven.save(View("writer", [*tokens, 1]))
    while driven.planner.has_work:
        driven.settle_writes()
    driven.planner._catalog.host.clear()
    views = queue(driven, 2, tokens)
    hit = driven.planner.lookup(views[0], 0)
    driven.planner.admitted(views[0].request_id, hit.tokens)
    plan = driven.step()
    assert len(plan.loads) == 1
    assert plan.fetches == ()


class Tables(View):
    """Counts how often its block table is read."""

    reads = 0

    def blocks(self, group: int = 0) -> Sequence[int]:
        type(self).reads += 1
        return super().blocks(group)


@pytest.mark.parametrize("why", ["max_inflight", "host_in_use"])
def test_saves_that_are_held_back_are_not_looked_at(looks: Counts, why: str) -> None:
    Tables.reads = 0
    settings: dict[str, object] = {}
    if why == "max_inflight":
        settings = {"save": {"max_inflight": CHUNK_BYTES}}
    driven = Engine(settings, host_slots=1 if why == "host_in_use" else 100)
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
        saves = driven.planner.plan_step([("running", 0, 3 * CHUNK)], forward=True).saves
        saved += [order.key for order in saves]
        driven.answer(*(order.transfer for order in saves))
    assert saved == driven.planner._requests["running"].known_keys()[0]


def test_the_end_of_a_long_request_ages_its_chunks_little_by_little(looks: Counts) -> None:
    driven, tokens = engine(), prompt(2000 * CHUNK)
    view = View("long", tokens)
    driven.planner.lookup(view, 0)
    driven.planner.admitted("long", 0)
    plan = driven.step(("long", len(tokens)))
    driven.answer(*(order.transfer for order in plan.saves))
    while driven.planner.has_work:
        driven.settle_writes()
    looks.clear()
    driven.planner.finished("long", len(tokens), [view.blocks()])
    first = looks.total()
    each = list(plans(driven, looks))
    assert max(first, *each) <= BOUND
    assert first + sum(each) >= 2000
    oldest, *_, youngest = driven.planner._catalog.host._order
    saved = [order.key for order in plan.saves]
    assert (oldest, youngest) == (saved[-1], saved[0]), "the end is given up first"


def test_a_long_document_that_is_found_again_is_shared_little_by_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driven, tokens = engine(), prompt(1000 * CHUNK)
    driven.save(View("first", [*tokens, *prompt(CHUNK, seed=9)]))
    for _ in range(20):
        driven.step()
    shares, share = Counts(), SharedOutlivesSingle.share

    def counted(order: SharedOutlivesSingle, key: ChunkKey) -> None:
        shares["all"] += 1
        share(order, key)

    monkeypatch.setattr(SharedOutlivesSingle, "share", counted)
    view = View("second", [*tokens, 1])
    hit = driven.planner.lookup(view, 0)
    driven.planner.admitted("second", hit.tokens)
    assert 0 < shares["all"] <= BOUND // 2
    for _ in range(20):
        driven.step()
    order = driven.planner._catalog.host._order
    keys = driven.planner._requests["second"].known_keys()[0]
    assert all(order.is_shared(key) for key in keys)


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
    source = driven.planner._source
    assert source is not None
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
    target = driven.planner._target
    assert target is not None
    driven.planner.take_news([Opened("P", "P", SenderCard("P", False, ()))])
    views = [push_to(driven, number, "P") for number in range(PUSHES)]
    absent = [Letter("P", Absent(Attempt(f"push {n}", NO_EPOCH))) for n in range(PUSHES)]
    driven.planner.take_news(absent)
    driven.wait(2)
    target._backlog._prompts = NoWalkOfPrompts()
    for view in views:
        driven.planner.lookup(view, 0)
    assert len(target._backlog._prompts) == 1, "one at a time, while nobody knows how long it takes"


def parking() -> tuple[Engine, PushTarget]:
    """A decode engine to which many prompts are on their way."""
    driven = pushing("D")
    target = driven.planner._target
    assert target is not None
    driven.planner.take_news([Opened("P", "P", SenderCard("P", False, ()))])
    for number in range(PUSHES):
        view = push_to(driven, number, "P")
        driven.planner.admitted(view.request_id, driven.planner.lookup(view, 0).tokens)
    return driven, target


class Walks(list[Letter]):
    """Counts how often it is walked, in part or whole."""

    walks = 0

    def __iter__(self) -> Iterator[Letter]:
        self.walks += 1
        return super().__iter__()

    def remove(self, value: Letter) -> None:
        self.walks += 1
        super().remove(value)


@pytest.mark.parametrize("told", [False, True])
def test_a_peer_that_is_lost_costs_one_look_at_what_was_to_be_said(told: bool) -> None:
    driven, target = parking()
    letters = Walks(target.letters)
    target.letters = letters
    if told:
        driven.planner.drain_letters()
    letters.walks = 0
    driven.planner.take_news([Lost("P", "gone", was_open=True, fate=Fate.CLOSED)])
    assert len(target.give_ups) == PUSHES
    assert letters.walks == 1


def test_fences_of_many_pushes_cost_one_look_at_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driven, target = parking()
    letters = driven.planner.drain_letters()
    attempts = [
        letter.message.attempt for letter in letters if isinstance(letter.message, Announce)
    ]
    looks, plain = Counts(), PushTarget._unfenced

    def counted(self: PushTarget, address: str) -> list[Inbound]:
        looks["all"] += 1
        return plain(self, address)

    monkeypatch.setattr(PushTarget, "_unfenced", counted)
    driven.planner.take_news([Letter("P", Fenced(attempt, clean=True)) for attempt in attempts])
    assert len(target.give_ups) == len(attempts) == PUSHES
    assert looks["all"] <= 1

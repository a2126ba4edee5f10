"""Which chunk goes first: what nobody shares, then what was shared longest ago; and who shares."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence

import pytest
from driven_planner import CHUNK, Engine, View, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.control.eviction import SHARED_LIFE, SharedOutlivesSingle
from lamina.plan import ChunkKey, TierName


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(4, "big"))


def with_keys(*numbers: int) -> SharedOutlivesSingle:
    order = SharedOutlivesSingle()
    for number in numbers:
        order.add(key(number))
    return order


def take(order: SharedOutlivesSingle) -> int:
    victim = order.victim(lambda _: True)
    assert victim is not None
    order.forget(victim)
    return int.from_bytes(victim, "big")


class Cache:
    """Room for ``size`` keys; one that is asked for and not there is added."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.order = SharedOutlivesSingle()
        self.held: set[ChunkKey] = set()

    def ask(self, number: int) -> bool:
        asked = key(number)
        if asked in self.held:
            self.order.share(asked)
            return True
        if len(self.held) == self.size:
            victim = self.order.victim(lambda _: True)
            assert victim is not None
            self.order.forget(victim)
            self.held.remove(victim)
        self.order.add(asked)
        self.held.add(asked)
        return False

    def hits(self, asked: Sequence[int]) -> int:
        return sum(self.ask(number) for number in asked)


def least_recently_used(size: int, asked: Sequence[int]) -> int:
    """Hits of the plain order."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number in asked:
        hits += number in held
        held[number] = None
        held.move_to_end(number)
        if len(held) > size:
            held.popitem(last=False)
    return hits


def test_what_was_used_once_goes_in_order_of_use() -> None:
    order = with_keys(1, 2, 3)
    order.touch(key(1))
    assert [take(order) for _ in range(3)] == [2, 3, 1]
    assert order.victim(lambda _: True) is None


def test_what_is_shared_outlives_what_is_not() -> None:
    order = with_keys(1, 2, 3)
    order.share(key(1))
    assert [take(order) for _ in range(3)] == [2, 3, 1]


def test_a_touch_does_not_make_it_shared() -> None:
    order = with_keys(1, 2)
    order.share(key(2))
    for _ in range(SHARED_LIFE):
        order.touch(key(1))
    assert take(order) == 1


def test_what_is_shared_is_not_kept_for_ever() -> None:
    """It goes when it is so many times as old as what would go otherwise."""
    order = with_keys(0)
    order.share(key(0))
    for number in range(1, 5):
        order.add(key(number))
    # Four keys: the oldest that was not used again is three additions old.
    kept = 4
    while take(order) != 0:
        kept += 1
        order.add(key(kept))
        assert kept < 4 + 2 * SHARED_LIFE * 4
    assert kept >= 3 * SHARED_LIFE


def test_a_key_in_use_is_passed_over_in_both_segments() -> None:
    order = with_keys(1, 2, 3, 4)
    order.share(key(1))
    order.share(key(2))
    busy = {key(3), key(1), key(4)}
    victim = order.victim(lambda k: k not in busy)
    assert victim == key(2)
    assert order.victim(lambda _: False) is None
    assert sorted(take(order) for _ in range(4)) == [1, 2, 3, 4]


def test_questions_that_nobody_repeats_do_not_push_documents_out() -> None:
    """Two of three questions are about one of 40 documents, the others about nothing again; there
    is room for 60."""
    chance = random.Random(1)
    asked = [chance.randrange(40) if chance.random() < 2 / 3 else 100 + i for i in range(20_000)]
    hits = Cache(60).hits(asked)
    assert hits > 1.1 * least_recently_used(60, asked)
    assert hits > 0.95 * sum(number < 40 for number in asked)


def test_documents_that_were_popular_once_make_room() -> None:
    """As many others, none of which is asked twice before all have been asked, get in."""
    cache = Cache(60)
    cache.hits(list(range(50)) * 20)
    others = list(range(1000, 1050))
    cache.hits(others * (2 * SHARED_LIFE))
    assert cache.hits(others) == len(others)


def write_all(engine: Engine) -> None:
    while engine.planner.has_work:
        engine.settle_writes()


def crowd(engine: Engine, requests: int) -> None:
    """Requests of one chunk each that share nothing."""
    for number in range(requests):
        engine.save(View(f"crowd {number}", prompt(40, seed=100 + number)))
        write_all(engine)


def is_kept(engine: Engine, length: int) -> bool:
    return engine.planner.lookup(View("look", prompt(length)), 0).tokens >= length - 16


def ask(engine: Engine, name: str, document: list[int], question: int) -> None:
    """Ask about a document: its chunks, and one of a question that nobody else has."""
    engine.save(View(name, document + prompt(40, seed=500 + question), first_block=50))


def test_a_document_that_was_asked_about_twice_outlives_a_crowd() -> None:
    engine, document = Engine(host_slots=6), prompt(96)
    ask(engine, "a", document, 1)
    ask(engine, "b", document, 2)
    crowd(engine, 9)
    assert is_kept(engine, 96)


def test_one_that_was_asked_about_once_does_not() -> None:
    engine, document = Engine(host_slots=6), prompt(96)
    ask(engine, "a", document, 1)
    crowd(engine, 9)
    assert not is_kept(engine, 96)


def test_one_that_is_in_the_engines_own_cache_is_shared_all_the_same() -> None:
    engine, document = Engine(host_slots=6), prompt(96)
    ask(engine, "a", document, 1)
    view = View("b", document + prompt(40, seed=2), first_block=50)
    engine.planner.lookup(view, 96)
    engine.planner.admitted("b", 0)
    plan = engine.step(("b", view.num_tokens))
    engine.answer(*(order.transfer for order in plan.saves))
    engine.planner.finished("b", view.num_tokens, [view.blocks()])
    crowd(engine, 9)
    assert is_kept(engine, 96)


def test_a_conversation_that_goes_on_is_not_shared() -> None:
    """Or all of it would stand in the way of others for long after it has ended."""
    engine, tokens = Engine(host_slots=6), prompt(160)
    for turn in (40, 75, 110, 145):
        engine.save(View(f"turn {turn}", tokens[:turn]))
    crowd(engine, 9)
    assert not is_kept(engine, 96)


def test_a_request_that_comes_back_is_not_somebody_else() -> None:
    """After a preemption, and where an engine ends it and takes it in again."""
    engine = Engine(host_slots=6)
    view = View("a", prompt(100))
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    plan = engine.step(("a", 100))
    engine.answer(*(order.transfer for order in plan.saves))
    engine.save(view)  # its blocks were taken away, and it loads what it had computed
    engine.save(View("a", prompt(101)))
    crowd(engine, 9)
    assert not is_kept(engine, 96)


def with_disk(slots: int) -> Engine:
    disk = {"path": "/store", "capacity": "1GiB"}
    return Engine({"disk": disk, "load": {"when": "always"}}, host_slots=6, disk_slots=slots)


def test_what_is_fetched_from_disk_is_shared_in_memory_as_it_was_there() -> None:
    engine, document = with_disk(100), prompt(96)
    for number, name in enumerate("ab"):
        ask(engine, name, document, number)
        write_all(engine)
    engine.planner._catalog.host.clear()
    engine.planner.arrived(View("c", [*document, -1]))
    engine.answer(*(order.transfer for order in engine.step().fetches))
    engine.planner.finished("c", 0, [])
    crowd(engine, 9)
    assert is_kept(engine, 96)
    assert engine.planner.hit_sources("look") == {TierName.HOST: 80}


def test_what_is_written_is_shared_on_disk_as_it_is_in_memory() -> None:
    engine, document = with_disk(6), prompt(96)
    ask(engine, "a", document, 1)
    plan = engine.save(View("b", document + prompt(40, seed=502), first_block=50))
    engine.answer(*(write.transfer for write in plan.writes))  # it was shared before they ended
    write_all(engine)
    engine.planner._catalog.host.clear()
    crowd(engine, 4)
    assert is_kept(engine, 96)
    assert engine.planner.hit_sources("look").keys() == {TierName.DISK}


@pytest.mark.parametrize("turns", [2, 3, 5])
def test_conversations_are_served_as_by_the_plain_order(turns: int) -> None:
    """Twenty in turn, each of which is followed by another one when it is over; the tier holds all
    that are alive, and half as much again."""
    live, per_turn = 20, 2
    engine = Engine(host_slots=live * turns * per_turn * 3 // 2)
    lost = 0
    for number in range(6 * live * turns):
        seat, turn = number % live, number // live % turns
        whose = 1000 + seat * 100 + number // (live * turns)
        tokens = prompt(turns * per_turn * CHUNK + 1, seed=whose)
        view = View(f"{whose} {turn}", tokens[: (turn + 1) * per_turn * CHUNK + 1])
        found = engine.planner.lookup(view, 0).tokens
        lost += turn * per_turn * CHUNK - found
        engine.save(view)
    assert lost == 0


@settings(deadline=None)  # other tests run beside it
@given(st.lists(st.tuples(st.sampled_from("atrfv"), st.integers(0, 9), st.integers(0, 7))))
def test_against_a_list(history: list[tuple[str, int, int]]) -> None:
    """Every operation as it would be done with all keys in a list."""
    order = SharedOutlivesSingle()
    added = 0
    ages: dict[int, tuple[bool, int, int]] = {}  # used again, added when used, moment of use
    moment = 0
    for what, number, modulus in history:
        moment += 1
        if what == "a" and number not in ages:
            added += 1
            order.add(key(number))
            ages[number] = (False, added, moment)
        elif what == "t" and number in ages:
            order.touch(key(number))
            ages[number] = (ages[number][0], added, moment)
        elif what == "r" and number in ages:
            order.share(key(number))
            ages[number] = (True, added, moment)
        elif what == "f":
            order.forget(key(number))
            ages.pop(number, None)
        elif what == "v":
            busy = {n for n in ages if modulus and n % modulus == 0}
            victim = order.victim(lambda k: int.from_bytes(k, "big") not in busy)  # noqa: B023
            free = [n for n in ages if n not in busy]
            assert (victim is None) == (not free)
            if victim is None or busy:  # a busy one that was in the way has become young
                for n in busy:
                    order.forget(key(n))
                    del ages[n]
                continue
            first = {
                again: min((n for n in free if ages[n][0] is again), key=lambda n: ages[n][2])
                for again in (False, True)
                if any(ages[n][0] is again for n in free)
            }
            age = {
                n: (added - ages[n][1]) * (1 if again else SHARED_LIFE)
                for again, n in first.items()
            }
            assert int.from_bytes(victim, "big") == max(first.values(), key=lambda n: age[n])
        assert len(order) == len(ages)
        assert sorted(order) == sorted(key(n) for n in ages)

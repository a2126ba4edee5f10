"""What is told of tiers is what is there and can be found, however it came and went."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import pytest
from driven_planner import (
    CHUNK,
    FAR,
    Engine,
    View,
    asks,
    inward,
    keys_of,
    outward,
    prompt,
)

from lamina_kv.control.reporting import residency
from lamina_kv.control.requests import RequestView
from lamina_kv.keys import CHECKPOINT
from lamina_kv.plan import NEAR, Outcome, TierName, TierReport

STORE = TierName("store")


@dataclass(frozen=True)
class Text:
    """The tokens up to a chunk's end; engines call it nothing else, whatever the adapter is."""

    name: Hashable


def describe(view: RequestView, group: int, index: int) -> Text:
    return Text((group, tuple(view.tokens()[: (index + 1) * CHUNK])))


class Listener:
    """Believes what it is told, and sees whether that makes sense."""

    def __init__(self, engine: Engine) -> None:
        assert engine.planner.residency is not None
        self.residency = engine.planner.residency
        self.held: dict[TierName, set[Hashable]] = {}

    def hears(self) -> list[tuple[str, TierName]]:
        """What it is told; for each chunk a word and the tier."""
        said = []
        for change in self.residency.take():
            held = self.held.setdefault(change.tier, set())
            assert (change.label.name in held) is not change.stored
            (held.add if change.stored else held.remove)(change.label.name)
            said.append(("stored" if change.stored else "removed", change.tier))
        return said


def listened(**given: object) -> tuple[Engine, Listener]:
    engine = Engine(describe=describe, **given)  # type: ignore[arg-type]
    return engine, Listener(engine)


def names(tokens: list[int], chunks: int) -> set[Hashable]:
    return {(0, tuple(tokens[: (n + 1) * CHUNK])) for n in range(chunks)}


# -- comings and goings --------------------------------------------------------------------------


def test_where_nobody_listens_nothing_is_remembered() -> None:
    engine = Engine(far_slots=10)
    engine.save(View("a", prompt(3 * CHUNK)))
    assert engine.planner.residency is None
    assert engine.near.on_change is engine.far.on_change is None


def test_a_chunk_is_told_of_when_it_can_be_found_in_each_tier() -> None:
    engine, listener = listened(far_slots=10)
    tokens, view = prompt(2 * CHUNK + 1), View("a", prompt(2 * CHUNK + 1))
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    plan = engine.step(("a", len(tokens)))
    assert listener.hears() == [], "nothing has arrived"
    engine.planner.finished("a", len(tokens), [view.blocks()])
    engine.answer(*(save.transfer for save in plan.saves))
    assert listener.hears() == [("stored", NEAR)] * 2
    assert listener.held[NEAR] == names(tokens, 2)
    engine.write_all()
    assert listener.hears() == [("stored", FAR)] * 2
    engine.forget_near()
    assert listener.hears() == [("removed", NEAR)] * 2
    assert listener.held == {NEAR: set(), FAR: names(tokens, 2)}


def test_what_was_not_saved_is_not_told_of_and_not_remembered() -> None:
    engine, listener = listened()
    view = View("a", prompt(2 * CHUNK + 1))
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    first, second = engine.step(("a", view.num_tokens)).saves
    engine.planner.finished("a", 2 * CHUNK, [view.blocks()])
    engine.answer(first.transfer, outcome=Outcome.FAILED)
    engine.planner.reset()  # the other one is disowned
    engine.answer(second.transfer)
    assert listener.hears() == []
    assert not listener.residency._entries


def test_what_makes_room_is_told_of() -> None:
    engine, listener = listened(near_slots=3)
    engine.save(View("a", prompt(3 * CHUNK + 1, seed=1)))
    listener.hears()
    engine.save(View("b", prompt(2 * CHUNK + 1, seed=2)))
    assert sorted(listener.hears()) == [("removed", NEAR)] * 2 + [("stored", NEAR)] * 2
    assert len(listener.held[NEAR]) == 3
    assert len(listener.residency._entries) == 3


def test_what_comes_near_and_what_is_damaged_is_told_of() -> None:
    engine, listener = listened(extra={"load": {"when": "always"}}, far_slots=10)
    tokens = prompt(2 * CHUNK + 1)
    engine.save(View("a", tokens))
    engine.write_all()
    engine.forget_near()
    listener.hears()
    engine.planner.arrived(View("b", tokens))
    first, second = inward(engine.step())
    engine.answer(first.transfer)
    engine.answer(second.transfer, outcome=Outcome.FAILED, lost=True)
    assert listener.hears() == [("stored", NEAR), ("removed", FAR)]
    engine.planner.finished("b", 0, [])
    assert listener.held == {NEAR: names(tokens, 1), FAR: names(tokens, 1)}
    assert len(listener.residency._entries) == 1


# -- what was there before -----------------------------------------------------------------------


def test_what_a_tier_held_before_is_told_of_when_a_prompt_names_it() -> None:
    tokens = prompt(4 * CHUNK + 1)
    stored = dict(enumerate(keys_of(tokens)))
    engine, listener = listened(far_slots=10, stored=stored)
    assert listener.hears() == [], "nobody knows of what prompt it is a part"
    engine.planner.arrived(View("a", tokens[: 3 * CHUNK]))
    assert listener.hears() == [("stored", FAR)] * 3
    engine.planner.finished("a", 0, [])
    engine.planner.arrived(View("b", tokens))
    assert listener.hears() == [("stored", FAR)]
    assert listener.held == {FAR: names(tokens, 4)}


def by_key(**given: object) -> tuple[Engine, Listener]:
    """An engine with a store that finds chunks by key."""
    tier = {"kind": "directory", "name": STORE, "path": "/store"}
    engine, listener = listened(
        extra={"tiers": [tier], "load": {"when": "always"}},
        tiers=[TierReport(STORE, 0, None)],
        **given,
    )
    return engine, listener


def test_what_a_store_says_that_it_has_is_told_of_until_it_turns_out_to_be_gone() -> None:
    engine, listener = by_key()
    tokens = prompt(2 * CHUNK + 1)
    engine.planner.arrived(View("a", tokens))
    (ask,) = asks(engine.step())
    engine.answer(ask.transfer, present=b"\1\0")
    assert listener.hears() == [("stored", STORE)]
    (move,) = inward(engine.step())
    engine.answer(move.transfer, outcome=Outcome.FAILED, lost=True)
    assert listener.hears() == [("removed", STORE)]


def test_an_answer_that_nobody_waits_for_is_not_told_of() -> None:
    engine, listener = by_key()
    tokens = prompt(CHUNK + 1)
    engine.planner.arrived(View("a", tokens))
    (ask,) = asks(engine.step())
    engine.planner.finished("a", 0, [])
    engine.answer(ask.transfer, present=b"\1")
    assert (listener.hears(), len(listener.residency._entries)) == ([], 0)
    engine.planner.arrived(View("b", tokens))
    assert listener.hears() == [("stored", STORE)]


def test_what_is_written_to_a_store_is_told_of_when_it_is_there() -> None:
    engine, listener = by_key()
    engine.save(View("a", prompt(CHUNK + 1)))
    (move,) = outward(engine.step())
    assert listener.hears() == [("stored", NEAR)]
    engine.answer(move.transfer)
    assert listener.hears() == [("stored", STORE)]


# -- what can be found ---------------------------------------------------------------------------


def test_a_reset_takes_back_what_was_told_and_old_weights_that_return_bring_it_back() -> None:
    engine, listener = listened(far_slots=10)
    old, new = prompt(2 * CHUNK + 1, seed=1), prompt(CHUNK + 1, seed=2)
    engine.save(View("a", old))
    engine.write_all()
    listener.hears()
    engine.planner.reset()
    assert sorted(listener.hears()) == [("removed", FAR)] * 2 + [("removed", NEAR)] * 2
    engine.save(View("b", new))
    assert listener.hears() == [("stored", NEAR)]
    engine.near.drop(keys_of(old)[1])
    assert listener.hears() == [], "it was told of no more"
    engine.planner.begin(CHECKPOINT)
    listener.hears()
    assert listener.held == {NEAR: names(old, 1), FAR: names(old, 2)}


def test_an_adapter_that_is_loaded_anew_under_its_name_takes_the_place_of_the_old_one() -> None:
    engine, listener = listened()
    tokens = prompt(2 * CHUNK + 1)
    engine.save(View("a", tokens, root_extra=b"old content"))
    assert listener.hears() == [("stored", NEAR)] * 2
    engine.planner.arrived(View("b", tokens, root_extra=b"new content"))
    assert listener.hears() == [("removed", NEAR)] * 2, "nothing of the new one is there"
    engine.save(View("b", tokens, root_extra=b"new content"))
    assert listener.hears() == [("stored", NEAR)] * 2
    engine.planner.arrived(View("c", tokens, root_extra=b"old content"))
    assert listener.hears() == [("removed", NEAR), ("stored", NEAR)] * 2
    engine.forget_near()
    assert listener.hears() == [("removed", NEAR)] * 2


def test_all_can_be_told_again_to_who_has_forgotten_it() -> None:
    engine, listener = listened(far_slots=10)
    tokens = prompt(2 * CHUNK + 1)
    engine.save(View("a", tokens))
    engine.write_all()
    listener.hears()
    listener.residency.tell_again()
    changes = listener.residency.take()
    assert [change.stored for change in changes] == [False] * 4 + [True] * 4
    assert {(c.tier, c.label.name) for c in changes[4:]} == {
        (tier, name) for tier in (NEAR, FAR) for name in names(tokens, 2)
    }


# -- how much at once ----------------------------------------------------------------------------


def test_a_step_tells_so_much_and_the_engine_steps_on_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, listener = listened()
    engine.save(View("a", prompt(5 * CHUNK + 1)))
    assert not engine.planner.has_work, "one step tells it, whenever that comes"
    told = []
    while changes := listener.residency.take(2):
        told.append((len(changes), engine.planner.has_work))
    assert told == [(2, True), (2, True), (1, False)]
    assert residency.MOST_TOLD > 1000


def test_what_asks_for_keys_of_a_request_that_is_over_labels_nothing() -> None:
    engine, listener = listened()
    view = View("a", prompt(2 * CHUNK + 1))
    engine.planner.arrived(view)
    record = engine.planner._requests["a"]
    engine.planner.finished("a", 0, [])
    assert len(record.known_keys()[0]) == 2
    assert not listener.residency._entries


def test_a_prompt_that_is_taken_back_in_part_is_labelled_anew() -> None:
    engine, listener = listened()
    view = View("a", prompt(2 * CHUNK + 1))
    engine.planner.arrived(view)
    assert len(listener.residency._entries) == 2
    view.token_ids[CHUNK] += 1
    engine.planner.arrived(view)
    assert {entry.label.name for entry in listener.residency._entries.values()} == names(
        view.token_ids, 2
    )
    engine.planner.finished("a", 0, [])
    assert not listener.residency._entries

"""A tier that finds chunks by key is asked little at a time, and a hint lasts as long as whoever
relies on it looks. One that does not answer is tried again at growing intervals, and holds up one
request a try."""

from __future__ import annotations

from itertools import pairwise

import pytest
from driven_planner import CHUNK, Engine, View, asks, inward, keys_of, outward, probes, prompt

from lamina_kv.control.lanes import ANSWER_TIMEOUT
from lamina_kv.plan import Ask, Outcome, StepPlan, TierName, TierReport
from lamina_kv.tiers.hints import BELIEVED_SECONDS, HANGS_SECONDS, MOST_ASKED, MOST_UNANSWERED

KEYED = TierName("keyed")
STEP = 0.2
"""Seconds of a busy engine's step, longer than a request waits for an answer."""

PATIENT = 1000
"""Failures in a row after which a breaker opens that is to stay closed."""


def keyed(*, failures: int = 3, **more: object) -> Engine:
    """An engine whose far tier finds chunks by key."""
    tier = {"kind": "disk", "name": KEYED, "path": "/store", "capacity": "1GiB"}
    settings = {
        "tiers": [tier],
        "load": {"when": "always", "deadline": 20},
        "breaker": {"failures": failures, "pause": 10},
    }
    return Engine(settings, tiers=[TierReport(KEYED)], **more)  # type: ignore[arg-type]


def answer(driven: Engine, plan: StepPlan, *, there: bool) -> None:
    for ask in asks(plan):
        driven.answer(ask.transfer, present=bytes([there]) * len(ask.keys))


def serve(driven: Engine, seed: int, *, fails: bool = False) -> tuple[int, int]:
    """A request comes, and begins when it need not ask again.

    Returns:
        For how many steps it waited, and how many questions were asked meanwhile.
    """
    view, steps, questions = View(f"request {seed}", prompt(3 * CHUNK + 1, seed)), 0, 0
    while driven.planner.lookup(view, 0).ask_again:
        plan = driven.step()
        driven.now += STEP
        steps += 1
        questions += len(asks(plan))
        if fails:
            driven.answer(*(ask.transfer for ask in asks(plan)), outcome=Outcome.FAILED)
    driven.planner.admitted(view.request_id, 0)
    driven.planner.finished(view.request_id, 0, [()])
    return steps, questions


@pytest.mark.parametrize("reading", range(12))
def test_a_hint_that_ends_during_a_lookup_is_believed_throughout_or_not_at_all(
    reading: int,
) -> None:
    now, left = 0.0, -1

    def clock() -> float:
        nonlocal now, left
        now, left = now + (BELIEVED_SECONDS if left == 0 else 0), left - 1
        return now

    driven, tokens = keyed(clock=clock), prompt(3 * CHUNK + 1)
    view = View("a", tokens)
    assert driven.planner.lookup(view, 0).ask_again
    answer(driven, driven.step(), there=True)
    left = reading
    offer = driven.planner.lookup(view, 0)
    assert offer.ask_again
    plan = driven.step()
    answer(driven, plan, there=True)
    assert [move.key for move in inward(plan)] in (keys_of(tokens), [])


# -- before a write -----------------------------------------------------------------------------


def test_a_store_is_asked_for_all_that_waits_before_anything_is_written() -> None:
    driven, tokens = keyed(), prompt(4 * CHUNK + 1)
    driven.save(View("a", tokens))
    driven.now += BELIEVED_SECONDS  # what it said when the request came is forgotten
    plan = driven.step()
    ((ask,),) = [asks(plan)]
    assert (list(ask.keys), outward(plan)) == (keys_of(tokens), ())
    driven.answer(ask.transfer, present=b"\1\1\0\0")
    assert [move.key for move in outward(driven.step())] == keys_of(tokens)[2:]
    assert driven.count("writes_skipped", KEYED, "already_there") == 2


def test_what_a_store_just_said_it_lacks_is_written_without_another_question() -> None:
    driven, tokens = keyed(), prompt(4 * CHUNK + 1)
    driven.save(View("a", tokens))
    plan = driven.step()
    assert (asks(plan), [move.key for move in outward(plan)]) == ((), keys_of(tokens))


@pytest.mark.parametrize("how", ["fails", "hangs", "out of use"])
def test_a_store_that_does_not_answer_is_written_to_all_the_same(how: str) -> None:
    driven, tokens = keyed(failures=1 if how == "out of use" else PATIENT), prompt(4 * CHUNK + 1)
    if how == "out of use":
        driven.planner._books.breakers.reads(KEYED).judge(good=False)
    driven.planner.admitted("a", driven.planner.lookup(View("a", tokens), 0, may_wait=False).tokens)
    driven.answer(*(order.transfer for order in driven.step(("a", 4 * CHUNK)).saves))
    plan, steps = driven.step(), 0
    while not outward(plan) and steps < 20:
        if how == "fails":
            driven.answer(*(ask.transfer for ask in asks(plan)), outcome=Outcome.FAILED)
        driven.now += STEP
        plan, steps = driven.step(), steps + 1
    assert [move.key for move in outward(plan)] == keys_of(tokens)
    assert steps <= {"fails": 1, "hangs": ANSWER_TIMEOUT / STEP + 1, "out of use": 0}[how]


def test_a_store_that_hangs_holds_up_one_write_and_not_each() -> None:
    driven = keyed(failures=PATIENT)
    for seed in range(3):
        view = View(f"{seed}", prompt(CHUNK + 1, seed))
        driven.planner.admitted(
            view.request_id, driven.planner.lookup(view, 0, may_wait=False).tokens
        )
        driven.answer(*(each.transfer for each in driven.step((view.request_id, CHUNK)).saves))
        for _ in range(20):
            if outward(driven.step()):
                break
            driven.now += STEP
    assert driven.now <= ANSWER_TIMEOUT + 2 * STEP


def test_every_chunk_that_a_store_was_asked_for_is_counted_by_its_answer() -> None:
    driven, answers = keyed(failures=PATIENT), [b"\1\1\0", b"\0\0\0", None]
    for seed, present in enumerate(answers):
        driven.planner.arrived(View(f"{seed}", prompt(3 * CHUNK, seed)))
        ((ask,),) = [asks(driven.step())]
        how = {"outcome": Outcome.FAILED, "reason": "late"} if present is None else {}
        driven.answer(ask.transfer, present=present or b"", **how)  # type: ignore[arg-type]
    counters = driven.readings().counters
    assert {labels: n for (name, labels), n in counters.items() if name == "asked"} == {
        (KEYED, "here"): 2,
        (KEYED, "absent"): 4,
        (KEYED, "none"): 3,
    }
    assert counters["failures", (KEYED, "ask_late")] == 1


# -- when it does not answer ---------------------------------------------------------------------


def test_a_tier_that_answers_probes_only_is_tried_at_growing_intervals() -> None:
    driven = keyed()
    waits = []
    for seed in range(40):
        waits.append(serve(driven, seed, fails=True))
        driven.now += 30
        driven.answer(*probes(driven.step()))
    assert all(waits[:3])
    asked = [seed for seed, (_, questions) in enumerate(waits) if questions]
    assert len(asked) <= 12, "an engine that asks every request asks forty times"
    later = [b - a for a, b in pairwise(asked[2:])]
    assert later == sorted(later)


def test_a_question_is_the_one_try_of_a_tier_that_is_out_of_use() -> None:
    driven = keyed(failures=1)
    serve(driven, 0, fails=True)
    driven.now += 10
    driven.planner.arrived(View("a", prompt(CHUNK + 1, 1)))
    (ask,) = asks(driven.step())
    driven.planner.arrived(View("b", prompt(CHUNK + 1, 2)))
    assert not asks(driven.step())
    assert not driven.planner.lookup(View("b", prompt(CHUNK + 1, 2)), 0).ask_again
    driven.answer(ask.transfer, present=b"\0")
    driven.planner.arrived(View("c", prompt(CHUNK + 1, 3)))
    assert asks(driven.step()), "it answers again"


def test_what_a_tier_that_is_out_of_use_was_to_be_asked_does_not_keep_the_engine_awake() -> None:
    driven = keyed(failures=1)
    driven.planner.arrived(View("a", prompt(CHUNK + 1, 1)))
    (ask,) = asks(driven.step())
    driven.planner.arrived(View("b", prompt(CHUNK + 1, 2)))
    driven.answer(ask.transfer, outcome=Outcome.FAILED)
    assert not driven.planner.has_work


def test_a_tier_that_hangs_holds_up_few_requests() -> None:
    driven = keyed(failures=PATIENT)
    waits = [serve(driven, seed)[0] for seed in range(MOST_UNANSWERED)]
    assert all(waits)
    driven.now += HANGS_SECONDS
    assert [serve(driven, seed)[0] for seed in range(10, 20)] == [0] * 10


def test_a_tier_that_hung_and_answers_is_asked_again() -> None:
    driven = keyed(failures=PATIENT)
    sent: list[Ask] = []
    for seed in range(MOST_UNANSWERED):
        driven.planner.arrived(View(f"{seed}", prompt(CHUNK + 1, seed)))
        sent += asks(driven.step())
    driven.now += HANGS_SECONDS
    assert serve(driven, 10)[0] == 0
    driven.answer(sent[0].transfer, present=b"\0")
    assert driven.planner.lookup(View("a", prompt(CHUNK + 1, 11)), 0).ask_again
    assert asks(driven.step())


def test_one_question_has_so_many_chunks_and_the_next_one_the_rest() -> None:
    driven, tokens = keyed(), prompt((MOST_ASKED + 3) * CHUNK)
    driven.planner.arrived(View("a", tokens))
    plans = [driven.step() for _ in range(3)]
    assert [[len(ask.keys) for ask in asks(plan)] for plan in plans] == [[MOST_ASKED], [3], []]


def test_chunks_of_weights_without_a_name_are_asked_for_nowhere() -> None:
    driven, view = keyed(), View("a", prompt(3 * CHUNK + 1))
    driven.planner.reset()
    driven.planner.arrived(view)
    assert not driven.planner.lookup(view, 0).ask_again
    assert not asks(driven.step())
